"""Φ of Adam and its kin: m_t = β₁ m_{t-1} + (1 − β₁) g_t, v_t = β₂ v_{t-1} + (1 − β₂) g_t².

Adam and AdamW step by −η m̂_t / (√v̂_t + ε), hats marking the bias corrections 1 − βᵗ; NAdam looks
ahead by its momentum schedule; RAdam rectifies the variance of the adaptive rate.
"""

from typing import cast

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


def _moments(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    lr: Number,
    beta1: Number,
    beta2: Number,
    weight_decay: Number,
    maximize: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Buffers]:
    """Return w, decayed if λ is decoupled (w − η λ w), g_t, and the new t, m_t and v_t."""
    if decoupled and is_active(weight_decay):
        param = param * (1 - lr * weight_decay)
    grad = regularised(param, grad, 0.0 if decoupled else weight_decay, maximize)
    zeros = torch.zeros_like(grad)
    new = {
        "step": next_step(buffers),
        "exp_avg": ema(buffers.get("exp_avg", zeros), beta1, grad),
        "exp_avg_sq": ema_of_square(buffers.get("exp_avg_sq", zeros), beta2, grad),
    }
    return param, grad, new


def adam(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, Buffers]:
    """Return (w_t, {t, m_t, v_t}); `amsgrad` divides by the root of the largest v so far."""
    param, grad, new = _moments(
        param, grad, buffers, lr, beta1, beta2, weight_decay, maximize, decoupled_weight_decay
    )
    t, exp_avg, exp_avg_sq = new["step"].item(), new["exp_avg"], new["exp_avg_sq"]
    second = exp_avg_sq
    if amsgrad:
        largest = buffers.get("max_exp_avg_sq", torch.zeros_like(param))
        second = new["max_exp_avg_sq"] = torch.maximum(largest, exp_avg_sq)
    denominator = square_root(second) / (1 - beta2**t) ** 0.5 + eps
    return axpy(-lr / (1 - beta1**t), exp_avg / denominator, param), new


def nadam(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    momentum_decay: Number,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, Buffers]:
    """Return (w_t, {t, m_t, v_t, Πμ}), with μ_t = β₁ (1 − ½ · 0.96^(t ψ)), ψ `momentum_decay`.

    References:
        Dozat 2016, algorithm 2; torch's products of μ start at 1.
    """
    param, grad, new = _moments(
        param, grad, buffers, lr, beta1, beta2, weight_decay, maximize, decoupled_weight_decay
    )
    t, exp_avg, exp_avg_sq = new["step"].item(), new["exp_avg"], new["exp_avg_sq"]
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = _times(buffers.get("mu_product", torch.ones_like(new["step"])), mu)
    product_now = product if isinstance(mu, Tensor) else product.item()
    denominator = square_root(exp_avg_sq / (1 - beta2**t)) + eps
    param = axpy(-lr * (1 - mu) / (1 - product_now), grad / denominator, param)
    param = axpy(-lr * mu_next / (1 - product_now * mu_next), exp_avg / denominator, param)
    return param, {**new, "mu_product": product}


def _times(product: Tensor, mu: Number) -> Tensor:
    """Return Πμ, on μ's device and in its precision once μ is learned."""
    return product.to(mu) * mu if isinstance(mu, Tensor) else product * mu


def radam(
    param: Tensor,
    grad: Tensor,
    buffers: Buffers,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, Buffers]:
    """Return (w_t, {t, m_t, v_t}): SGD with momentum until ρ_t > 5, rectified Adam afterwards.

    The hypergradient of β₂ is that of the branch taken; where ρ_t crosses 5 there is none.

    References:
        Liu et al. 2020, algorithm 2; as in torch, ε is added to √v before the bias correction.
    """
    param, grad, new = _moments(
        param, grad, buffers, lr, beta1, beta2, weight_decay, maximize, decoupled_weight_decay
    )
    t, exp_avg, exp_avg_sq = new["step"].item(), new["exp_avg"], new["exp_avg_sq"]
    correction2 = 1 - beta2**t
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / correction2
    size = -lr / (1 - beta1**t)
    adaptive = correction2**0.5 / (square_root(exp_avg_sq) + eps)
    if isinstance(rho, Tensor):
        is_tractable = rho > 5
        six = torch.full_like(rho, 6.0)  # any value at which r_t has a derivative
        safe = (torch.where(is_tractable, value, six) for value in (rho, rho_inf))
        scale = torch.where(is_tractable, _rectifier(*safe) * adaptive, 1.0)
        return axpy(size, exp_avg * scale, param), new
    if rho > 5:
        exp_avg = exp_avg * _rectifier(rho, rho_inf) * adaptive
    return axpy(size, exp_avg, param), new


def _rectifier(rho: Number, rho_inf: Number) -> Number:
    """Return r_t = √((ρ−4)(ρ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρ))."""
    ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return cast(Number, ratio**0.5)


_SHARED = {
    "lr": positive,
    "beta1": unit_interval,
    "beta2": unit_interval,
    "eps": positive,
    "weight_decay": positive,
}
_FLAGS = ("maximize", "decoupled_weight_decay")

register_dynamics(torch.optim.Adam, adam, constraints=_SHARED, flags=("amsgrad", *_FLAGS))
register_dynamics(torch.optim.AdamW, adam, constraints=_SHARED, flags=("amsgrad", *_FLAGS))
register_dynamics(
    torch.optim.NAdam, nadam, constraints={**_SHARED, "momentum_decay": positive}, flags=_FLAGS
)
register_dynamics(torch.optim.RAdam, radam, constraints=_SHARED, flags=_FLAGS)
