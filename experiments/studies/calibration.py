"""Which validation loss λ is judged by: cross-entropy, or its least value over all temperatures.

CE(z, y) asks how sure the model is, min_β CE(β z, y) does not. Each picks a λ from the same
trainings, moves λ in the same run, and has a slope dE/d log λ in the same windows; the test data
say which λ is better.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from experiments.config_values import check_names
from experiments.evaluation import or_infinite
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.calibration_figure import TITLES, calibration_figure
from experiments.studies.calibration_trainings import (
    CRITERIA,
    Row,
    fixed,
    learned,
    problem_of,
    windows,
)
from experiments.studies.schema import CalibrationConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread

#: What λ is picked by, and whether less of it is better. Test data are there for comparison alone.
JUDGES = {
    "cross_entropy": True,
    "calibrated": True,
    "validation_accuracy": False,
    "test_accuracy": False,
}
NAMES = {"cross_entropy": "cross-entropy", "calibrated": "calibrated cross-entropy"}


def picked(rows: Sequence[Row], judge: str) -> Row:
    """The row that a judge finds best; of several alike the one whose λ is in the middle.

    Args:
        rows: of one η, each with another λ.
        judge: a key of `JUDGES`.

    Returns:
        One of the rows.
    """
    sign = 1 if JUDGES[judge] else -1
    costs = [or_infinite(sign * r[judge]) for r in rows]
    best = [row for row, cost in zip(rows, costs, strict=True) if cost == min(costs)]
    return sorted(best, key=lambda row: row["weight_decay"])[(len(best) - 1) // 2]


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Pick λ from a grid by each loss, learn it by each, and look at the slopes of windows.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, CalibrationConfig)
    check_names("study.rates", settings.rates, TITLES)
    for task, rates in settings.rates.items():
        check_names(f"study.rates.{task}", rates)
    rows: list[Row] = []
    jobs = [(task, seed) for task in settings.rates for seed in settings.seeds]
    for task, seed in tqdm(jobs, desc="calibration", disable=not progress):
        rows += ({"task": task, "seed": seed, **row} for row in _one(task, seed, settings))
    save_numbers(folder, rows)
    middle = {task: _middle(rates) for task, rates in settings.rates.items()}
    calibration_figure(rows, middle, folder.figure_file)
    found = {task: _findings(rows_of(rows, task=task)) for task in settings.rates}
    return {**found, "says": [line for task in found for line in _sentences(task, found[task])]}


def _one(task: str, seed: int, settings: CalibrationConfig) -> Iterator[Row]:
    problem = problem_of(task, seed, settings.epochs)
    rates = settings.rates[task]
    grid = list(fixed(problem, rates, settings.decays))
    yield from grid
    yield from (learned(problem, criterion) for criterion in CRITERIA)
    lr = _middle(rates)
    best = picked(rows_of(grid, lr=lr), "validation_accuracy")
    for factor in settings.factors:
        decay = factor * best["weight_decay"]
        for row in windows(problem, lr, decay, settings.windows, settings.states):
            yield {"factor": factor, "lr": lr, "weight_decay": decay, **row}


def _middle(rates: Sequence[float]) -> float:
    return sorted(rates)[len(rates) // 2]


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _findings(rows: Sequence[Row]) -> dict[str, Any]:
    grid = rows_of(rows, "fixed")
    choices = {
        judge: {
            lr: [picked(rows_of(grid, lr=lr, seed=seed), judge) for seed in _values(grid, "seed")]
            for lr in _values(grid, "lr")
        }
        for judge in JUDGES
    }
    return {
        "picked": {judge: _picked(by_rate) for judge, by_rate in choices.items()},
        "calibrated_minus_cross_entropy": spread(
            [
                statistics.fmean(
                    choices["calibrated"][lr][i]["test_accuracy"]
                    - choices["cross_entropy"][lr][i]["test_accuracy"]
                    for lr in _values(grid, "lr")
                )
                for i in range(len(_values(grid, "seed")))
            ]
        ),
        "learned": {
            name: {
                column: spread([row[column] for row in rows_of(rows, "learned", criterion=name)])
                for column in ("lr", "weight_decay", "test_accuracy", "cost")
            }
            for name in CRITERIA
        },
        "probes": {
            f"{factor:g}": {
                column: spread([row[column] for row in rows_of(rows, "probe", factor=factor)])
                for column in ("weight_decay", "validation_accuracy", "test_accuracy")
            }
            for factor in _values(rows_of(rows, "probe"), "factor")
        },
        "windows": {name: _pushes(rows_of(rows, criterion=name)) for name in CRITERIA},
    }


def _picked(by_rate: dict[float, list[Row]]) -> dict[str, Any]:
    """What a judge's λ is worth, for each η, and averaged over η first."""
    found = {
        f"{lr:g}": {
            column: spread([row[column] for row in rows])
            for column in ("weight_decay", "inverse_temperature", "test_accuracy")
        }
        for lr, rows in by_rate.items()
    }
    over_rates = zip(*by_rate.values(), strict=True)
    means = [statistics.fmean(row["test_accuracy"] for row in rows) for rows in over_rates]
    return {**found, "mean over η": {"test_accuracy": spread(means)}}


def _pushes(rows: Sequence[Row]) -> dict[str, Any]:
    """For each K how often the sign is right off the best λ, and how often λ is driven down."""
    rows = rows_of(rows, "window")
    off = [row for row in rows if row["factor"] != 1]
    return {
        f"{length}": {
            "right": _share(rows_of(off, window=length), lambda r: _down(r) == (r["factor"] > 1)),
            "down": {
                f"{factor:g}": _share(rows_of(rows, window=length, factor=factor), _down)
                for factor in _values(rows, "factor")
            },
        }
        for length in _values(rows, "window")
    }


def _down(row: Row) -> bool:
    return bool(row["slope"] > 0)


def _share(rows: Sequence[Row], holds: Callable[[Row], bool]) -> dict[str, Any]:
    """The fraction of a seed's rows for which something holds, over the seeds."""
    by_seed = [rows_of(rows, seed=seed) for seed in _values(rows, "seed")]
    return spread([statistics.fmean(map(holds, own)) for own in by_seed])


def _sentences(task: str, found: dict[str, Any]) -> Iterator[str]:
    for judge, by_rate in found["picked"].items():
        accuracies = [
            f"{_percent(own['test_accuracy'])} at η = {lr} (λ {_range(own['weight_decay'])}, "
            f"β {_range(own['inverse_temperature'])})"
            for lr, own in by_rate.items()
            if lr != "mean over η"
        ]
        mean = _percent(by_rate["mean over η"]["test_accuracy"])
        yield f"{task}, λ by {judge}: test accuracy {mean}; {', '.join(accuracies)}."
    gain = found["calibrated_minus_cross_entropy"]
    yield f"{task}, calibrated minus cross-entropy, test accuracy: {_percent(gain)}."
    for name, own in found["learned"].items():
        yield (
            f"{task}, learned by {NAMES[name]}: λ {_range(own['weight_decay'])}, "
            f"η {_range(own['lr'])}, test accuracy {_percent(own['test_accuracy'])}, "
            f"cost {own['cost']['mean']:.2f}."
        )
    for factor, own in found["probes"].items():
        yield (
            f"{task}, {factor} × best λ ({_range(own['weight_decay'])}): validation accuracy "
            f"{_percent(own['validation_accuracy'])}, test {_percent(own['test_accuracy'])}."
        )
    for name, by_window in found["windows"].items():
        for length, own in by_window.items():
            shares = [f"{_percent(down, 0)} at {factor}" for factor, down in own["down"].items()]
            yield (
                f"{task}, {NAMES[name]}, K = {length}: right sign in {_percent(own['right'], 0)} "
                f"of the states, λ driven down in {', '.join(shares)} × best λ."
            )


def _percent(own: dict[str, Any], digits: int = 1) -> str:
    return f"{100 * own['mean']:.{digits}f} ± {100 * own['std']:.{digits}f} %"


def _range(own: dict[str, Any]) -> str:
    low, high = min(own["values"]), max(own["values"])
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
