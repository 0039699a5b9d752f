"""Φ of stochastic gradient descent: v_t = μ v_{t-1} + (1 − τ) g_t, w_t = w_{t-1} − η v_t.

g_t = ∇L(w_{t-1}) + λ w_{t-1}; μ is `momentum`, τ `dampening`, λ `weight_decay`, η `lr`.
"""

import torch
from torch import Tensor

from ..constraints import positive, unit_interval
from .arithmetic import Buffers, Number, axpy, is_active, regularised
from .registry import register_dynamics


def sgd(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    lr: Number,
    momentum: Number,
    dampening: Number,
    weight_decay: Number,
    nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, Buffers]:
    """Return (w_t, {v_t}); the first v is g itself, undamped, and Nesterov steps along g + μ v."""
    grad = regularised(param, grad, weight_decay, maximize)
    if is_active(momentum):
        buffer, previous = grad, buffers.get("momentum_buffer")
        if previous is not None:
            fresh = (1 - dampening) * grad if is_active(dampening) else grad
            buffer = axpy(momentum, previous, fresh)
        buffers = {**buffers, "momentum_buffer": buffer}
        grad = axpy(momentum, buffer, grad) if nesterov else buffer
    return axpy(-lr, grad, param), buffers


register_dynamics(
    torch.optim.SGD,
    sgd,
    constraints={
        "lr": positive,
        "momentum": unit_interval,
        "dampening": unit_interval,
        "weight_decay": positive,
    },
    flags=("nesterov", "maximize"),
)
