"""Optuna's TPE over the grid's box; from the same outcomes it proposes the same runs again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.band.packages import package
from experiments.band.rows import Row, Run

if TYPE_CHECKING:
    from experiments.band.plan import Plan, Setting

Outcome = Callable[[Run], Row | None]


def tpe(plan: Plan, at: Setting, outcome: Outcome) -> list[Row]:
    """A study of `size.tpe` trials over η, λ (both in the logarithm) and the schedule.

    It maximises the validation accuracy. Nothing but the rows is kept: a study that was cut short
    is replayed from them.

    Args:
        plan: of the call.
        at: task, base and seed.
        outcome: the row of a run, trained if need be; None ends the study.

    Returns:
        The rows in the order of the trials.

    References:
        Bergstra et al. 2011; Akiba et al. 2019 (Optuna), with its defaults.
    """
    if plan.sizes[at.task].tpe == 0:
        return []
    optuna = package("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    size, box = plan.sizes[at.task], plan.box(at)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=at.seed)
    )
    rows: list[Row] = []
    while len(rows) < size.tpe:
        trial = study.ask()
        lr = trial.suggest_float("lr", box.lr[0], box.lr[-1], log=True)
        decay = trial.suggest_float(
            "weight_decay", box.weight_decay[0], box.weight_decay[-1], log=True
        )
        schedule = trial.suggest_categorical("schedule", list(size.schedules))
        row = outcome(plan.fixed(at, schedule, lr, decay))
        if row is None:
            break
        study.tell(trial, row.score[0])
        rows.append(row)
    return rows
