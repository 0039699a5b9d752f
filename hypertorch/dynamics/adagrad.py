"""Φ of Adagrad: G_t = G_{t-1} + g_t², w_t = w_{t-1} − η_t g_t / (√G_t + ε).

η_t = η / (1 + (t−1) δ), δ is `lr_decay`; G_0 is `initial_accumulator_value`.
"""

import torch
from torch import Tensor

from ..constraints import positive
from .arithmetic import Buffers, Number, axpy, next_step, regularised, square_root
from .registry import register_dynamics


def adagrad(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    lr: Number,
    lr_decay: Number,
    eps: Number,
    weight_decay: Number,
    initial_accumulator_value: float,
    maximize: bool,
) -> tuple[Tensor, Buffers]:
    """Return (w_t, {t, G_t})."""
    grad = regularised(param, grad, weight_decay, maximize)
    step = next_step(buffers)
    rate = lr / (1 + (step.item() - 1) * lr_decay)
    start = buffers.get("sum")
    start = torch.full_like(grad, initial_accumulator_value) if start is None else start
    total = start + grad * grad
    return axpy(-rate, grad / (square_root(total) + eps), param), {"step": step, "sum": total}


register_dynamics(
    torch.optim.Adagrad,
    adagrad,
    constraints={"lr": positive, "lr_decay": positive, "eps": positive, "weight_decay": positive},
    flags=("initial_accumulator_value", "maximize"),
)
