"""A model with what trains it: the one interface that every method of the comparison fills."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.loaders import Examples
from experiments.optimizers import (
    close,
    cost_of,
    hyperparameter_values,
    rollbacks_of,
    training_step,
)

MOMENTUM = 0.9
PLAIN_LR = 1e-3  # of the clock's own steps, whose result nobody uses
CLOCK_SHARE = 0.05  # of a run's steps, that the clock repeats plainly


def base_optimizer(
    base: str, model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW with torch's defaults.

    Args:
        base: "sgd" or "adamw".
        model: whose parameters are trained.
        lr: η.
        weight_decay: λ.

    Returns:
        The bare optimizer.
    """
    if base == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=weight_decay
        )
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


class Trainee:
    """A model, its optimizer, and the schedule of its learning rate.

    Args:
        model: to be trained in place.
        optimizer: bare, or a `HyperOptimizer`.
        problem: task and seed.
        schedule: constant, linear, cosine or trapezoid; a scheduler multiplies the learning rate
            by it.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem, schedule: str
    ) -> None:
        self.model, self.optimizer, self.problem = model, optimizer, problem
        self.schedule, self.steps = schedule, 0
        factor = functools.partial(problem.factor, schedule)
        self.scheduler = (
            None
            if schedule == "constant"
            else torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        )

    def step(self, batch: Examples) -> None:
        """One training step."""
        training_step(self.optimizer, self.loss(batch))
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1

    def loss(self, batch: Examples) -> Tensor:
        """The training loss at the present weights."""
        return cross_entropy(self.model(batch.x), batch.y)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model as it is to be evaluated: the same one, or its average."""
        yield self.model

    def values(self) -> tuple[float, float]:
        """η and λ now, η before the schedule."""
        values = hyperparameter_values(self.optimizer)
        return values["lr"], values["weight_decay"]

    @property
    def cost(self) -> float:
        """So far, in plain training steps."""
        return cost_of(self.optimizer, self.steps)

    @property
    def rollbacks(self) -> int:
        """So far."""
        return rollbacks_of(self.optimizer)

    def close(self) -> None:
        """No more steps will follow."""
        close(self.optimizer)


class PlainClock:
    """Times plain training beside a run, so that both see the same load of the machine.

    Args:
        problem: task and seed.
        base: the plain optimizer.
    """

    def __init__(self, problem: Problem, base: str) -> None:
        model = copy.deepcopy(problem.model()).train()
        optimizer = base_optimizer(base, model, PLAIN_LR, weight_decay=1e-4)
        self.trainee = Trainee(model, optimizer, problem, "constant")
        self.seconds, self._timed = 0.0, 0

    def run(self, batch: Examples, steps: int) -> None:
        """Train plainly on one batch for a share of the run's `steps` since the last call."""
        count = max(2, round(CLOCK_SHARE * steps))
        started = time.perf_counter()
        for _ in range(count):
            self.trainee.step(batch)
        self.seconds += time.perf_counter() - started
        self._timed += count

    def estimate(self, steps: int) -> float:
        """Seconds of `steps` plain steps."""
        return self.seconds / max(1, self._timed) * steps


def start_of(run: Run) -> tuple[float, float]:
    """η₀ and λ₀ of a method that takes both."""
    assert run.lr is not None and run.weight_decay is not None
    return run.lr, run.weight_decay
