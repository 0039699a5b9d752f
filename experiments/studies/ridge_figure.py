"""The figure of the study `ridge`: both curves with tangents and roots, and short windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.figures import column, save_figure
from experiments.studies.study import rows_of

COLOURS = {"ridge": "#0072b2", "lasso": "#d55e00"}
TITLES = {"ridge": "Ridge: λ/2 ‖w‖²", "lasso": "Lasso: λ ‖w‖₁"}
ROOT, CROSS_VALIDATION = "#009e73", "#cc79a7"
Rows = Sequence[dict[str, Any]]


def ridge_figure(rows: Rows, path: Path) -> None:
    """Three panels: ridge, lasso, and the root found with short windows.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for panel, penalty in zip(axes[:2], COLOURS, strict=True):
        _plot_curve(panel, rows_of(rows, penalty=penalty), penalty)
    _plot_windows(axes[2], [row for row in rows if "window" in row])
    save_figure(figure, path)


def _plot_curve(axes: Axes, rows: Rows, penalty: str) -> None:
    first = rows[0]["seed"]
    for seed in dict.fromkeys(row["seed"] for row in rows):
        curve = rows_of(rows, "curve", seed=seed)
        line = {"color": COLOURS[penalty], "lw": 2.2} if seed == first else {"color": "0.8"}
        label = {first: "E(λ), closed form" if penalty == "ridge" else "E(λ), scikit-learn's Lasso"}
        axes.plot(
            column(curve, "value"),
            column(curve, "error"),
            label=label.get(seed, "other splits" if len(axes.lines) == 1 else None),
            zorder=3 if seed == first else 1,
            **line,
        )
    own = rows_of(rows, seed=first)
    _plot_tangents(axes, rows_of(own, "tangent"))
    _plot_roots(axes, own)
    axes.set(xscale="log", xlabel="λ (log scale, no unit)", title=TITLES[penalty])
    axes.set_ylabel("validation error E (variance of the target = 1)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center")


def _plot_tangents(axes: Axes, rows: Rows) -> None:
    """Segments of slope dE/d log λ, at the λ that the two runs visited, once per neighbourhood."""
    drawn: list[float] = []
    for row in rows:
        log = np.log(row["value"])
        if all(abs(log - other) > 0.35 for other in drawn):
            reach = np.linspace(-0.35, 0.35, 2)
            heights = row["error"] + row["hypergradient"] * row["value"] * reach
            label = None if drawn else "tangents: the library's dE/dλ"
            axes.plot(np.exp(log + reach), heights, color="black", lw=1.5, zorder=4, label=label)
            axes.plot(row["value"], row["error"], "o", color="black", ms=4, zorder=5)
            drawn.append(log)


def _plot_roots(axes: Axes, rows: Rows) -> None:
    roots = rows_of(rows, "library")
    axes.plot(
        column(roots, "value"), column(roots, "error"), "*", color=ROOT, ms=17, zorder=6,
        mec="white", ls="none", label="dE/dλ = 0, from both ends",
    )  # fmt: skip
    (choice,) = rows_of(rows, "cross-validation")
    axes.axvline(
        choice["value"], color=CROSS_VALIDATION, ls="--", label="scikit-learn's cross-validation"
    )


def _plot_windows(axes: Axes, rows: Rows) -> None:
    for penalty, colour in COLOURS.items():
        own = rows_of(rows, penalty=penalty)
        windows = sorted({row["window"] for row in own})
        ratios = [[row["ratio"] for row in rows_of(own, window=window)] for window in windows]
        axes.plot(windows, [np.median(r) for r in ratios], color=colour, lw=2, label=penalty)
        for window, values in zip(windows, ratios, strict=True):
            axes.plot([window] * len(values), values, "o", color=colour, alpha=0.5, ms=5)
    axes.axhline(1, color=CROSS_VALIDATION, ls="--", label="scikit-learn's cross-validation")
    axes.set(xscale="log", yscale="log", xlabel="window K (training steps differentiated together)")
    for axis, ticks in ((axes.xaxis, windows), (axes.yaxis, (0.1, 0.2, 0.5, 1, 2))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_ylabel("λ where the K-step hypergradient is 0,\nas a multiple of cross-validation's λ")
    axes.set_title("Short windows put the root elsewhere")
    axes.set_ylim(bottom=min(0.18, 0.9 * min(row["ratio"] for row in rows)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="median; a point per split", title_fontsize="small")
