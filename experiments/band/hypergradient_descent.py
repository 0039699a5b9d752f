"""Hypergradient descent on the training loss (Baydin et al. 2018), one step back.

    h_t = −⟨g_t, d_{t−1}⟩,   w_t = w_{t−1} − η d_{t−1}
    additive:        η ← η − β h_t
    multiplicative:  η ← η (1 − β h_t / (‖g_t‖ ‖d_{t−1}‖))

d is the momentum buffer of SGD, or Adam's m̂ / (√v̂ + ε). Nothing keeps η positive.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.band.trainee import Trainee, base_optimizer, start_of
from experiments.loaders import Examples

ADDITIVE = {"sgd": 1e-3, "adamw": 1e-7}  # β in the paper's section 4, for SGD and for Adam
MULTIPLICATIVE = 0.02  # β in the paper's figure on sensitivity


class HypergradientDescent(Trainee):
    """The base optimizer with η moved before every step.

    Args:
        model: to be trained in place.
        optimizer: SGD with momentum, or AdamW.
        problem: task and seed.
        beta: β.
        multiplicative: which of the two rules.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        problem: Problem,
        beta: float,
        multiplicative: bool,
    ) -> None:
        super().__init__(model, optimizer, problem, "constant")
        self.beta, self.multiplicative = beta, multiplicative

    def step(self, batch: Examples) -> None:
        """Move η, then the weights."""
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        if self.steps:
            self._move()
        self.optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def _move(self) -> None:
        (group,) = self.optimizer.param_groups
        inner = grad_square = direction_square = 0.0
        for p in group["params"]:
            direction = _direction(self.optimizer.state[p], group)
            inner += (p.grad * direction).sum().item()
            grad_square += p.grad.square().sum().item()
            direction_square += direction.square().sum().item()
        if self.multiplicative:
            norms = math.sqrt(grad_square * direction_square)
            group["lr"] *= 1 + self.beta * inner / norms if norms else 1.0
        else:
            group["lr"] += self.beta * inner


def _direction(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """d of the latest step, weight decay left out where it is decoupled."""
    if "momentum_buffer" in state:
        buffer: Tensor = state["momentum_buffer"]
        return buffer
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    mean = state["exp_avg"] / (1 - beta1**step)
    root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt()
    return mean / (root + group["eps"])


def build_descent(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """Hypergradient descent by either rule.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: "hd-additive" or "hd-multiplicative", base, η₀ and λ₀.

    Returns:
        What the loop trains.
    """
    multiplicative = run.method == "hd-multiplicative"
    beta = MULTIPLICATIVE if multiplicative else ADDITIVE[run.base]
    bare = base_optimizer(run.base, model, *start_of(run))
    return HypergradientDescent(model, bare, problem, beta, multiplicative)
