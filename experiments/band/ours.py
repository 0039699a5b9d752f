"""hypertorch's own entries: each preset wraps a bare optimizer that starts from (η₀, λ₀)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.band.trainee import Trainee, base_optimizer, start_of

Wrap = Callable[[torch.optim.Optimizer, nn.Module, Problem], torch.optim.Optimizer]


class Preset(NamedTuple):
    """A way to use the library: how the optimizer is wrapped, and the schedule on top."""

    wrap: Wrap
    schedule: str


def default(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem
) -> torch.optim.Optimizer:
    """η and λ learned with every default of the library.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed; only its validation data are used.

    Returns:
        The wrapped optimizer.
    """
    outer_loss = hypertorch.ValidationLoss(model, cross_entropy, problem.validation_loader())
    return hypertorch.HyperOptimizer(optimizer, model, outer_loss)


def any_start(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem, **options: Any
) -> torch.optim.Optimizer:
    """From the start that short trials find; η without a Hessian, λ by where training would rest.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed; only its training and validation data are used.
        options: of the wrapper.

    Returns:
        The wrapped optimizer, its start-up counted in its `cost`.
    """
    return hypertorch.from_any_start(
        optimizer,
        model,
        cross_entropy,
        problem.loader(),
        problem.validation_loader(),
        problem.steps,
        **options,
    )


def unrolled(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem
) -> torch.optim.Optimizer:
    """From the same start, by windows of twenty steps in a hundred that `higher` unrolls.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed.

    Returns:
        The wrapped optimizer.
    """
    windows: dict[str, Any] = {"window": 20, "update_every": 100, "engine": hypertorch.Unroll()}
    return any_start(optimizer, model, problem, **windows)


PRESETS: dict[str, Preset] = {
    "hyper": Preset(default, "constant"),
    "hyper-linear": Preset(default, "linear"),
    "unrolled": Preset(unrolled, "trapezoid"),
    "any-start": Preset(any_start, "trapezoid"),
}


def build_ours(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """A run of one of the presets.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: its method names the preset.

    Returns:
        What the loop trains.
    """
    preset = PRESETS[run.method]
    bare = base_optimizer(run.base, model, *start_of(run))
    return Trainee(model, preset.wrap(bare, model, problem), problem, preset.schedule)
