"""The study of data hyper-cleaning: in one online run, by the nested scheme, and without either.

The gap between training on all labels and on the right ones alone is 100 %; how much of it is
closed, and how many of the wrong labels are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.config_values import check_names
from experiments.hyper_cleaning import (
    DATA,
    START,
    Cleaned,
    Laboratory,
    accuracy,
    clean_nested,
    clean_online,
)
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.cleaning_figure import LABELS, cleaning_figure
from experiments.studies.schema import CleaningConfig
from experiments.studies.study import check_one_each, rows_of, save_numbers, settings_of, spread

Row = dict[str, Any]
BINS = 20  # of the histogram of the weights
SHOWN = 10  # images


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Clean each data set online and by the nested scheme, beside what they are compared with.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.

    Raises:
        FileNotFoundError, ModuleNotFoundError: none of the data sets is there.
    """
    settings = settings_of(config, CleaningConfig)
    check_names("study.data", settings.data, DATA)
    check_one_each("images", settings.images, settings.data)
    rows: list[Row] = []
    missing: dict[str, Exception] = {}
    images: dict[str, list[tuple[Tensor, str]]] = {}
    sizes = zip(settings.data, settings.images, strict=True)
    jobs = [(name, size, seed) for name, size in sizes for seed in settings.seeds]
    for name, size, seed in tqdm(jobs, desc="cleaning", disable=not progress):
        try:
            laboratory = Laboratory(name, size, settings, seed)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            missing[name] = error
            continue
        own = {"data": name, "seed": seed}
        online = clean_online(laboratory)
        images.setdefault(name, _lowest(laboratory, online))
        rows += [{**own, **row} for row in _one(laboratory, online)]
    if not rows:
        raise next(iter(missing.values()))
    save_numbers(folder, rows)
    cleaning_figure(rows, images, folder.figure_file)
    return _findings(rows, missing)


def _one(laboratory: Laboratory, online: Cleaned) -> Iterator[Row]:
    """What was found in one data set with one seed."""
    nested = clean_nested(laboratory)
    every, right = torch.ones(laboratory.n), (~laboratory.corrupted).float()
    assert online.network is not None
    from_validation = laboratory.trained(0 * every)
    from_all = laboratory.trained(every, laboratory.true_labels)
    soft = {
        "filter": laboratory.right(from_validation),
        "online": online.weights,
        "nested": nested.weights,
        "ceiling": laboratory.right(from_all),
    }
    hard = {what: (weights >= START).float() for what, weights in soft.items()}
    networks = {
        "baseline": laboratory.trained(every),
        "validation": from_validation,
        **{what: laboratory.trained(weights) for what, weights in soft.items()},
        **{f"{what}, rounded": laboratory.trained(weights) for what, weights in hard.items()},
        "wrong kept": laboratory.trained(torch.maximum(right, hard["online"])),
        "right dropped": laboratory.trained(right * hard["online"]),
        "oracle": laboratory.trained(right),
        "own weights": online.network,
    }
    scores = {what: accuracy(network, laboratory.test) for what, network in networks.items()}
    scores["goes on"] = accuracy(
        laboratory.trained(online.weights, start=online.network), laboratory.test
    )
    gap = scores["oracle"] - scores["baseline"]
    for what, score in scores.items():
        row = {"what": what, "accuracy": score, "closed": (score - scores["baseline"]) / gap}
        if what in hard:
            row["f1"] = laboratory.f1(hard[what] == 0)
        yield row
    for what, cleaned in {"online": online, "nested": nested}.items():
        yield from _course(laboratory, what, cleaned)


def _course(laboratory: Laboratory, what: str, cleaned: Cleaned) -> Iterator[Row]:
    """F1 while the weights were learned, and their histogram."""
    for cost, f1 in cleaned.trace:
        yield {"what": f"{what}: trace", "cost": cost, "f1": f1}
    for corrupted in (False, True):
        counts = cleaned.weights[laboratory.corrupted == corrupted].histc(BINS, 0, 1)
        for place, count in enumerate(counts.tolist()):
            at = {"weight": (place + 0.5) / BINS, "corrupted": int(corrupted), "count": count}
            yield {"what": f"{what}: histogram", **at}


def _lowest(laboratory: Laboratory, cleaned: Cleaned) -> list[tuple[Tensor, str]]:
    """The images with the lowest weights, and what they are labelled as."""
    chosen = cleaned.weights.argsort()[:SHOWN]
    shown = []
    for number in chosen.tolist():
        image = laboratory.train.x[number].view(laboratory.image_shape)
        shown.append((image, laboratory.names[laboratory.train.y[number]]))
    return shown


def _findings(rows: Sequence[Row], missing: dict[str, Exception]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["data"] for row in rows):
        own = rows_of(rows, data=name)
        found[name] = {}
        for what in dict.fromkeys(row["what"] for row in own if "accuracy" in row):
            chosen = rows_of(own, what)
            columns = [column for column in ("accuracy", "closed", "f1") if column in chosen[0]]
            found[name][what] = {c: spread([row[c] for row in chosen]) for c in columns}
    says = [_sentence(name, what, scores) for name in found for what, scores in found[name].items()]
    return {**found, "says": says + [f"Left out: {error}" for error in missing.values()]}


def _sentence(name: str, what: str, scores: dict[str, Any]) -> str:
    def number(column: str, digits: int, scale: float = 1.0) -> str:
        own = scores[column]
        return f"{scale * own['mean']:.{digits}f} ± {scale * own['std']:.{digits}f}"

    said = f"{name}, {LABELS[what]}: {number('accuracy', 2, 100)} %"
    said += f", {number('closed', 0, 100)} % of the gap"
    said += f", F1 {number('f1', 3)}" if "f1" in scores else ""
    return said + "."
