"""The figure of the study `schedules`: learned schedules, how they were learned, what they give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.figures import column, save_figure
from experiments.studies.study import rows_of

Rows = Sequence[dict[str, Any]]
COLOURS = {
    "constant": "0.65",
    "linear": "0.45",
    "cosine": "0.15",
    "per step": "#e69f00",
    "per step and layer": "#d55e00",
    "per step and layer, many starts": "#0072b2",
}
LAYERS = ["#0072b2", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#56b4e9"]


def schedules_figure(rows: Rows, path: Path) -> None:
    """Four panels: per step, per step and layer, E while learning, losses on test images.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    shapes = rows_of(rows, "schedule")
    _plot_shared(axes[0, 0], shapes)
    many = "per step and layer, many starts"
    _plot_layers(axes[0, 1], rows_of(shapes, method=many))
    axes[0, 1].set_title(f"Learned {many}; a line per seed")
    learned = [v for row in shapes for n, v in row.items() if n[:5] == "layer" and row["step"] < 90]
    for panel in axes[0]:
        panel.set_ylim(0.8 * min(learned), 1.25 * max(learned))
    _plot_updates(axes[1, 0], rows)
    _plot_ends(axes[1, 1], rows)
    save_figure(figure, path)


def _seeds(rows: Rows) -> list[int]:
    return list(dict.fromkeys(row["seed"] for row in rows))


def _plot_shared(axes: Axes, rows: Rows) -> None:
    for method in ("constant", "linear", "cosine", "per step"):
        for number, seed in enumerate(_seeds(rows)):
            own = rows_of(rows, "schedule", method=method, seed=seed)
            label = f"learned {method}" if method == "per step" else f"best {method}"
            axes.plot(
                column(own, "step") + 1, column(own, "layer 0"), color=COLOURS[method],
                lw=1.6, ls="-" if method == "per step" else "--", label=None if number else label,
            )  # fmt: skip
    axes.set(yscale="log", xlabel="training step t", ylabel="learning rate η (log scale)")
    axes.set_title("One learning rate per step, learned and searched; a line per seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_layers(axes: Axes, rows: Rows) -> None:
    layers = [name for name in rows[0] if name.startswith("layer ")]
    for colour, layer in zip(LAYERS, layers, strict=False):
        for number, seed in enumerate(_seeds(rows)):
            own = rows_of(rows, seed=seed)
            label = {"layer 0": "first layer", layers[-1]: "last layer"}.get(
                layer, f"layer {int(layer.split()[1]) + 1}"
            )
            axes.plot(
                column(own, "step") + 1, column(own, layer), color=colour, lw=1.4,
                label=None if number else label,
            )  # fmt: skip
    axes.set(yscale="log", xlabel="training step t", ylabel="learning rate η (log scale)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_updates(axes: Axes, rows: Rows) -> None:
    """E at each training, in relation to the best constant learning rate of the same seed."""
    base = {
        row["seed"]: row["validation_loss"] for row in rows_of(rows, "chosen", method="constant")
    }
    for method in dict.fromkeys(row["method"] for row in rows_of(rows, "update")):
        curves = [
            column(rows_of(rows, "update", method=method, seed=seed), "validation_loss")
            - base[seed]
            for seed in base
        ]
        for number, curve in enumerate(curves):
            axes.plot(
                range(1, len(curve) + 1), curve, color=COLOURS[method],
                label=None if number else f"learned {method}",
            )  # fmt: skip
    for shape, style in (("constant", "-"), ("linear", "--"), ("cosine", ":")):
        ends = [
            row["validation_loss"] - base[row["seed"]]
            for row in rows_of(rows, "chosen", method=shape)
        ]
        axes.axhline(np.mean(ends), color=COLOURS[shape], ls=style, label=f"best {shape}")
    lows = [row["validation_loss"] - base[row["seed"]] for row in rows_of(rows, "update")]
    axes.set_ylim(1.15 * min(lows), max(0.05, -1.5 * min(lows)))
    axes.set(xlabel="trainings, each differentiated as a whole")
    axes.set_ylabel("validation loss, less that of the\nbest constant learning rate (nats)")
    axes.set_title("Adam on log η; a line per seed, mean over seeds for those searched")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)


def _plot_ends(axes: Axes, rows: Rows) -> None:
    methods = [method for method in COLOURS if rows_of(rows, "chosen", method=method)]
    for place, method in enumerate(methods):
        for what, shift, alpha in (("chosen", -0.2, 1.0), ("fresh", 0.2, 0.5)):
            own = rows_of(rows, what, method=method)
            means = [column(rows_of(own, seed=seed), "test_loss").mean() for seed in _seeds(own)]
            axes.bar(place + shift, np.mean(means), 0.38, color=COLOURS[method], alpha=alpha)
            axes.plot([place + shift] * len(means), means, "o", color="black", ms=4)
    names = [
        f"best\n{name}" if name in ("constant", "linear", "cosine")
        else "learned\n" + name.replace(" and ", "\nand ").replace(", ", ",\n")
        for name in methods
    ]  # fmt: skip
    axes.set_xticks(range(len(methods)), names, fontsize="small")
    values = [row["test_loss"] for what in ("chosen", "fresh") for row in rows_of(rows, what)]
    axes.set_ylim(0.95 * min(values), 1.02 * max(values))
    axes.set_ylabel("test loss at step T (nats)")
    axes.set_title("Left bar: the start it was chosen on; right bar: other starts")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
