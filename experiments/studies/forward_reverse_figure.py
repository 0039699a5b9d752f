"""The figure of the study `forward_reverse`: agreement, time and memory against T and against m."""

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
STYLES: dict[str, dict[str, Any]] = {
    "Unroll": {"color": "#0072b2", "marker": "o"},
    "Replay": {"color": "#56b4e9", "marker": "s"},
    "Replay √T": {"color": "#009e73", "marker": "^"},
    "Forward": {"color": "#d55e00", "marker": "D"},
    "central differences": {"color": "0.5", "marker": "x"},
}
LABELS = {
    "Unroll": "reverse, graph stored (Unroll)",
    "Replay": "reverse, states stored (Replay)",
    "Replay √T": "reverse, √T states stored (Replay(spacing=None))",
    "Forward": "forward (Forward)",
    "central differences": "central differences",
}
TITLES = {
    "tanh": "They agree to rounding",
    "ReLU": "With ReLU as well, but E(η, μ) jumps, and\ncentral differences may meet a jump",
}


def forward_reverse_figure(rows: Rows, path: Path) -> None:
    """Left the agreement; above time, below memory, against T and against m.

    Args:
        rows: of `numbers.csv`.
        path: of the PNG.
    """
    figure = plt.figure(figsize=(15, 8), layout="constrained")
    places = figure.add_gridspec(2, 3)
    compared = rows_of(rows, "agreement")
    for number, (units, title) in enumerate(TITLES.items()):
        axes = figure.add_subplot(places[number, 0])
        _plot_agreement(axes, rows_of(compared, units=units))
        axes.set_title(title)
    for place, (what, axis) in enumerate((("horizon", "steps"), ("count", "count")), start=1):
        own = rows_of(rows, what)
        for line, price in enumerate(("ratio", "states")):
            _plot_costs(figure.add_subplot(places[line, place]), own, axis, price)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    more, names = figure.axes[2].get_legend_handles_labels()
    known = dict(zip([*names, *labels], [*more, *handles], strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _plot_agreement(axes: Axes, rows: Rows) -> None:
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = rows_of(rows, engine=engine)
        steps = sorted({row["steps"] for row in own})
        worst = [max(column(rows_of(own, steps=t), "error")) for t in steps]
        axes.plot(steps, np.maximum(worst, 1e-17), **STYLES[engine], label=LABELS[engine])
    axes.axhline(np.finfo(float).eps, color="black", ls=":", lw=1)
    axes.text(steps[-1], 1e-17, "dotted: one rounding", ha="right", fontsize="small")
    axes.set(xscale="log", yscale="log", ylim=(5e-18, 10))
    axes.set_xlabel("T: steps of training that are differentiated")
    axes.set_ylabel("relative difference to Unroll's dE/dλ\n(‖·‖₂; largest over seeds)")
    axes.grid(alpha=0.3)


def _plot_costs(axes: Axes, rows: Rows, axis: str, price: str) -> None:
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = rows_of(rows, engine=engine)
        axes.plot(column(own, axis), column(own, price), **STYLES[engine], label=LABELS[engine])
    units = {"ratio": "time (plain trainings of T steps)", "states": "peak memory (states)"}
    names = {"steps": "T: steps of training", "count": "m: numbers that are learned"}
    fixed = {
        "steps": f"m = {rows[0]['count']}: η and μ",
        "count": f"T = {rows[0]['steps']}, m weights in the loss",
    }
    axes.set(xscale="log", yscale="log", xlabel=names[axis], ylabel=units[price])
    if (axis, price) == ("steps", "ratio"):
        axes.set(yscale="linear", ylim=(0, None))
    axes.set_title(f"{'Time' if price == 'ratio' else 'Memory'}; {fixed[axis]}")
    axes.grid(alpha=0.3, which="both")
