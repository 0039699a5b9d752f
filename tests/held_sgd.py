"""An optimizer whose param groups hold η, μ and λ as `Hyperparameter` objects, or as numbers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, optim

from hypertorch import Hyperparameter

HELD = ("rate", "momentum", "decay")


class HeldSGD(optim.Optimizer):
    """b ← μ b + g + λ w, w ← w − η b, where a param group holds η, μ and λ."""

    def __init__(self, params: Iterable[Tensor], **held: Any) -> None:
        super().__init__(params, {"lr": 1.0, **held})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", *HELD)}
            for p in group["params"]:
                new, self.state[p] = held_sgd_step(p, p.grad, self.state[p], **settings)
                p.copy_(new)


def held_sgd_step(param, grad, buffers, *, lr, rate, momentum, decay):
    lag = number(momentum) * buffers.get("lag", torch.zeros_like(param)) + grad
    lag = lag + number(decay) * param
    return param - lr * number(rate) * lag, {"lag": lag}


def number(held):
    return held() if isinstance(held, Hyperparameter) else held
