"""The methods of the comparison by name: what starts each takes, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from experiments.band.ours import PRESETS, build_ours
from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.band.trainee import Trainee, base_optimizer, start_of

Build = Callable[[nn.Module, Problem, Run], Trainee]


@dataclass(frozen=True)
class Method:
    """A method.

    `schedules`: those it is run with, one run each. `takes_lr`, `takes_weight_decay`: whether it
    starts from η₀ and from λ₀. `is_own`: made of this library, so that its code is in the key.
    """

    build: Build
    schedules: tuple[str, ...] = ("constant",)
    bases: tuple[str, ...] = ("sgd", "adamw")
    takes_lr: bool = True
    takes_weight_decay: bool = True
    is_own: bool = False


def build_fixed(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """Fixed η and λ, η scaled by the schedule.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: η, λ, schedule and base.

    Returns:
        What the loop trains.
    """
    bare = base_optimizer(run.base, model, *start_of(run))
    return Trainee(model, bare, problem, run.schedule)


METHODS: dict[str, Method] = {
    "fixed": Method(build_fixed, schedules=("constant", "linear", "cosine")),
    **{
        name: Method(build_ours, schedules=(preset.schedule,), is_own=True)
        for name, preset in PRESETS.items()
    },
}
