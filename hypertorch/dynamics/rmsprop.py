"""Φ of RMSprop: v_t = α v_{t-1} + (1 − α) g_t², b_t = μ b_{t-1} + g_t / (√v_t + ε).

w_t = w_{t-1} − η b_t; b_t = g_t / (√v_t + ε) alone where there is no momentum μ. Centred, v_t is
replaced by the variance v_t − ḡ_t², with ḡ_t the running mean of g.
"""

import torch
from torch import Tensor

from ..constraints import positive, unit_interval
from .arithmetic import (
    Buffers,
    Number,
    axpy,
    ema,
    ema_of_square,
    is_active,
    next_step,
    regularised,
    square_root,
)
from .registry import register_dynamics


def rmsprop(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    lr: Number,
    alpha: Number,
    eps: Number,
    weight_decay: Number,
    momentum: Number,
    centered: bool,
    maximize: bool,
) -> tuple[Tensor, Buffers]:
    """Return (w_t, {t, v_t, b_t, ḡ_t}); b is kept with momentum, ḡ when centred."""
    grad = regularised(param, grad, weight_decay, maximize)
    zeros = torch.zeros_like(grad)
    variance = ema_of_square(buffers.get("square_avg", zeros), alpha, grad)
    new = {**buffers, "step": next_step(buffers), "square_avg": variance}
    if centered:
        mean = new["grad_avg"] = ema(buffers.get("grad_avg", zeros), alpha, grad)
        variance = variance - mean * mean
    direction = grad / (square_root(variance) + eps)
    if is_active(momentum):
        direction = axpy(momentum, buffers.get("momentum_buffer", zeros), direction)
        new["momentum_buffer"] = direction
    return axpy(-lr, direction, param), new


register_dynamics(
    torch.optim.RMSprop,
    rmsprop,
    constraints={
        "lr": positive,
        "alpha": unit_interval,
        "eps": positive,
        "weight_decay": positive,
        "momentum": unit_interval,
    },
    flags=("centered", "maximize"),
)
