"""The figure of the study `mixing`: α while it is learned, both accuracies, one α or many."""

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
COLOURS = {"training": "#d55e00", "validation": "#0072b2"}
LABELS = {"training": "the training loss J″ itself", "validation": "validation: (J + J′) / 2"}
USED, TEST = "#56b4e9", "#e69f00"


def mixing_figure(rows: Rows, path: Path) -> None:
    """Three panels: α over training, clean against robust accuracy, and the price of many α.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    _plot_traces(axes[0], rows_of(rows, "trace"))
    _plot_accuracies(axes[1], rows)
    _plot_gaps(axes[2], rows_of(rows, "many"))
    save_figure(figure, path)


def _plot_traces(axes: Axes, rows: Rows) -> None:
    for learn_on, colour in COLOURS.items():
        own = rows_of(rows, learn_on=learn_on)
        runs = dict.fromkeys((row["seed"], row["start"]) for row in own)
        for number, (seed, start) in enumerate(runs):
            trace = rows_of(own, "trace", seed=seed, start=start)
            axes.plot(
                column(trace, "step"), column(trace, "alpha"), color=colour, lw=1.6, alpha=0.8,
                label=f"learned on {LABELS[learn_on]}" if number == 0 else None,
            )  # fmt: skip
    axes.set(
        xlabel="training step", ylabel="mixing weight α (1: clean images only)", ylim=(0, 1.02)
    )
    axes.set_title("α while it is learned, from 0.2 and 0.8")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper right", bbox_to_anchor=(1, 0.74))


def _plot_accuracies(axes: Axes, rows: Rows) -> None:
    alphas = sorted({row["alpha"] for row in rows_of(rows, "grid")})
    means = {
        name: np.array([column(rows_of(rows, "grid", alpha=a), name).mean() for a in alphas])
        for name in ("clean_accuracy", "robust_accuracy")
    }
    clean, robust = (100 * means[name] for name in ("clean_accuracy", "robust_accuracy"))
    axes.plot(clean, robust, "-o", color="0.5", label="fixed α: mean over seeds")
    for alpha, x, y in zip(alphas, clean, robust, strict=True):
        axes.annotate(
            f"α = {alpha:g}", (x, y), xytext=(-8, -11), textcoords="offset points", ha="right",
            fontsize="small", weight="bold" if alpha == 0.5 else "normal",
        )  # fmt: skip
    for learn_on, colour in COLOURS.items():
        own = rows_of(rows, "learned", learn_on=learn_on)
        axes.plot(
            100 * column(own, "clean_accuracy"), 100 * column(own, "robust_accuracy"), "*",
            color=colour, mec="white", ms=14, ls="none", label=f"learned on {LABELS[learn_on]}",
        )  # fmt: skip
    axes.set_xlim(clean.min() - 2.2, None)
    axes.set(xlabel="test accuracy, clean images (%)", ylabel="test accuracy, attacked images (%)")
    axes.set_title("What each α is worth on test data")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")


def _plot_gaps(axes: Axes, rows: Rows) -> None:
    few = {"validation": "few validation\nimages", "same": "the training\nimages again"}
    cases = [(learn_on, many) for learn_on in few for many in (False, True)]
    for place, (learn_on, many) in enumerate(cases):
        own = [r for r in rows_of(rows, "many", learn_on=learn_on) if (r["count"] > 1) == many]
        bars = (("used_objective", USED, -0.2), ("test_objective", TEST, 0.2))
        for name, colour, shift in bars:
            values = column(own, name)
            label = "where α was learned" if name == "used_objective" else "on test images"
            axes.bar(
                place + shift, values.mean(), 0.38, color=colour,
                label=label if place == 0 else None,
            )  # fmt: skip
            axes.plot([place + shift] * len(values), values, "o", color="black", ms=4)
    names = [f"{'one α per example' if many else 'one α'},\n{few[where]}" for where, many in cases]
    axes.set_xticks(range(len(cases)), names, fontsize="small")
    axes.set_ylabel("objective (J + J′) / 2 at the end (nats)")
    axes.set_title("Many α overfit the images they are learned on")
    axes.grid(alpha=0.3, axis="y")
    axes.set_ylim(top=1.25 * max(row["test_objective"] for row in rows))
    axes.legend(fontsize="small", title="a point per seed", title_fontsize="small")
