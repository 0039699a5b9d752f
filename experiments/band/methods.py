"""The methods of the comparison by name: what starts each takes, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from experiments.band.hypergradient_descent import build_descent
from experiments.band.ours import PRESETS, build_ours
from experiments.band.problems import Problem
from experiments.band.rivals import d_adaptation, dog, mechanic, prodigy, schedule_free
from experiments.band.rows import Run
from experiments.band.trainee import Trainee, base_optimizer, start_of

Build = Callable[[nn.Module, Problem, Run], Trainee]


@dataclass(frozen=True)
class Method:
    """A method.

    `schedules`: those it is run with, one run each. `takes_lr`, `takes_weight_decay`: whether it
    starts from η₀ and from λ₀. `is_own`: made of this library, so that its code is in the key.
    `own_base`: the base of one that does not wrap any; it is in the tables of all bases.
    `package`: that it is imported from.
    """

    build: Build
    schedules: tuple[str, ...] = ("constant",)
    takes_lr: bool = True
    takes_weight_decay: bool = True
    is_own: bool = False
    own_base: str | None = None
    package: str | None = None


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
    "prodigy": Method(prodigy, ("cosine",), takes_lr=False, own_base="adamw", package="prodigyopt"),
    "d-adaptation": Method(d_adaptation, ("linear",), takes_lr=False, package="dadaptation"),
    "dog": Method(dog, takes_lr=False, own_base="sgd", package="dog"),
    "l-dog": Method(dog, takes_lr=False, own_base="sgd", package="dog"),
    "schedule-free": Method(schedule_free, package="schedulefree"),
    "mechanic": Method(mechanic, ("linear",), package="mechanic_pytorch"),
    "hd-additive": Method(build_descent),
    "hd-multiplicative": Method(build_descent),
}
