"""Φ of proximal gradient descent: w_t = S(w_{t-1} − η g_t + μ (w_{t-1} − w_{t-2}), η λ).

S(u, τ) = sign(u) · max(|u| − τ, 0) is the soft threshold, the proximal map of τ‖u‖₁; η is `lr`,
μ `momentum`, λ `l1`. With g_t = ∇L, the fixed point minimises L(w) + λ‖w‖₁: the lasso.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import hypertorch


def proximal_sgd(
    param: Tensor, grad: Tensor, buffers: dict[str, Tensor], *, lr: Any, momentum: Any, l1: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (w_t, {w_t − w_{t-1}})."""
    moved = param - lr * grad
    if "last_move" in buffers:
        moved = moved + momentum * buffers["last_move"]
    new = moved.sign() * torch.relu(moved.abs() - lr * l1)
    return new, {"last_move": new - param}


class ProximalSGD(torch.optim.Optimizer):
    """Gradient descent on L(w) + λ‖w‖₁ whose weights become exactly zero.

    Args:
        params: of the model.
        lr: η > 0, at most 1/‖∇²L‖ without momentum.
        momentum: μ in [0, 1).
        l1: λ > 0.

    References:
        Ochs et al. 2014 (iPiano); with μ = 0, ISTA.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.1, momentum: float = 0.0, l1: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "l1": l1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """w ← Φ(w)."""
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "momentum", "l1")}
            for param in group["params"]:
                if param.grad is not None:
                    new, self.state[param] = proximal_sgd(
                        param, param.grad, self.state[param], **settings
                    )
                    param.copy_(new)


hypertorch.register_dynamics(
    ProximalSGD,
    proximal_sgd,
    {
        "lr": hypertorch.positive,
        "momentum": hypertorch.unit_interval,
        "l1": hypertorch.positive,
    },
)
