"""Dropout rates and λ by a network that predicts the response, beside the hypergradient.

Dropout through its sampling has no derivative. The response network needs none; the hypergradient
is taken of Gaussian dropout, which has one and the same mean and variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import hypertorch
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.dropout_comparison import (
    check_starts,
    compared,
    findings,
    grid,
    learned,
    reported,
)
from experiments.studies.dropout_figure import dropout_figure
from experiments.studies.dropout_task import Row, SelfTuned, Training, blurred
from experiments.studies.schema import SelfTuningConfig
from experiments.studies.study import save_numbers, settings_of
from experiments.tasks import Task

LEARN = ("input_dropout", "hidden_dropout", "weight_decay")
METHODS = {
    "fixed": "fixed at the start",
    "grid": "best of the grid",
    "self-tuning": "self-tuning network",
    "window": "hypergradient, window of 5",
    "real time": "hypergradient, real time",
}


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Learn three hyperparameters from two starts by three methods, beside a grid.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, SelfTuningConfig)
    check_starts(settings, LEARN)
    rows = compared(config, settings, _one_seed, progress)
    save_numbers(folder, rows)
    dropout_figure(rows, LEARN, METHODS, folder.figure_file)
    return findings(rows, LEARN, METHODS)


def _one_seed(task: Task, settings: SelfTuningConfig, seed: int) -> Iterator[Row]:
    axes = (settings.input_rates, settings.hidden_rates, settings.decays)
    yield from grid(task, settings, seed, dict(zip(LEARN, axes, strict=True)), {"shift": 0.0})
    for name, start in starts(settings).items():
        own = {"start": name}
        yield from reported(Training(task, settings, seed, start), settings, "fixed", own)
        for method in ("self-tuning", "window", "real time"):
            new = learner(task, settings, seed, start, method)
            yield from learned(new, task, settings, seed, method, own)


def starts(settings: SelfTuningConfig) -> dict[str, dict[str, float]]:
    """Too little of everything, and too much."""
    both = {"low": settings.low, "high": settings.high}
    return {
        name: {**dict(zip(LEARN, values, strict=True)), "shift": 0.0}
        for name, values in both.items()
    }


def learner(
    task: Task, settings: SelfTuningConfig, seed: int, start: Mapping[str, float], method: str
) -> Training | SelfTuned:
    """A new run that learns `LEARN` by one of the methods."""
    if method == "self-tuning":
        return SelfTuned(task, settings, seed, start, LEARN)
    if method == "window":
        return Training(task, settings, seed, start, LEARN, hypertorch.Unroll(), blurred)
    engine, every = hypertorch.Forward(real_time=True), settings.real_time_every
    return Training(task, settings, seed, start, LEARN, engine, blurred, (every, every))
