"""The figure of the study `inputs`: paths of λ, inputs that are off, overfitting, truncation."""

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
TITLES = {"diabetes": "diabetes: ridge", "breast_cancer": "breast_cancer: logistic"}
UNITS = {"diabetes": "mean squared error", "breast_cancer": "cross-entropy, nats"}
REAL, ARTIFICIAL = "#0072b2", "#d55e00"
DRAWN = "λ per input, folds"
COLOURS = {"λ per input, folds": "#d55e00", "only raised, folds": "#009e73"}
NAMES = {"λ per input, folds": "any λ", "only raised, folds": "only raised"}
COLUMNS = {
    "λ per input, hold-out": "any λ, one split",
    "λ per input, folds": "any λ, folds",
    "only raised, folds": "only raised, folds",
    "lasso, folds": "lasso, folds",
    "ARD": "evidence (ARD)",
}
ENGINES = {"unrolled": ("#cc79a7", "unrolled"), "implicit": ("black", "implicit")}


def inputs_figure(rows: Rows, path: Path) -> None:
    """A row per table: paths of one split, inputs that are off, overfitting, truncation.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    figure, axes = plt.subplots(
        2, 4, figsize=(14, 9.4), layout="constrained", height_ratios=[1, 1.5],
        width_ratios=[1.15, 1, 1.1, 1],
    )  # fmt: skip
    for panels, name in zip(axes, TITLES, strict=True):
        own = rows_of(rows, table=name)
        _plot_paths(panels[0], own, name)
        _plot_off(panels[1], own)
        _plot_overfitting(panels[2], own, UNITS[name])
        _plot_truncated(panels[3], own)
    for panel in axes.flat:
        panel.title.set_fontsize(10.5)
    save_figure(figure, path)


def _plot_paths(axes: Axes, rows: Rows, name: str) -> None:
    first = rows[0]["seed"]
    inputs = rows_of(rows, "input", method=DRAWN, seed=first)
    decays = rows_of(rows, "decay", method=DRAWN, seed=first)
    for end in inputs:
        path = rows_of(decays, input=end["input"])
        axes.plot(
            column(path, "step"), column(path, "value"),
            color=ARTIFICIAL if end["artificial"] else REAL, ls="--" if end["artificial"] else "-",
            lw=1.4, zorder=1 + end["artificial"],
        )  # fmt: skip
        if end["off"]:
            axes.plot(path[-1]["step"], path[-1]["value"], "x", color="black", ms=7, zorder=4)
    axes.plot([], [], color=REAL, label="real input")
    axes.plot([], [], color=ARTIFICIAL, ls="--", label="artificial input")
    axes.plot([], [], "x", color="black", ls="none", label="off (γ < 0.1)")
    axes.set(yscale="log", xlabel="accepted step of λ", ylabel="λ of each input (alpha, 1 / C)")
    axes.set_title(f"{TITLES[name]}, one λ per input; split {first}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="best")


def _plot_off(axes: Axes, rows: Rows) -> None:
    columns = {m: label for m, label in COLUMNS.items() if rows_of(rows, "method", method=m)}
    inputs = rows_of(rows, "input", method=DRAWN, seed=rows[0]["seed"])
    shares = np.array(
        [
            [
                column(rows_of(rows, "input", method=m, input=i["input"]), "off").mean()
                for m in columns
            ]
            for i in inputs
        ]
    )
    mesh = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(columns)), columns.values(), rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(inputs)), [i["input"] for i in inputs], fontsize=7.5)
    for label, i in zip(axes.get_yticklabels(), inputs, strict=True):
        label.set_color(ARTIFICIAL if i["artificial"] else REAL)
    axes.set_title("Switched off, share of the splits")
    axes.figure.colorbar(mesh, ax=axes, shrink=0.5, pad=0.02)


def _plot_overfitting(axes: Axes, rows: Rows, unit: str) -> None:
    """E and the test loss along the paths, less where they began: means; ends of each split."""
    largest = 0.0
    for method, colour in COLOURS.items():
        path = rows_of(rows, "path", method=method)
        runs = [rows_of(path, seed=s) for s in dict.fromkeys(r["seed"] for r in path)]
        length = max(map(len, runs))
        for key, style, mark, label in (
            ("error", "-", "o", "E"),
            ("test_loss", "--", "D", "test"),
        ):
            held = [_held(column(run, key), length) for run in runs]
            changes = np.array([values - values[0] for values in held])
            axes.plot(
                changes.mean(0), color=colour, ls=style, lw=2.4, label=f"{label}; {NAMES[method]}"
            )
            ends = np.full(len(changes), 1.06 * (length - 1))
            axes.plot(ends, changes[:, -1], mark, color=colour, ms=5, mfc="none")
            largest = max(largest, float(np.abs(changes).max()))
    axes.axhline(0, color="0.4", lw=0.8)
    height = 0.47
    if largest > 0.1:
        axes.set_yscale("symlog", linthresh=0.01)
        height = 0.56
    axes.set(xlabel="accepted step of λ", ylabel=f"change since one λ for all ({unit})")
    axes.set_title("What E gains, what test rows get")
    axes.grid(alpha=0.3)
    title = "mean; marks: splits"
    axes.legend(
        fontsize="small",
        title=title,
        title_fontsize="small",
        loc="center",
        bbox_to_anchor=(0.5, height),
    )


def _held(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), values[-1])])


def _plot_truncated(axes: Axes, rows: Rows) -> None:
    for engine, (colour, label) in ENGINES.items():
        own = rows_of(rows, "truncated", engine=engine)
        steps = sorted({row["steps"] for row in own})
        errors = [column(rows_of(own, steps=k), "error") for k in steps]
        axes.plot(steps, [np.median(e) for e in errors], color=colour, lw=2, label=label)
        for k, values in zip(steps, errors, strict=True):
            axes.plot([k] * len(values), values, "o", color=colour, ms=4, mfc="none")
    axes.set(xscale="log", yscale="log", xlabel="steps K of gradient descent")
    axes.set_ylabel("relative error of dE/dρ (against w(λ), closed form)")
    axes.set_title("Before convergence")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="median; a point per split", title_fontsize="small")
