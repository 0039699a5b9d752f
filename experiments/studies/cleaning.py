"""The study of data hyper-cleaning: in one online run, by the nested scheme, and without either.

The gap between training on all labels and on the right ones alone is 100 %; how much of it is
closed, and how many of the wrong labels are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.hyper_cleaning import Cleaned, Laboratory, accuracy, clean_nested, clean_online
from experiments.loaders import Examples
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.cleaning_figure import LABELS, cleaning_figure
from experiments.studies.schema import CleaningConfig
from experiments.studies.study import save_numbers, settings_of, spread

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
        online = _best(laboratory, clean_online, settings.rates)
        images.setdefault(name, _lowest(laboratory, online))
        rows += [{**own, **row} for row in _one(laboratory, online)]
    if not rows:
        raise next(iter(missing.values()))
    save_numbers(folder, rows)
    cleaning_figure(rows, images, folder.figure_file)
    return _findings(rows, missing)


def _best(
    laboratory: Laboratory, clean: Callable[..., Cleaned], settings: Sequence[float]
) -> Cleaned:
    """Run `clean` with each setting; return the one that validation prefers."""
    tried = [clean(laboratory, setting) for setting in settings]
    return max(tried, key=laboratory.validation_accuracy)


def _one(laboratory: Laboratory, online: Cleaned) -> Iterator[Row]:
    """What was found in one data set with one seed."""
    nested = _best(laboratory, clean_nested, laboratory.settings.horizons)
    kept = {
        "baseline": torch.ones(laboratory.n, dtype=torch.bool),
        "validation": torch.zeros(laboratory.n, dtype=torch.bool),
        "filter": laboratory.filtered(laboratory.trained(laboratory.validation)),
        "online": online.kept,
        "nested": nested.kept,
        "ceiling": laboratory.filtered(laboratory.trained(_all_right(laboratory))),
        "oracle": ~laboratory.corrupted,
    }
    scores = {
        what: accuracy(laboratory.trained(laboratory.chosen(chosen)), laboratory.test)
        for what, chosen in kept.items()
    }
    assert online.network is not None
    own = accuracy(online.network, laboratory.test)
    goes_on = laboratory.trained(laboratory.chosen(online.kept), start=online.network)
    gap = scores["oracle"] - scores["baseline"]
    for what, score in {**scores, "goes on": accuracy(goes_on, laboratory.test)}.items():
        row = {"what": what, "accuracy": score, "closed": (score - scores["baseline"]) / gap}
        if what in kept and what not in ("baseline", "validation"):
            row["f1"] = laboratory.f1(~kept[what])
        yield row
    yield {"what": "own weights", "accuracy": own}
    for what, cleaned in {"online": online, "nested": nested}.items():
        yield {"what": f"{what}: chosen", "setting": cleaned.setting}
        for cost, f1 in cleaned.trace:
            yield {"what": f"{what}: trace", "cost": cost, "f1": f1}
        for corrupted in (False, True):
            counts = cleaned.weights[laboratory.corrupted == corrupted].histc(BINS, 0, 1)
            for place, count in enumerate(counts.tolist()):
                at = {"weight": (place + 0.5) / BINS, "corrupted": int(corrupted), "count": count}
                yield {"what": f"{what}: histogram", **at}


def _all_right(laboratory: Laboratory) -> Examples:
    """All training examples with their true labels, and the validation examples."""
    whole = laboratory.chosen(torch.ones(laboratory.n, dtype=torch.bool))
    return Examples(whole.x, torch.cat([laboratory.true_labels, laboratory.validation.y]))


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
        own = [row for row in rows if row["data"] == name]
        found[name] = {}
        for what in dict.fromkeys(row["what"] for row in own if "accuracy" in row):
            chosen = [row for row in own if row["what"] == what]
            columns = [column for column in ("accuracy", "closed", "f1") if column in chosen[0]]
            found[name][what] = {c: spread([row[c] for row in chosen]) for c in columns}
        for way in ("online", "nested"):
            settings = [row["setting"] for row in own if row["what"] == f"{way}: chosen"]
            found[name][way]["chosen"] = settings
    says = [_sentence(name, what, scores) for name in found for what, scores in found[name].items()]
    return {**found, "says": says + [f"Left out: {error}" for error in missing.values()]}


def _sentence(name: str, what: str, scores: dict[str, Any]) -> str:
    def number(column: str, digits: int, scale: float = 1.0) -> str:
        own = scores[column]
        return f"{scale * own['mean']:.{digits}f} ± {scale * own['std']:.{digits}f}"

    said = f"{name}, {LABELS[what]}: {number('accuracy', 2, 100)} %"
    said += f", {number('closed', 0, 100)} % of the gap" if "closed" in scores else ""
    said += f", F1 {number('f1', 3)}" if "f1" in scores else ""
    return said + (f" (chosen: {scores['chosen']})" if "chosen" in scores else "") + "."
