"""The figure of the study `cleaning`: learned weights, F1, accuracies, and what was thrown out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from torch import Tensor

from experiments.figures import save_figure
from experiments.studies.study import rows_of

Rows = Sequence[dict[str, Any]]
Images = Mapping[str, Sequence[tuple[Tensor, str]]]
NAMES = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "digits": "digits"}
LABELS = {
    "baseline": "all labels",
    "validation": "validation alone",
    "filter": "filter by a network of the validation images",
    "online": "learned in one run",
    "nested": "learned by the nested scheme",
    "ceiling": "filter by a network of all true labels",
    "filter, rounded": "filter by a network of the validation images, rounded",
    "online, rounded": "learned in one run, rounded",
    "nested, rounded": "learned by the nested scheme, rounded",
    "ceiling, rounded": "filter by a network of all true labels, rounded",
    "wrong kept": "the right labels, and the wrong ones that one run, rounded, keeps",
    "right dropped": "the right labels but those that one run, rounded, drops",
    "oracle": "the right labels alone",
    "own weights": "the one run's own weights, before",
    "goes on": "the one run, going on without restart",
}
BARS = {
    "baseline": "all\nlabels", "validation": "validation\nalone", "filter": "filter",
    "online": "one run", "nested": "nested", "oracle": "right\nlabels",
}  # fmt: skip
ONLINE, NESTED, OTHERS = "#0072b2", "#d55e00", "0.65"
CLEAN, CORRUPTED = "#009e73", "#cc79a7"


def cleaning_figure(rows: Rows, images: Images, path: Path) -> None:
    """A row per data set: histogram of λ, F1 along the way, accuracies; below it, images.

    Args:
        rows: of `numbers.csv`.
        images: by data set, those with the lowest weights, and their labels.
        path: of the PNG.
    """
    count = len(images)
    figure = plt.figure(figsize=(15, 5.6 * count), layout="constrained")
    spaces = figure.add_gridspec(2 * count, 3, height_ratios=[3.6, 1] * count)
    for place, (name, shown) in enumerate(images.items()):
        own = rows_of(rows, data=name)
        panels = [figure.add_subplot(spaces[2 * place, column]) for column in range(3)]
        _plot_weights(panels[0], own)
        _plot_f1(panels[1], own)
        _plot_accuracies(panels[2], own)
        for panel, title in zip(panels, _titles(name), strict=True):
            panel.set_title(title)
        _show(figure, spaces[2 * place + 1, :], shown)
    save_figure(figure, path)


def _titles(name: str) -> list[str]:
    return [
        f"{NAMES[name]}: weights after one run",
        "Wrong labels found, while λ is learned",
        "Test accuracy, trained with λ + validation",
    ]


def _plot_weights(axes: Axes, rows: Rows) -> None:
    histogram = rows_of(rows, "online: histogram")
    places = sorted({row["weight"] for row in histogram})
    width = places[1] - places[0]
    for corrupted, colour in ((0, CLEAN), (1, CORRUPTED)):
        counts = [
            sum(r["count"] for r in histogram if (r["weight"], r["corrupted"]) == (p, corrupted))
            for p in places
        ]
        axes.bar(
            places, counts, width, color=colour, alpha=0.6,
            label="wrong label" if corrupted else "right label",
        )  # fmt: skip
    axes.axvline(0.5, color="black", ls="--", lw=1, label="start; below: taken for wrong")
    axes.set(xlabel="weight λᵢ of a training example", ylabel="examples, all seeds", xlim=(0, 1))
    axes.legend(fontsize="small", loc="upper center")
    axes.grid(alpha=0.3, axis="y")


def _plot_f1(axes: Axes, rows: Rows) -> None:
    for way, colour in (("online", ONLINE), ("nested", NESTED)):
        for number, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
            trace = rows_of(rows, f"{way}: trace", seed=seed)
            axes.plot(
                [row["cost"] for row in trace], [row["f1"] for row in trace], "-o", ms=3,
                color=colour, label=LABELS[way] if number == 0 else None,
            )  # fmt: skip
    filtered = np.mean([row["f1"] for row in rows_of(rows, "filter")])
    axes.axhline(filtered, color="0.4", ls=":", label="filter by a network of validation images")
    axes.axhline(0.92, color="black", ls="--", lw=1, label="0.92: the paper, 5000 images of MNIST")
    low = min(
        [
            0.9,
            *(row["f1"] for way in ("online", "nested") for row in rows_of(rows, f"{way}: trace")),
        ]
    )
    axes.set_ylim(low - 0.7 * (filtered - low), filtered + 0.2 * (filtered - low))
    axes.set_xscale("log")
    axes.set(xlabel="cost so far (plain training steps)", ylabel="F1 of finding wrong labels")
    axes.legend(
        fontsize="small", loc="lower right", title="a line per seed", title_fontsize="small"
    )
    axes.grid(alpha=0.3)


def _plot_accuracies(axes: Axes, rows: Rows) -> None:
    colours = {"online": ONLINE, "nested": NESTED}
    scores = {what: np.array([100 * r["accuracy"] for r in rows_of(rows, what)]) for what in BARS}
    for place, (what, values) in enumerate(scores.items()):
        axes.bar(place, values.mean(), 0.7, color=colours.get(what, OTHERS))
        axes.plot([place] * len(values), values, "o", color="black", ms=4)
        axes.annotate(
            f"{values.mean():.1f}", (place, values.max()), xytext=(0, 6), ha="center",
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    low = min(values.min() for values in scores.values())
    high = max(values.max() for values in scores.values())
    axes.set_ylim(low - 0.35 * (high - low), high + 0.2 * (high - low))
    axes.set_xticks(range(len(BARS)), list(BARS.values()), fontsize="small")
    axes.set_ylabel("test accuracy (%); a point per seed")
    axes.grid(alpha=0.3, axis="y")


def _show(figure: Figure, space: SubplotSpec, shown: Sequence[tuple[Tensor, str]]) -> None:
    inner = space.subgridspec(1, len(shown) + 1, width_ratios=[1.6] + [1] * len(shown))
    words = figure.add_subplot(inner[0, 0])
    words.axis("off")
    words.text(1, 0.5, "lowest weights,\nwith the labels\nthey came with:", ha="right", va="center")
    for place, (image, label) in enumerate(shown, 1):
        axes = figure.add_subplot(inner[0, place])
        axes.imshow(image.numpy(), cmap="gray_r")
        axes.set_title(f"“{label}”", fontsize="medium")
        axes.axis("off")
