"""The figures: a heat map per method, accuracy against cost, and differences over seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from experiments.band.methods import METHODS
from experiments.band.summary import Comparison, Group, Start

DPI = 120
BELOW, ABOVE = 10.0, 1.0  # points around the grid's best that the colours of a heat map span
OWN = ["#d55e00", "#b2182b", "#f4a582", "#e7298a"]
OTHERS = ["#0072b2", "#56b4e9", "#332288", "#117733", "#999933", "#44aa99", "#6a3d9a", "#a6761d"]
MARKERS = "osD^v<>Pp*XhdH8123"


def heat_maps(comparison: Comparison, path: Path) -> None:
    """Test accuracy over η₀ × λ₀: one panel per method, or one row if there is a single λ₀.

    Args:
        comparison: of one task and base.
        path: of the PNG.
    """
    groups = comparison.groups()
    goal = statistics.fmean(comparison.grid().values())
    size = comparison.plan.sizes[comparison.task]
    lrs, decays = list(size.start_lr), list(size.start_weight_decay)
    if len(decays) == 1:
        figure, axes = plt.subplots(figsize=(9, 1.4 + 0.3 * len(groups)), layout="constrained")
        values = [[_cell(group.cells(), lr, decays[0]) for lr in lrs] for group in groups]
        mesh = _heat(axes, values, lrs, [group.label for group in groups], goal)
        axes.set_xlabel(f"initial η (initial λ: {decays[0]:g})")
        panels = np.array([axes])
    else:
        figure, panels, mesh = _heat_panels(groups, lrs, decays, goal)
    figure.suptitle(
        f"{comparison.task}, {comparison.base}: test accuracy in % by start; "
        f"the grid's best is {goal:.1f} ({_seeds(comparison)})"
    )
    figure.colorbar(mesh, ax=panels, label="%", shrink=0.6)
    _save(figure, path)


def _heat_panels(
    groups: Sequence[Group], lrs: Sequence[float], decays: Sequence[float], goal: float
) -> tuple[Figure, np.ndarray, ScalarMappable]:
    rows = math.ceil(len(groups) / 2)
    figure, panels = plt.subplots(
        rows, 2, figsize=(13, (0.95 + 0.34 * len(decays)) * rows + 0.6),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, group in zip(panels.flat, groups, strict=False):
        values = [[_cell(group.cells(), lr, decay) for lr in lrs] for decay in decays]
        mesh = _heat(panel, values, lrs, [f"{decay:g}" for decay in decays], goal)
        panel.invert_yaxis()
        panel.set_title(group.label, fontsize=10)
        panel.set_ylabel("initial λ", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("initial η", fontsize=8)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    return figure, panels, mesh


def _heat(
    axes: Axes,
    values: Sequence[Sequence[float]],
    lrs: Sequence[float],
    names: Sequence[str],
    goal: float,
) -> ScalarMappable:
    low, high = goal - BELOW, goal + ABOVE
    mesh = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(np.array(values)):
        colour = "white" if value < goal - BELOW / 2 else "black"
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs], fontsize=8)
    axes.set_yticks(range(len(names)), list(names), fontsize=8)
    return mesh


def _cell(cells: Mapping[Start, float], lr: float, decay: float) -> float:
    keys: list[Start] = [(lr, decay), (None, decay), (lr, None), (None, None)]
    return next((cells[key] for key in keys if key in cells), math.nan)


def cost_figure(made: Sequence[Comparison], path: Path) -> None:
    """Test accuracy against total cost in plain training steps, one panel per task and base.

    Args:
        made: the comparisons.
        path: of the PNG.
    """
    figure, panels = _panels(made, height=4.6, width=6.2)
    looks = _looks(made)
    for axes, comparison in zip(panels, made, strict=True):
        _costs(axes, comparison, looks)
    handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=3 * min(3, len(made)),
        fontsize=8, title="mark: median over starts; bar: worst to best start; drawn side by side",
    )  # fmt: skip
    _save(figure, path)


def _looks(made: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each entry, the same in all panels."""
    labels = dict.fromkeys(group.label for comparison in made for group in comparison.groups())
    looks = zip(labels, itertools.cycle(MARKERS), strict=False)
    return {label: {"color": _colour(label), "marker": marker} for label, marker in looks}


def _costs(axes: Axes, comparison: Comparison, looks: Mapping[str, Mapping[str, Any]]) -> None:
    goal = statistics.fmean(comparison.grid().values())
    runs = len(comparison.plan.grid(comparison.settings[0]))
    steps = comparison.grid_choice(comparison.settings[0]).steps
    lines = [comparison.line(group) for group in comparison.groups()]
    axes.axhline(goal, color="0.8", zorder=0)
    axes.plot(runs * steps, goal, "s", color="black", label="grid's best by validation")
    searches = {"random search": comparison.random_search(), "TPE": comparison.tpe()}
    for (name, found), style in zip(searches.items(), ("o-", "^--"), strict=True):
        if found:
            costs = [count * steps for count in found]
            axes.plot(costs, list(found.values()), style, color="0.5", label=name)
    for i, line in enumerate(lines):
        cost = line.cost_counted * steps * 1.035 ** (i - len(lines) / 2)  # side by side
        look = dict(looks[line.method])
        axes.plot([cost, cost], [line.worst, line.best], color=look["color"], linewidth=0.8)
        shown = max(line.median, goal - 11.7)  # a median below the panel sits on its edge
        axes.plot(cost, shown, linestyle="none", markersize=6, label=line.method, **look)
    axes.set_ylim(goal - 12, max(goal, *(line.best for line in lines)) + 1)
    axes.set(xscale="log", xlabel="total cost (plain training steps)", ylabel="test accuracy (%)")
    axes.set_title(f"{comparison.task}, {comparison.base} ({_seeds(comparison)})")


def _seeds(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return f"{count} seed{'s' if count > 1 else ''}"


def difference_figure(made: Sequence[Comparison], path: Path) -> None:
    """Median and worst start minus the grid's best of the same seed; one mark per seed.

    Args:
        made: the comparisons.
        path: of the PNG.
    """
    most = max(len(comparison.groups()) for comparison in made)
    figure, panels = _panels(made, height=1.4 + 0.27 * most, width=6.4)
    for axes, comparison in zip(panels, made, strict=True):
        _differences(axes, comparison)
    _save(figure, path)


def _differences(axes: Axes, comparison: Comparison) -> None:
    groups, grid = comparison.groups()[::-1], comparison.grid()
    for y, group in enumerate(groups):
        for seed, goal in grid.items():
            found = group.of_seed(seed)
            if not found:
                continue
            median, worst = (f(found) - goal for f in (statistics.median, min))
            colour = _colour(group.label)
            axes.plot(worst, y, "|", color=colour, markersize=10, label="worst start")
            axes.plot(median, y, "o", color=colour, markersize=5, label="median start")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(-0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(groups)), [group.label for group in groups], fontsize=8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-90, 5)
    axes.set_xticks([-50, -20, -10, -5, -2, -1, -0.5, 0, 1, 2, 5])
    axes.set_xticklabels(["−50", "−20", "−10", "−5", "−2", "−1", "", "0", "1", "2", "5"])
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("points to the grid's best of the same seed (● median, | worst start)")
    axes.set_title(f"{comparison.task}, {comparison.base} ({_seeds(comparison)})")


def _colour(label: str) -> str:
    """Greys for fixed hyperparameters, reds for the library's own, other colours for the others."""
    method = label.split(",")[0]
    if method not in METHODS or method == "fixed":
        return "#777777"
    kinds = [name for name, entry in METHODS.items() if entry.is_own == METHODS[method].is_own]
    colours = OWN if METHODS[method].is_own else OTHERS
    return colours[kinds.index(method) % len(colours)]


def _panels(
    made: Sequence[Comparison], height: float, width: float
) -> tuple[Figure, Sequence[Axes]]:
    columns = min(3, len(made))
    rows = math.ceil(len(made) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(made) :]:
        panel.axis("off")
    return figure, list(panels.flat[: len(made)])


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
