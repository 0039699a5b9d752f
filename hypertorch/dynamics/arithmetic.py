"""The few operations Φ is written in, each differentiable in every argument that is a tensor.

A setting is a Python float where it is fixed and a tensor where it is learned.
"""

from typing import Any, cast

import torch
from torch import Tensor

Number = float | Tensor
Buffers = dict[str, Tensor]


def is_active(setting: Number) -> bool:
    """Whether a term with this factor belongs to Φ: a learned factor always does, even at 0."""
    return isinstance(setting, Tensor) or setting != 0


class _Axpy(torch.autograd.Function):
    """y + a x with a scalar a, whose derivative in a is ⟨g, x⟩, by one pass that keeps nothing.

    Autograd's own would write out g ∘ x before it sums, as large as the weights, at every use of
    every learned setting. For a few numbers that is quicker than to ask Python; in half precision
    what it writes out may underflow.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(a, x)
        return torch.addcmul(y, x, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, x = ctx.saved_tensors
        wants_a, wants_x, wants_y = ctx.needs_input_grad
        return (
            torch.dot(grad.flatten(), x.flatten()).to(a.dtype) if wants_a else None,
            grad * a if wants_x else None,
            grad if wants_y else None,
        )


#: Numbers in a tensor below which autograd's own derivative of y + a x takes less time.
FEW = 2**15


def axpy(a: Number, x: Tensor, y: Tensor) -> Tensor:
    """Return y + a x, in one operation."""
    if not isinstance(a, Tensor):
        return torch.add(y, x, alpha=a)
    has_many = x.numel() > FEW or x.dtype in (torch.float16, torch.bfloat16)
    if a.dim() == 0 and x.dtype == y.dtype and has_many:
        return cast(Tensor, _Axpy.apply(a, x, y))
    return torch.addcmul(y, x, a)


def axpy_(a: Number, x: Tensor, y: Tensor) -> Tensor:
    """Add a x to y in place, and return y; for numbers that are in no graph."""
    return y.addcmul_(x, a) if isinstance(a, Tensor) else y.add_(x, alpha=a)


def regularised(param: Tensor, grad: Tensor, weight_decay: Number, maximize: bool) -> Tensor:
    """Return g_t = ±∇L(w) + λ w: minus where L is maximized."""
    grad = -grad if maximize else grad
    return axpy(weight_decay, param, grad) if is_active(weight_decay) else grad


def ema(average: Tensor, decay: Number, x: Tensor) -> Tensor:
    """Return decay · average + (1 − decay) · x, the form `lerp` rounds like."""
    return axpy(1 - decay, x - average, average)


def ema_of_square(average: Tensor, decay: Number, x: Tensor) -> Tensor:
    """Return decay · average + (1 − decay) · x²."""
    return axpy(1 - decay, x * x, decay * average)


def square_root(x: Tensor) -> Tensor:
    """Return √x with derivative 0 at x = 0, where weights that never saw a gradient sit."""
    is_positive = x > 0
    root = torch.where(is_positive, x, torch.ones_like(x)).sqrt()
    return torch.where(is_positive, root, torch.zeros_like(x))


def next_step(buffers: Buffers) -> Tensor:
    """Return the step counter t, counted from 1, as torch keeps it: a scalar on the host."""
    if "step" in buffers:
        return buffers["step"] + 1
    wide = torch.get_default_dtype() == torch.float64
    return torch.ones((), dtype=torch.float64 if wide else torch.float32)
