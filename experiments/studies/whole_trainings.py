"""λ by hypergradients of whole trainings: T steps from the same weights, one move of ρ, again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hypertorch


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
        h.refresh()
