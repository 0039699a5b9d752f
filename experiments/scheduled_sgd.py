"""Φ of gradient descent with momentum whose η, one number or one per step, and μ are held outside.

v_t = μ v_{t-1} + g_t,  w_t = w_{t-1} − η_t v_t, where η and μ are `Hyperparameter` objects of any
constraint and shape, or fixed numbers. Φ finds them in the param group, as it finds a flag.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import hypertorch

Held = float | Tensor | hypertorch.Hyperparameter


def scheduled_sgd(
    param: Tensor, grad: Tensor, buffers: dict[str, Any], *, lr: Any, rates: Held, momentum: Held
) -> tuple[Tensor, dict[str, Any]]:
    """Return (w_t, {v_t, t})."""
    t = buffers.get("step", 0)
    rate, velocity = _value(rates), grad
    if isinstance(rate, Tensor) and rate.dim():
        rate = rate[t]  # η_t
    if "momentum_buffer" in buffers:
        velocity = _value(momentum) * buffers["momentum_buffer"] + grad
    return param - lr * rate * velocity, {"momentum_buffer": velocity, "step": t + 1}


def _value(held: Held) -> float | Tensor:
    return held() if isinstance(held, hypertorch.Hyperparameter) else held


class ScheduledSGD(torch.optim.Optimizer):
    """Gradient descent with momentum with a learned schedule: one learning rate for each step.

    Args:
        params: of the model; a param group may have `rates` and `momentum` of its own.
        rates: η: a number, or `(T,)` numbers of which step t uses number t. More than T steps are
            an error.
        momentum: μ.
        lr: multiplies η. The library wants every group to have one.

    References:
        Maclaurin et al. 2015, section 3.1.
    """

    def __init__(
        self, params: Iterable[Any], rates: Held, momentum: Held = 0.0, lr: float = 1.0
    ) -> None:
        super().__init__(params, {"lr": lr, "rates": rates, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """w ← Φ(w)."""
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "rates", "momentum")}
            for param in group["params"]:
                if param.grad is not None:
                    new, self.state[param] = scheduled_sgd(
                        param, param.grad, self.state[param], **settings
                    )
                    param.copy_(new)


hypertorch.register_dynamics(
    ScheduledSGD, scheduled_sgd, {"lr": hypertorch.positive}, flags=("rates", "momentum")
)
