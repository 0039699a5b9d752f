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


def searched(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem, **options: Any
) -> torch.optim.Optimizer:
    """As `default`, from the η that ten training steps at each of some ten find.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed; only its training and validation data are used.
        options: of the wrapper.

    Returns:
        The wrapped optimizer, its search counted in its `cost`.
    """
    outer_loss = hypertorch.ValidationLoss(model, cross_entropy, problem.validation_loader())
    wrapped = hypertorch.HyperOptimizer(optimizer, model, outer_loss, **options)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    def validation() -> Tensor:
        model.eval()
        x, y = problem.task.validation.x[:TRIAL_EXAMPLES], problem.task.validation.y
        return loss(x, y[:TRIAL_EXAMPLES])

    batches = itertools.islice(itertools.cycle(problem.loader()), TRIAL_STEPS)
    hypertorch.search_lr(wrapped, [partial(loss, x, y) for x, y in batches], validation)
    return wrapped


def first_order(
    optimizer: torch.optim.Optimizer, model: nn.Module, problem: Problem
) -> torch.optim.Optimizer:
    """As `searched`, with no Hessian at all: two steps of each twenty, at the last weights.

    Args:
        optimizer: bare, at the start.
        model: that it trains.
        problem: task and seed.

    Returns:
        The wrapped optimizer.
    """
    return searched(optimizer, model, problem, engine=hypertorch.FirstOrder(), window=2)


PRESETS: dict[str, Preset] = {
    "hyper": Preset(default, "constant"),
    "hyper-linear": Preset(default, "linear"),
    "hyper-search": Preset(searched, "linear"),
    "first-order": Preset(first_order, "linear"),
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
