"""The figure of the study `nielsen`: λ on the training cost, both surfaces, and the η slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.evaluation import or_infinite
from experiments.figures import column, edges, save_figure
from experiments.studies.study import rows_of

Rows = Sequence[dict[str, Any]]
PATHS = ["#d62728", "#ff00c8", "#ffffff", "#000000"]
UNITS = {"cross-entropy": "nats", "quadratic": "half the squared error"}


def nielsen_figure(rows: Rows, path: Path) -> None:
    """Above: λ on the training cost, λ and η on the validation cost, the slice. Below: surfaces.

    Args:
        rows: of `numbers.csv`; the first seed is drawn.
        path: of the PNG.
    """
    rows = rows_of(rows, seed=rows[0]["seed"])
    figure = plt.figure(figsize=(15, 9.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    above, below = parts
    joint, settling, slices = above.subplots(1, 3)
    _plot_joint(joint, rows_of(rows, "joint"))
    _plot_settling(settling, rows_of(rows, "path"))
    _plot_slice(slices, rows_of(rows, "slice"))
    surfaces = below.subplots(1, 2)
    for surface, kind in zip(surfaces, UNITS, strict=True):
        _plot_surface(surface, rows_of(rows, cost_function=kind), kind)
    below.legend(*surfaces[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _groups(rows: Rows, name: str) -> dict[Any, Rows]:
    return {key: rows_of(rows, **{name: key}) for key in dict.fromkeys(r[name] for r in rows)}


def _plot_joint(axes: Axes, rows: Rows) -> None:
    styles = {"real": ("#0072b2", "λ any real number"), "positive": ("#d55e00", "λ = exp ρ > 0")}
    for name, own in _groups(rows, "name").items():
        colour, label = styles[name]
        axes.plot(column(own, "step"), column(own, "lambda"), color=colour, lw=2, label=label)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set(xlabel="training step", ylabel="λ (symmetric log scale)")
    axes.set_title("On the training cost λ falls without end")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_settling(axes: Axes, rows: Rows) -> None:
    own = rows_of(rows, cost_function="cross-entropy")
    for colour, path in zip(_dark(PATHS), _groups(own, "start").values(), strict=False):
        axes.plot(column(path, "step"), column(path, "lambda"), color=colour, lw=2)
        axes.plot(column(path, "step"), column(path, "eta"), color=colour, lw=2, ls="--")
    axes.plot([], [], color="black", label="λ")
    axes.plot([], [], color="black", ls="--", label="η")
    axes.set(
        yscale="log", xlabel="outer update (one whole training each)", ylabel="λ, η (log scale)"
    )
    axes.set_title("On the validation cost both settle")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="a colour per start", title_fontsize="small")


def _dark(colours: Sequence[str]) -> list[str]:
    return ["0.6" if colour == "#ffffff" else colour for colour in colours]


def _plot_slice(axes: Axes, rows: Rows) -> None:
    by_length = _groups(rows, "step")
    shades = plt.get_cmap("viridis")(np.linspace(0.85, 0, len(by_length)))
    for shade, (steps, own) in zip(shades, by_length.items(), strict=True):
        axes.plot(
            column(own, "eta"), column(own, "cost"), color=shade, lw=2, marker="o", ms=4,
            label=f"{steps} steps: {100 * max(row['distance'] for row in own):.0f} %",
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="η (log scale)", ylabel=f"validation cost ({UNITS['cross-entropy']})"
    )
    axes.set_title(f"η matters only because training stops; λ = {rows[0]['lambda']:g}")
    axes.grid(alpha=0.3)
    title = "training, and how far the\nfinal weights are apart"
    axes.legend(fontsize="small", title=title, title_fontsize="small")


def _plot_surface(axes: Axes, rows: Rows, kind: str) -> None:
    cells = rows_of(rows, "surface")
    decays, rates = (sorted({row[name] for row in cells}) for name in ("lambda", "eta"))
    costs = column(cells, "cost").reshape(len(decays), len(rates))
    low = np.nanmin(costs)
    mesh = axes.pcolormesh(
        edges(rates), edges(decays), np.ma.masked_invalid(costs), cmap="viridis_r",
        norm=LogNorm(low, 8 * low),
    )  # fmt: skip
    axes.set_facecolor("0.6")
    _plot_minima(axes, cells)
    for colour, path in zip(PATHS, _groups(rows_of(rows, "path"), "start").values(), strict=False):
        rate, decay = column(path, "eta"), column(path, "lambda")
        axes.plot(rate, decay, color="white" if colour == "#000000" else "black", lw=4)
        axes.plot(rate, decay, color=colour, lw=2)
        axes.plot(rate[0], decay[0], "o", color=colour, mec="black", ms=9)
        axes.plot(rate[-1], decay[-1], "*", color=colour, mec="black", ms=18, zorder=5)
    axes.plot([], [], "o", color="white", mec="black", ms=9, ls="none", label="start")
    axes.plot(
        [],
        [],
        "*",
        color="white",
        mec="black",
        ms=16,
        ls="none",
        label="end of a learned path (a colour per start)",
    )
    axes.set(xscale="log", yscale="log", xlabel="learning rate η", ylabel="regularisation λ")
    axes.set_title(f"C(λ, η) by brute force, {len(cells)} trainings: {kind} cost")
    ticks = FixedLocator([low * factor for factor in (1, 2, 4, 8)])
    label = f"validation cost ({UNITS[kind]})"
    bar = axes.figure.colorbar(mesh, ax=axes, label=label, extend="max", ticks=ticks)
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _plot_minima(axes: Axes, cells: Rows) -> None:
    lowest = minima(cells)
    axes.plot(
        column(lowest, "eta"), column(lowest, "lambda"), "x", color="black", ms=7, mew=2,
        ls="none", label="minimum among its neighbours", zorder=6,
    )  # fmt: skip
    best = min(cells, key=cost_of)
    axes.plot(
        best["eta"], best["lambda"], "D", color="#39ff14", mec="black", ms=11, ls="none",
        label="best cell",
    )  # fmt: skip


def cost_of(row: Mapping[str, Any]) -> float:
    """The cost of a training, infinite where it diverged."""
    return or_infinite(row["cost"])


def minima(surface: Rows) -> list[dict[str, Any]]:
    """The cells of a grid that lie below all eight neighbours; the border does not count."""
    decays, rates = (sorted({row[axis] for row in surface}) for axis in ("lambda", "eta"))
    at = {(decays.index(row["lambda"]), rates.index(row["eta"])): row for row in surface}
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return [
        row
        for (a, b), row in at.items()
        if all((a + i, b + j) in at for i, j in around)
        and all(cost_of(row) < cost_of(at[a + i, b + j]) for i, j in around)
    ]
