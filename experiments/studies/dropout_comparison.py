"""What `self_tuning` and `black_box` do alike: a grid, learned runs, and what is said of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from experiments.optimizers import build
from experiments.schema import Config
from experiments.studies.dropout_task import Row, SelfTuned, Training, trained
from experiments.studies.schema import BlackBoxConfig, DropoutTaskConfig, SelfTuningConfig
from experiments.studies.study import check_one_each, rows_of, spread
from experiments.tasks import Task

SHOWN = {
    "input_dropout": "pixel dropout",
    "hidden_dropout": "hidden dropout",
    "weight_decay": "λ",
    "shift": "shift",
}


def check_starts(settings: SelfTuningConfig | BlackBoxConfig, learn: Sequence[str]) -> None:
    """Refuse starts that are not one number for each of the hyperparameters."""
    check_one_each("low", settings.low, learn)
    check_one_each("high", settings.high, learn)


def compared(
    config: Config,
    settings: DropoutTaskConfig,
    one_seed: Callable[[Task, Any, int], Iterator[Row]],
    progress: bool,
) -> list[Row]:
    """The rows of every seed, each with a split of its own."""
    rows: list[Row] = []
    with tqdm(desc=config.run.experiment, unit=" runs", disable=not progress) as bar:
        for seed in settings.seeds:
            task: Task = build(OmegaConf.merge(config.task, {"split_seed": seed}))
            for row in one_seed(task, settings, seed):
                rows.append({"seed": seed, **row})
                bar.update(row["what"] != "trace")
    return rows


def grid(
    task: Task,
    settings: DropoutTaskConfig,
    seed: int,
    axes: Mapping[str, Sequence[float]],
    fixed: Mapping[str, float],
) -> Iterator[Row]:
    """A plain run for each point of the product of the axes."""
    for point in itertools.product(*axes.values()):
        start = {**dict(zip(axes, point, strict=True)), **fixed}
        row, _ = trained(Training(task, settings, seed, start), settings)
        yield {"what": "grid", **row}


def reported(
    run: Training | SelfTuned, settings: DropoutTaskConfig, method: str, own: Row
) -> Iterator[Row]:
    """Its scores, and how it came to them."""
    row, trace = trained(run, settings)
    for point in trace:
        yield {"what": "trace", "method": method, **own, **point}
    yield {"what": "run", "method": method, **own, **row}


def learned(
    run: Training | SelfTuned,
    task: Task,
    settings: DropoutTaskConfig,
    seed: int,
    method: str,
    own: Row,
) -> Iterator[Row]:
    """The same of a run that learns; then plain training at the numbers it ended with."""
    yield from reported(run, settings, method, own)
    again, _ = trained(Training(task, settings, seed, run.values()), settings)
    yield {"what": "again", "method": method, **own, **again}


def best_of_grid(rows: Sequence[Row]) -> list[Row]:
    """For each seed, the point of the grid with the least validation loss."""
    points = rows_of(rows, "grid")
    return [
        min(rows_of(points, seed=seed), key=lambda r: r["validation_loss"])
        for seed in dict.fromkeys(row["seed"] for row in points)
    ]


def findings(rows: Sequence[Row], learn: Sequence[str], methods: Mapping[str, str]) -> Row:
    """Scores, costs and last hyperparameters of each method, by where it started.

    Args:
        rows: of `numbers.csv`.
        learn: the hyperparameters.
        methods: names, and what to call them.

    Returns:
        The summary, with what to say.
    """
    found: dict[str, Any] = {}
    columns = ("test_loss", "test_accuracy", "validation_loss", "cost", "seconds", *learn)
    for method in methods:
        for start in ("",) if method == "grid" else ("low", "high"):
            key = {"method": method, "start": start}
            own = best_of_grid(rows) if method == "grid" else rows_of(rows, "run", **key)
            scores = {name: spread([row[name] for row in own]) for name in columns}
            again = rows_of(rows, "again", **key)
            if again:
                scores["again_test_loss"] = spread([row["test_loss"] for row in again])
            found[f"{method}, {start}".rstrip(", ")] = scores
    size = sum(row["what"] == "grid" for row in rows) // len(best_of_grid(rows))
    found["grid"]["cost"] = spread([size * value for value in found["grid"]["cost"]["values"]])
    found["grid"]["size"] = size
    return {"found": found, "says": [_sentence(name, s, learn) for name, s in found.items()]}


def _sentence(name: str, scores: dict[str, Any], learn: Sequence[str]) -> str:
    def shown(column: str, form: str, factor: float = 1.0) -> str:
        mean, deviation = (factor * scores[column][key] for key in ("mean", "std"))
        return f"{mean:{form}} ± {deviation:{form}}"

    ends = ", ".join(f"{SHOWN[column]} {shown(column, '.2g')}" for column in learn)
    again = (
        f"; again with these fixed: {shown('again_test_loss', '.3f')}"
        if "again_test_loss" in scores
        else ""
    )
    return (
        f"{name}: test loss {shown('test_loss', '.3f')}, accuracy "
        f"{shown('test_accuracy', '.1f', 100)} %, {scores['cost']['mean']:.0f} plain steps, "
        f"{scores['seconds']['mean']:.1f} s; ends at {ends}{again}."
    )
