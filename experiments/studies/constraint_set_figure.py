"""The figure of the study `constraint_set`: a row per box, its surface with paths, and the gaps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm

from experiments.figures import column, save_figure
from experiments.studies.study import rows_of

Rows = Sequence[dict[str, Any]]
COLOURS = {
    "projection": "#e69f00",
    "projection in units of the box": "#d62728",
    "transform": "#0072b2",
}
STYLES = {"inside": "-", "on the boundary": "--"}
FLOOR = 1e-9  # nats; a smaller excess is drawn here


def constraint_set_figure(rows: Rows, path: Path) -> None:
    """Surfaces on the left are the first seed's; gaps on the right are all seeds'.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    boxes = list(dict.fromkeys(row["box"] for row in rows))
    figure, axes = plt.subplots(len(boxes), 2, figsize=(14, 9), layout="constrained")
    for box, (surface, gaps) in zip(boxes, axes, strict=True):
        own = rows_of(rows, box=box)
        _plot_surface(surface, rows_of(own, seed=own[0]["seed"]))
        surface.set_title(f"Box whose best point lies {box}")
        _plot_gaps(gaps, rows_of(own, "visit"))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _plot_surface(axes: Axes, rows: Rows) -> None:
    cells = rows_of(rows, "surface")
    etas, mus = (sorted({row[name] for row in cells}) for name in ("eta", "mu"))
    height = np.maximum(column(cells, "excess").reshape(len(etas), len(mus)).T, 1e-3)
    finite = height[np.isfinite(height)]
    greys = ListedColormap(plt.get_cmap("Greys")(np.linspace(0, 0.6, 256)))
    mesh = axes.pcolormesh(
        etas, mus, np.ma.masked_invalid(height), cmap=greys, shading="gouraud",
        norm=LogNorm(np.percentile(finite, 5), min(finite.max(), 1.5)),
    )  # fmt: skip
    label = "validation loss E above the least (nats)"
    axes.figure.colorbar(mesh, ax=axes, label=label, extend="both")
    for how, colour in COLOURS.items():
        for start, style in STYLES.items():
            path = rows_of(rows, how=how, start=start)
            best = np.minimum.accumulate(column(path, "E")) == column(path, "E")
            kept = [row for row, is_best in zip(path, best, strict=True) if is_best]
            axes.plot(
                column(kept, "eta"), column(kept, "mu"), style, marker="o", ms=4, color=colour,
                mec="black", mew=0.5, label=f"{how}, start {start}",
            )  # fmt: skip
    (least,) = rows_of(rows, "least")
    axes.plot(
        least["eta"], least["mu"], "*", ms=18, color="#39ff14", mec="black", ls="none",
        label="least E (scipy's search)", clip_on=False, zorder=5,
    )  # fmt: skip
    axes.set(xlabel="learning rate η", ylabel="momentum μ")


def _plot_gaps(axes: Axes, rows: Rows) -> None:
    for how, colour in COLOURS.items():
        for start, style in STYLES.items():
            own = rows_of(rows, how=how, start=start)
            for seed in dict.fromkeys(row["seed"] for row in own):
                run = rows_of(own, seed=seed)
                best = np.minimum.accumulate(np.nan_to_num(column(run, "excess"), nan=np.inf))
                axes.plot(column(run, "training"), np.maximum(best, FLOOR), style, color=colour)
    axes.set(yscale="log", xlabel="trainings, each differentiated as a whole")
    axes.set_ylabel("E of the best so far, above the least E\n(nats, log scale)")
    axes.set_title("How far from the best; a line per seed")
    axes.grid(alpha=0.3)
