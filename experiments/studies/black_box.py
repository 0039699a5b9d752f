"""Dropout through its sampling, and shifts by whole pixels: settings without a derivative.

Antithetic evolution strategies, from the live weights in every window (ES) or with particles that
go on (PES), beside a self-tuning network and a grid.
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
from experiments.studies.dropout_task import Row, SelfTuned, Training
from experiments.studies.schema import BlackBoxConfig
from experiments.studies.study import save_numbers, settings_of
from experiments.tasks import Task

LEARN = ("input_dropout", "hidden_dropout", "shift")
METHODS = {
    "fixed": "fixed at the start",
    "grid": "best of the grid",
    "self-tuning": "self-tuning network",
    "ES": "ES, new particles",
    "PES": "PES, particles go on",
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
    settings = settings_of(config, BlackBoxConfig)
    check_starts(settings, LEARN)
    rows = compared(config, settings, _one_seed, progress)
    save_numbers(folder, rows)
    dropout_figure(rows, LEARN, METHODS, folder.figure_file)
    return findings(rows, LEARN, METHODS)


def _one_seed(task: Task, settings: BlackBoxConfig, seed: int) -> Iterator[Row]:
    axes = (settings.input_rates, settings.hidden_rates, settings.shifts)
    fixed = {"weight_decay": settings.weight_decay}
    yield from grid(task, settings, seed, dict(zip(LEARN, axes, strict=True)), fixed)
    for name, values in {"low": settings.low, "high": settings.high}.items():
        start, own = dict(zip(LEARN, values, strict=True)) | fixed, {"start": name}
        yield from reported(Training(task, settings, seed, start), settings, "fixed", own)
        for method in ("self-tuning", "ES", "PES"):
            new = learner(task, settings, seed, start, method)
            yield from learned(new, task, settings, seed, method, own)


def learner(
    task: Task, settings: BlackBoxConfig, seed: int, start: Mapping[str, float], method: str
) -> Training | SelfTuned:
    """A new run that learns `LEARN` by one of the methods."""
    if method == "self-tuning":
        return SelfTuned(task, settings, seed, start, LEARN)
    persistent, window = method == "PES", settings.window
    engine = hypertorch.Evolution(
        settings.pairs,
        settings.scale,
        persistent,
        reset_every=settings.reset_every if persistent else None,
        seed=seed,
    )
    rhythm = (window, window if persistent else 2 * window)
    return Training(task, settings, seed, start, LEARN, engine, rhythm=rhythm)
