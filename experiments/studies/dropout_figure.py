"""The figure of `self_tuning` and `black_box`: test losses, and where the hyperparameters went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments.figures import column, save_figure
from experiments.studies.dropout_comparison import best_of_grid
from experiments.studies.study import rows_of

Rows = Sequence[dict[str, Any]]
COLOURS = ["#009e73", "#d55e00", "#0072b2"]  # of the methods that learn, in order
GREY = "0.45"
MARKERS = {"low": "^", "high": "v"}
LINES = {"low": "-", "high": "--"}
FROM = {"low": "from too little", "high": "from too much"}
AXES: dict[str, dict[str, Any]] = {
    "input_dropout": {"ylabel": "dropout rate of pixels", "ylim": (0, 0.85)},
    "hidden_dropout": {"ylabel": "dropout rate of hidden units", "ylim": (0, 0.85)},
    "weight_decay": {"ylabel": "weight decay λ (log scale, no unit)", "yscale": "log"},
    "shift": {"ylabel": "shift: σ (pixels; log scale)", "yscale": "log"},
}


def dropout_figure(
    rows: Rows, learn: Sequence[str], methods: Mapping[str, str], path: Path
) -> None:
    """Test loss of every run by method, and one panel for each hyperparameter against steps.

    Args:
        rows: of `numbers.csv`.
        learn: the hyperparameters.
        methods: names and labels; "fixed" and "grid" first.
        path: of the PNG.
    """
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 9), layout="constrained")
    colours = dict(zip(list(methods)[2:], COLOURS, strict=False))
    best = best_of_grid(rows)
    _plot_losses(axes[0, 0], rows, best, methods, colours)
    for panel, name in zip(axes.flat[1:], learn, strict=True):
        _plot_paths(panel, rows, name, methods, colours)
        steps = max(row["step"] for row in rows_of(rows, "trace"))
        values = [row[name] for row in best]
        panel.plot(
            [1.03 * steps] * len(values), values, "_", color="black", ms=16, mew=2.5,
            label="best of the grid, by seed",
        )  # fmt: skip
        panel.set(xlabel="training step", **AXES[name])
        if name == "shift":
            _label_logs(panel, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5))
        panel.grid(alpha=0.3)
    handles, _ = axes.flat[1].get_legend_handles_labels()
    handles += [Line2D([], [], color=GREY, ls=LINES[start], label=FROM[start]) for start in FROM]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save_figure(figure, path)


def _plot_losses(
    axes: Axes,
    rows: Rows,
    best: Rows,
    methods: Mapping[str, str],
    colours: Mapping[str, str],
) -> None:
    for place, method in enumerate(methods):
        colour = colours.get(method, GREY)
        if method == "grid":
            every = [row["test_loss"] for row in rows_of(rows, "grid")]
            axes.plot([place] * len(every), every, ".", color="0.8", ms=5)
            axes.plot([place] * len(best), [row["test_loss"] for row in best], "o", color="black")
            continue
        for shift, start in ((-0.14, "low"), (0.14, "high")):
            values = [row["test_loss"] for row in rows_of(rows, "run", method=method, start=start)]
            axes.plot(
                [place + shift] * len(values), values, MARKERS[start], color=colour, ms=8,
                alpha=0.8,
            )  # fmt: skip
    for start, marker in MARKERS.items():
        axes.plot([], [], marker, color=GREY, ms=8, label=f"{FROM[start]}, a point per seed")
    axes.plot([], [], "o", color="black", label="best of the grid by validation")
    axes.plot([], [], ".", color="0.8", label="all of the grid")
    axes.set_xticks(range(len(methods)), [label.replace(", ", ",\n") for label in methods.values()])
    axes.tick_params(axis="x", labelsize="small", rotation=15)
    axes.set(yscale="log", ylabel="test loss (nats; log scale)")
    _label_logs(axes, (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")


def _label_logs(axes: Axes, ticks: Sequence[float]) -> None:
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _plot_paths(
    axes: Axes,
    rows: Rows,
    name: str,
    methods: Mapping[str, str],
    colours: Mapping[str, str],
) -> None:
    traces = [row for row in rows_of(rows, "trace") if row["method"] in colours]
    for method, colour in colours.items():
        own = rows_of(traces, method=method)
        runs = dict.fromkeys((row["seed"], row["start"]) for row in own)
        for number, (seed, start) in enumerate(runs):
            trace = rows_of(own, seed=seed, start=start)
            axes.plot(
                column(trace, "step"), column(trace, name),
                color=colour, lw=1.5, alpha=0.75, ls=LINES[start],
                label=methods[method] if number == 0 else None,
            )  # fmt: skip
