"""The figures: one run over its steps, and the demo's grid with the learned path on it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiments.run_folder import Row

TRAIN, VALIDATION = "#0072b2", "#d55e00"  # colours that the colour-blind tell apart
LR, WEIGHT_DECAY = "#009e73", "#cc79a7"
OTHERS = ["#56b4e9", "#e69f00", "#000000"]
DPI = 130
NOT_LEARNED = {
    "step", "epoch", "train_loss", "validation_loss", "validation_accuracy", "lr", "weight_decay",
    "cost_steps", "rollbacks", "seconds",
}  # fmt: skip


def run_figure(history: Sequence[Row], summary: Mapping[str, Any], path: Path) -> None:
    """Losses above, λ and η below, against training steps.

    Args:
        history: the rows of `metrics.csv`.
        summary: of the same run.
        path: of the PNG.
    """
    figure, (losses, values) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, layout="constrained"
    )
    figure.suptitle(
        f"{summary['experiment']} / {summary['name']}: "
        f"test accuracy {100 * summary['test_accuracy']:.1f} %, "
        f"cost {summary['cost_steps']:.0f} plain training steps"
    )
    plot_losses(losses, history, summary["best_step"])
    plot_hyperparameters(values, history)
    values.set_xlabel("training step")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def plot_losses(axes: Axes, history: Sequence[Row], best_step: int) -> None:
    """Training and validation loss, and the step whose weights are kept.

    Args:
        axes: where to draw.
        history: the rows of `metrics.csv`.
        best_step: the step with the best validation accuracy.
    """
    steps = column(history, "step")
    validation = column(history, "validation_loss")
    _plot(axes, steps, column(history, "train_loss"), TRAIN, "training (inner) loss")
    _plot(axes, steps, validation, VALIDATION, "validation (outer) loss")
    axes.axvline(best_step, color="0.5", linestyle=":", label="best validation accuracy")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def plot_hyperparameters(axes: Axes, history: Sequence[Row]) -> None:
    """λ, η and whatever else was learned, on a logarithmic axis.

    Args:
        axes: where to draw.
        history: the rows of `metrics.csv`.
    """
    steps = column(history, "step")
    lines = [("lr", LR, "learning rate η"), ("weight_decay", WEIGHT_DECAY, "weight decay λ")]
    others = [name for name in history[0] if name not in NOT_LEARNED]
    lines += [(name, colour, name) for name, colour in zip(others, OTHERS, strict=False)]
    for name, colour, label in lines:
        values = column(history, name)
        _plot(axes, steps, np.where(values > 0, values, np.nan), colour, label)
    axes.set_yscale("log")
    axes.set_ylabel("value (log scale, no unit)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """A line; a lone value, of which a line shows nothing, as a dot."""
    marker = "o" if np.isfinite(values).sum() == 1 else None
    axes.plot(steps, values, color=colour, label=label, marker=marker)


def demo_figure(
    grid: Mapping[tuple[float, float], float],
    learned: Sequence[tuple[float, float]],
    history: Sequence[Row],
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """Left the grid's test accuracy with the learned path, right the learned run's curves.

    Args:
        grid: test accuracy in [0, 1] of each (η, λ) with fixed hyperparameters.
        learned: (η, λ) of the learned run before any schedule: where it was told to start, where
            trials let it start, and so on to the end.
        history: of the learned run.
        summary: of the learned run.
        path: of the PNG.
    """
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    spaces = figure.add_gridspec(2, 2, width_ratios=[1.15, 1])
    heat = figure.add_subplot(spaces[:, 0])
    losses = figure.add_subplot(spaces[0, 1])
    values = figure.add_subplot(spaces[1, 1], sharex=losses)
    plot_grid(heat, grid)
    plot_path(heat, learned)
    plot_losses(losses, history, summary["best_step"])
    plot_hyperparameters(values, history)
    losses.set_title(f"The learned run: test accuracy {100 * summary['test_accuracy']:.1f} %")
    values.set_xlabel("training step")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def plot_grid(axes: Axes, grid: Mapping[tuple[float, float], float]) -> None:
    """A heat map over the logarithms of η and λ, each cell with its test accuracy.

    Args:
        axes: where to draw.
        grid: test accuracy in [0, 1] of each (η, λ).
    """
    lrs, decays = (sorted({point[i] for point in grid}) for i in (0, 1))
    percent = np.array([[100 * grid[lr, decay] for lr in lrs] for decay in decays])
    mesh = axes.pcolormesh(edges(lrs), edges(decays), percent, cmap="viridis", vmin=percent.min())
    for (lr, decay), accuracy in grid.items():
        dark = 100 * accuracy < (percent.min() + percent.max()) / 2
        axes.annotate(
            f"{100 * accuracy:.1f}", (lr, decay), xytext=(0, -26), textcoords="offset points",
            ha="center", color="white" if dark else "black", fontsize="small",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="learning rate η", ylabel="weight decay λ")
    axes.set_title(f"Grid of {len(grid)} runs with fixed η and λ, and the path of one learned run")
    axes.figure.colorbar(mesh, ax=axes, label="test accuracy (%)")


def plot_path(axes: Axes, learned: Sequence[tuple[float, float]]) -> None:
    """(η, λ) from where the run was told to start to the end.

    Args:
        axes: where to draw; its limits grow to hold the path.
        learned: the points; from the first to the second trials led.
    """
    lr, decay = np.array(learned).T
    colour = "#d62728"
    axes.plot(lr, decay, color="white", linewidth=4)
    axes.plot(lr[:2], decay[:2], color=colour, linewidth=2, linestyle=":", label="trials")
    axes.plot(lr[1:], decay[1:], color=colour, linewidth=2, label="learned path")
    marker: dict[str, Any] = {"color": colour, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot(lr[0], decay[0], marker="o", markersize=11, label="start", **marker)
    axes.plot(lr[-1], decay[-1], marker="*", markersize=20, label="end", **marker)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a small PNG, of 256 colours, and close the figure.

    Args:
        figure: of matplotlib.
        path: of the PNG.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One number of each row, `(n,)`."""
    return np.array([row[name] for row in rows], dtype=float)


def edges(values: Sequence[float]) -> np.ndarray:
    """Borders half-way, in the logarithm, between equally spaced values."""
    logs = np.log(values)
    half = (logs[1] - logs[0]) / 2
    return np.exp(np.append(logs - half, logs[-1] + half))
