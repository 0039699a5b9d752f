"""hypertorch's own entries: each preset wraps a bare optimizer that starts from (η₀, λ₀)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.band.trainee import Trainee, base_optimizer, start_of

#: The search for a starting η: training steps per trial, and the validation examples that judge it.
TRIAL_STEPS, TRIAL_EXAMPLES = 10, 500

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


def unrolled(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem
) -> torch.optim.Optimizer:
    """From the start that short trials find, by windows of twenty steps: λ shows in no shorter one.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed; only its training and validation data are used.

    Returns:
        The wrapped optimizer, its start-up counted in its `cost`.
    """
    return _started(optimizer, model, problem, engine=hypertorch.Unroll(), update_every=200)


def implicit(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem
) -> torch.optim.Optimizer:
    """As `unrolled` in an unchanged loop: η without a Hessian, λ by where training would rest.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed.

    Returns:
        The wrapped optimizer.
    """
    batches = itertools.cycle(problem.loader())

    def inner_loss() -> Tensor:
        x, y = next(batches)
        return cross_entropy(model(x), y)

    solver = hypertorch.Lanczos(max_steps=4)
    of_decay = hypertorch.Implicit(solver, inner_loss=inner_loss, holds_preconditioner=True)
    engine = hypertorch.PerHyperparameter({"lr": hypertorch.FirstOrder(), "weight_decay": of_decay})
    return _started(optimizer, model, problem, engine=engine, update_every=100)


def _started(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem, **options: Any
) -> torch.optim.Optimizer:
    """A wrapper on the calibrated outer loss, with η and λ where learning is to start."""
    criterion = hypertorch.calibrated_cross_entropy
    outer_loss = hypertorch.ValidationLoss(model, criterion, problem.validation_loader())
    outer = partial(hypertorch.GatedSign, max_step=(0.1, 0.7), decay=0.5)  # η, λ
    wrapped = hypertorch.HyperOptimizer(
        optimizer, model, outer_loss, window=20, outer=outer, **options
    )

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    def validation() -> Tensor:
        model.eval()
        x, y = problem.task.validation.x[:TRIAL_EXAMPLES], problem.task.validation.y
        return criterion(model(x), y[:TRIAL_EXAMPLES])

    batches = itertools.islice(itertools.cycle(problem.loader()), TRIAL_STEPS)
    hypertorch.search_lr(wrapped, [partial(loss, x, y) for x, y in batches], validation)
    hypertorch.start_weight_decay(wrapped, problem.steps)
    return wrapped


PRESETS: dict[str, Preset] = {
    "hyper": Preset(default, "constant"),
    "hyper-linear": Preset(default, "linear"),
    "unrolled": Preset(unrolled, "linear"),
    "implicit": Preset(implicit, "linear"),
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
