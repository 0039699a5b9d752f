"""Φ of stochastic gradient descent: v_t = μ v_{t-1} + (1 − τ) g_t, w_t = w_{t-1} − η v_t.

g_t = ∇L(w_{t-1}) + λ w_{t-1}; μ is `momentum`, τ `dampening`, λ `weight_decay`, η `lr`.

With momentum the way back is explicit (Maclaurin et al. 2015, algorithm 2):
w_{t-1} = w_t + η v_t, v_{t-1} = (v_t − (1 − τ) g_t) / μ. Each step back magnifies errors 1/μ times
at most while training is stable: det A_t = μ in each direction, and no factor of it exceeds 1.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..constraints import positive, unit_interval
from .arithmetic import Buffers, Number, axpy, axpy_, is_active, regularised
from .registry import Inverse, register_dynamics


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


def param_before(param: Tensor, buffers: Buffers, *, lr: Number, **_: Any) -> Tensor:
    """Return w_{t-1}, from w_t and v_t, in the place of w_t."""
    return axpy_(lr, buffers["momentum_buffer"], param)


def buffers_before(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    momentum: Number,
    dampening: Number,
    weight_decay: Number,
    maximize: bool,
    **_: Any,
) -> Buffers:
    """Return {v_{t-1}}, from w_{t-1}, ∇L(w_{t-1}) and v_t, in the place of v_t."""
    buffer, damped = buffers["momentum_buffer"], 1 - dampening
    axpy_(damped if maximize else -damped, grad, buffer)
    if is_active(weight_decay):
        axpy_(-damped * weight_decay, param, buffer)
    return {**buffers, "momentum_buffer": buffer.div_(momentum)}


def growth(*, momentum: Number, nesterov: bool, **_: Any) -> Number:
    """Return 1/μ; Nesterov's w_{t-1} has no explicit form."""
    if nesterov or not is_active(momentum):
        return math.inf
    return 1 / momentum


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
    inverse=Inverse(param_before, buffers_before, growth),
)
