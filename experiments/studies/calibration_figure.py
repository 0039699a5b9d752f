"""The figure of the study `calibration`: both losses, test accuracy, and which way windows push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.figures import save_figure
from experiments.studies.study import rows_of

Rows = Sequence[dict[str, Any]]
COLOURS = {"cross_entropy": "#d55e00", "calibrated": "#0072b2"}
LABELS = {"cross_entropy": "cross-entropy", "calibrated": "calibrated cross-entropy"}
TITLES = {
    "digits_noisy": "Digits, 40 % wrong labels",
    "breast_cancer": "Breast cancer, 20 % wrong labels",
}
STYLES = (":", "--", "-", "-.")


def calibration_figure(rows: Rows, rates: Mapping[str, float], path: Path) -> None:
    """A row of three panels for each task.

    Args:
        rows: of `numbers.csv`.
        rates: for each task the η whose curves are drawn.
        path: of the PNG.
    """
    figure, axes = plt.subplots(
        len(rates), 3, figsize=(17.5, 4.7 * len(rates)), layout="constrained", squeeze=False
    )
    for panels, (task, lr) in zip(axes, rates.items(), strict=True):
        own = rows_of(rows, task=task)
        _plot_losses(panels[0], rows_of(own, "fixed", lr=lr))
        panels[0].set_title(f"{TITLES[task]}: validation, η = {lr:g}")
        _plot_accuracy(panels[1], own, lr)
        _plot_windows(panels[2], rows_of(own, "window"))
    save_figure(figure, path)


def _plot_losses(axes: Axes, rows: Rows) -> None:
    """A line per seed; the least of each is marked."""
    for name, colour in COLOURS.items():
        for number, (decays, values) in enumerate(_curves(rows, name)):
            lowest = int(np.argmin(values))
            label = LABELS[name] if number == 0 else None
            axes.plot(decays, values, color=colour, lw=1.6, alpha=0.8, label=label)
            axes.plot(decays[lowest], values[lowest], "o", color=colour, mec="black", ms=8)
    axes.plot([], [], "o", color="white", mec="black", ms=8, label="its least value, per seed")
    axes.set_ylabel("validation loss of the last weights (nats)")
    _finish(axes)


def _plot_accuracy(axes: Axes, rows: Rows, lr: float) -> None:
    grid = rows_of(rows, "fixed", lr=lr)
    losses = {name: list(_curves(grid, name)) for name in COLOURS}
    for seed, (decays, accuracies) in enumerate(_curves(grid, "test_accuracy")):
        label = f"fixed λ, η = {lr:g}; a line per seed" if seed == 0 else None
        axes.plot(decays, 100 * accuracies, color="0.55", lw=1.4, label=label)
        for name, colour in COLOURS.items():
            lowest = int(np.argmin(losses[name][seed][1]))
            axes.plot(
                decays[lowest], 100 * accuracies[lowest], "o", color=colour, mec="black", ms=8,
                ls="none", zorder=4,
            )  # fmt: skip
    for name, colour in COLOURS.items():
        own = rows_of(rows, "learned", criterion=name)
        axes.plot(
            [row["weight_decay"] for row in own], [100 * row["test_accuracy"] for row in own], "*",
            color=colour, mec="black", ms=12, ls="none", zorder=5,
        )  # fmt: skip
    marks = [np.asarray(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "None"]
    marked = np.concatenate(marks)
    for marker, size, label in (("o", 8, "λ of the least loss"), ("*", 12, "λ of from_any_start")):
        axes.plot([], [], marker, color="white", mec="black", ms=size, label=label)
    low, high = marked.min(), max(marked.max(), *(100 * row["test_accuracy"] for row in grid))
    axes.set_ylim(low - 0.6 * (high - low) - 1, high + 1)
    axes.set(ylabel="test accuracy of the last weights (%)", title="What each λ is worth")
    _finish(axes)


def _plot_windows(axes: Axes, rows: Rows) -> None:
    """How often a window drives λ down, against λ: a line for each K and loss."""
    factors = sorted({row["factor"] for row in rows})
    lengths = sorted({row["window"] for row in rows})
    for name, colour in COLOURS.items():
        for number, length in enumerate(lengths):
            shares = [
                100 * np.mean([row["slope"] > 0 for row in own])
                for factor in factors
                for own in [rows_of(rows, criterion=name, window=length, factor=factor)]
            ]
            style = STYLES[number % len(STYLES)]
            label = f"{LABELS[name]}, K = {length}"
            axes.plot(factors, shares, style, color=colour, lw=1.8, label=label)
            axes.plot(factors, shares, "o", color=colour, ms=5)
    for low, high, share in ((factors[0], 1, 0), (1, factors[-1], 100)):
        right = "right" if share == 0 else ""
        axes.plot([low, high], [share] * 2, color="#009e73", lw=7, alpha=0.35, label=right)
    axes.set(xscale="log", ylim=(-4, 104), xlabel="λ, as a multiple of the best one on the grid")
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.minorticks_off()
    axes.set_ylabel("states in which dE/d log λ > 0:\nλ is driven down (%)")
    axes.set_title("Which way a window of K steps pushes λ")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", handlelength=3, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _curves(rows: Rows, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """λ and a column, for each seed; what is not finite counts as infinite."""
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = sorted(rows_of(rows, seed=seed), key=lambda row: row["weight_decay"])
        decays, values = (np.array([r[c] for r in own], float) for c in ("weight_decay", name))
        found.append((decays, np.where(np.isfinite(values), values, np.inf)))
    return found


def _finish(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="weight decay λ (log scale, no unit)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
