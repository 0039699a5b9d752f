"""λ by hypergradients of whole trainings: T steps from the same weights, one move of ρ, again.

`Trainings` is what one consists of in the studies that train on batches of images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.optimizers import build
from experiments.schema import Config
from experiments.tasks import Task


class Trainings:
    """One seed's data, and the losses of trainings of T steps on it.

    Args:
        config: of the run.
        seed: of the split.
        steps: T.
        batch_size: images in each step.
    """

    def __init__(self, config: Config, seed: int, steps: int, batch_size: int) -> None:
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.task: Task = build(OmegaConf.merge(config.task, {"split_seed": seed}))

    def inner_losses(self, model: nn.Module, order: int) -> list[Callable[[], Tensor]]:
        """The loss of each step, on a batch of its own.

        Args:
            model: that is trained.
            order: the seed of the batches.
        """
        x, y = self.task.train
        generator = torch.Generator().manual_seed(order)
        epochs = -(-self.batch_size * self.steps // len(y))
        numbers = torch.cat([torch.randperm(len(y), generator=generator) for _ in range(epochs)])
        batches = numbers.split(self.batch_size)[: self.steps]
        return [functools.partial(self._loss, model, x[batch], y[batch]) for batch in batches]

    @staticmethod
    def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    def outer_loss(self, model: nn.Module) -> Tensor:
        """E: cross-entropy on the validation images."""
        return self._loss(model, *self.task.validation)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """How good the weights are: E, and loss and accuracy on the test images."""
        test = self.task.test
        with torch.no_grad():
            outputs = model(test.x)
            return {
                "validation_loss": self.outer_loss(model).item(),
                "test_loss": cross_entropy(outputs, test.y).item(),
                "test_accuracy": (outputs.argmax(1) == test.y).float().mean().item(),
            }


@dataclass(frozen=True)
class Visit:
    """One training: the λ it had, E at its end, and dE/dλ, each by name."""

    values: dict[str, Tensor]
    outer_loss: float
    hypergradients: dict[str, Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether neither E nor a number of dE/dλ overflowed."""
        total = sum(h.abs().sum().item() for h in self.hypergradients.values())
        return math.isfinite(self.outer_loss + total)


def visit(
    optimizer: hypertorch.HyperOptimizer,
    inner_losses: Sequence[Callable[[], Tensor]],
    outer_loss: Callable[[], Tensor],
    engine: hypertorch.Engine | None = None,
) -> Visit:
    """Train once and differentiate; weights and buffers are then as they were.

    Args:
        optimizer: with the weights to start from, and what is learned.
        inner_losses: one per step.
        outer_loss: E.
        engine: how; default `Unroll()`.
    """
    seen: list[float] = []

    def watched() -> Tensor:
        loss = outer_loss()
        seen.append(loss.item())
        return loss

    found = hypertorch.hypergradient(optimizer, inner_losses, watched, engine)
    values = {name: h().detach().clone() for name, h in optimizer.hyperparameters.items()}
    return Visit(values, seen[0], found)


def move(optimizer: hypertorch.HyperOptimizer, rule: torch.optim.Optimizer, at: Visit) -> None:
    """One step of `rule` along dE/dρ, projected on `bounds`, and λ = c(ρ)."""
    for name, h in optimizer.hyperparameters.items():
        h.raw.grad = h.pull_back(at.hypergradients[name])
    rule.step()
    for h in optimizer.hyperparameters.values():
        h.clamp_()
