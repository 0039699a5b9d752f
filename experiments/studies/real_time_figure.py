"""The figure of the study `real_time`: E against cost, η and μ in one run, slopes, and ends."""

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

Rows = Sequence[dict[str, Any]]
DECAYS = ["#d55e00", "#e69f00", "#009e73", "#0072b2", "#cc79a7"]
RESTARTED, GRID, FIXED = "#000000", "0.45", "0.75"


def real_time_figure(rows: Rows, path: Path) -> None:
    """Four panels; curves are those of the first seed and the middle Δ.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    figure, axes = plt.subplots(2, 2, figsize=(14, 9.5), layout="constrained")
    everies = sorted({row["every"] for row in rows if "every" in row})
    middle = everies[len(everies) // 2 if len(everies) > 2 else 0]
    first = rows_of(rows, seed=rows[0]["seed"])
    traces = rows_of(first, "trace", every=middle)
    restarted = rows_of(first, "trace", method="restarted")
    _plot_progress(axes[0, 0], traces, restarted, first)
    _plot_values(axes[0, 1], traces)
    _plot_slopes(axes[1, 0], traces)
    _plot_ends(axes[1, 1], rows_of(rows, "end"), everies)
    save_figure(figure, path)


def _decays(rows: Rows) -> list[tuple[float, str]]:
    return list(zip(dict.fromkeys(r["decay"] for r in rows if "decay" in r), DECAYS, strict=False))


def _plot_progress(axes: Axes, traces: Rows, restarted: Rows, rows: Rows) -> None:
    for decay, colour in _decays(traces):
        own = rows_of(traces, decay=decay)
        axes.plot(
            column(own, "cost"), column(own, "validation_loss"), color=colour, lw=1.5,
            label=f"one run in real time, γ = {decay:g}",
        )  # fmt: skip
    axes.plot(
        column(restarted, "cost"), column(restarted, "validation_loss"), "o-", ms=4,
        color=RESTARTED, label="restarted: a point per whole training",
    )  # fmt: skip
    names = {"grid": (GRID, "--", "best of the grid"), "fixed": (FIXED, ":", "fixed at the start")}
    for method, (colour, style, label) in names.items():
        (end,) = rows_of(rows, "end", method=method)
        axes.axhline(end["validation_loss"], color=colour, ls=style, lw=2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="cost so far (plain training steps)")
    ticks = [0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("validation loss (nats, log scale)")
    axes.set_title(f"What one seed's validation loss has cost; Δ = {traces[0]['every']}")
    axes.grid(alpha=0.3)
    axes.set_ylim(top=3 * max(row["validation_loss"] for row in traces))
    axes.legend(fontsize="small", loc="upper right", ncols=2)


def _plot_values(axes: Axes, traces: Rows) -> None:
    for decay, colour in _decays(traces):
        own = rows_of(traces, decay=decay)
        axes.plot(column(own, "step"), column(own, "eta"), color=colour, label=f"γ = {decay:g}")
        axes.plot(column(own, "step"), 1 - column(own, "mu"), color=colour, ls="--")
    axes.plot([], [], color="black", label="η")
    axes.plot([], [], color="black", ls="--", label="1 − μ")
    axes.set(yscale="log", xlabel="training step", ylabel="η, 1 − μ (log scale)")
    axes.set_title("η and μ within one training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)


def _plot_slopes(axes: Axes, traces: Rows) -> None:
    for decay, colour in _decays(traces):
        own = rows_of(traces, decay=decay)
        slopes = np.abs(column(own, "d_lr") * column(own, "eta"))
        axes.plot(column(own, "step"), slopes, color=colour, label=f"γ = {decay:g}")
    axes.set(yscale="log", xlabel="training step", ylabel="|dE / d log η| (nats, log scale)")
    axes.set_title("The slope in real time: γ limits how far back it reaches")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_ends(axes: Axes, ends: Rows, everies: Sequence[int]) -> None:
    places = np.arange(len(everies), dtype=float)
    decays = _decays(ends)
    for number, (decay, colour) in enumerate(decays):
        shift = 0.12 * (number - (len(decays) - 1) / 2)
        values = [
            column(
                rows_of(ends, decay=decay, every=every),
                "validation_loss",
            )
            for every in everies
        ]
        axes.errorbar(
            places + shift, [v.mean() for v in values], [_deviation(v) for v in values], fmt="o",
            color=colour, capsize=3, label=f"real time, γ = {decay:g}",
        )  # fmt: skip
    for method, colour, style in (
        ("restarted", RESTARTED, "-"), ("grid", GRID, "--"), ("fixed", FIXED, ":"),
    ):  # fmt: skip
        mean = column(rows_of(ends, method=method), "validation_loss").mean()
        label = {"grid": "best of the grid", "fixed": "fixed at the start"}.get(method, method)
        axes.axhline(mean, color=colour, ls=style, label=label)
    axes.set_xticks(places, [str(every) for every in everies])
    axes.set_xlim(-0.5, len(everies) - 0.5)
    axes.set(xlabel="Δ: steps between updates", ylabel="validation loss at the end (nats)")
    axes.set_title("At the end of training; mean and deviation over seeds")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", ncols=2)


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
