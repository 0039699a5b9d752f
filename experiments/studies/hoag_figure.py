"""The figure of the study `hoag`: sub-optimality against seconds and against gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.figures import save_figure
from experiments.studies.study import rows_of

STYLES: dict[str, dict[str, Any]] = {
    "HOAG, exact": {"color": "#56b4e9", "lw": 1.8, "ls": ":"},
    "HOAG, exponential": {"color": "#0072b2", "lw": 2.6},
    "HOAG, quadratic": {"color": "#009e73", "lw": 2.6},
    "HOAG, cubic": {"color": "#009e73", "lw": 1.8, "ls": "--"},
    "grid": {"color": "0.6", "lw": 1.8},
    "random": {"color": "#e69f00", "lw": 1.8},
    "TPE": {"color": "#d55e00", "lw": 1.8},
    "unrolled": {"color": "black", "lw": 1.8, "ls": "-."},
}
TITLES = {
    "breast_cancer": "breast_cancer: logistic, λ",
    "digits": "digits: multinomial, λ",
    "diabetes": "diabetes: kernel ridge, λ and width",
    "fashion_mnist": "Fashion-MNIST: multinomial, λ",
}
FLOOR = 1e-5  # of the sub-optimality, about what f itself is known to


def hoag_figure(rows: Sequence[dict[str, Any]], path: Path, target: float) -> None:
    """Above against seconds, below against gradients; a column per problem.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
        target: a line to draw.
    """
    problems = [name for name in TITLES if any(row["problem"] == name for row in rows)]
    figure, axes = plt.subplots(
        2, len(problems), figsize=(3.75 * len(problems), 7.4), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column, problem in enumerate(problems):
        mine = rows_of(rows, problem=problem)
        for panel, unit in zip(axes[:, column], ("seconds", "gradients"), strict=True):
            _plot(panel, mine, unit)
            panel.axhline(target, color="0.3", lw=0.8, label=f"target {target:g}")
        axes[0, column].set_title(TITLES[problem], fontsize=11)
        axes[0, column].set_xlabel("processor seconds")
        axes[1, column].set_xlabel("gradients (a Hessian product counts 2)")
    for panel in axes[:, 0]:
        panel.set_ylabel("sub-optimality f(λ) / least f − 1")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    seeds = len({row["seed"] for row in rows})
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=10,
        title=f"median of {seeds} seeds" if seeds > 1 else "one seed",
    )  # fmt: skip
    save_figure(figure, path)


def _plot(axes: Axes, rows: Sequence[dict[str, Any]], unit: str) -> None:
    for method, style in STYLES.items():
        runs = [
            rows_of(rows, method=method, seed=seed)
            for seed in dict.fromkeys(row["seed"] for row in rows)
        ]
        at = np.unique([row[unit] for run in runs for row in run])
        at = at[at >= max(run[0][unit] for run in runs)]
        heights = np.median([_held(run, unit, at) for run in runs], axis=0)
        axes.step(at, np.maximum(heights, FLOOR), where="post", label=method, **style)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)


def _held(run: Sequence[dict[str, Any]], unit: str, at: np.ndarray) -> np.ndarray:
    """The sub-optimality of one run, held until its next visit."""
    places = np.searchsorted([row[unit] for row in run], at, side="right") - 1
    return np.array([run[k]["suboptimality"] for k in places])
