"""The outer loss of a classifier at its best temperature: E = min_β CE(β z, y).

Cross-entropy on validation data mixes two things: which class is taken for the likeliest, and how
sure of it the model is. Training data with wrong labels make a good classifier unsure, so that the
λ with the least cross-entropy may be decades below the one with the fewest errors. One number per
batch, the inverse temperature β, takes the sureness out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError

#: Newton's steps, each of which changes β by a factor of two at most, and the range of β · std(z).
_STEPS, _LOWEST, _HIGHEST = 24, 1e-3, 1e3
#: In the place of a class number, what does not count.
_NO_CLASS = -100
#: A step that changes β by less is the last: the next would change it by the square of that.
_SETTLED = 1e-5


def calibrated_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = _NO_CLASS
) -> Tensor:
    r"""Return min_β CE(β z, y) over β ≥ 0: a criterion for the outer loss.

        E = CE(β* z, y),     β* = argmin_β CE(β z, y),     ∂E/∂z = β* ∂CE(β* z, y)/∂(β z)

    It is the same for z and for any multiple of z, so that no hyperparameter is credited with
    larger weights alone, as where wrong training labels have left a good model unsure (which drives
    λ down in nearly every window of five steps). β* is that of
    this batch; at the minimum its own derivative does not count. As in Platt's scaling the targets
    are smoothed, by ε = 1 / (n + 2) for n examples that count, or β* would be infinite for a batch
    without errors. Logits that are worse than none have β* = 0: E is log(classes), its gradient 0.

    Args:
        logits: z, of shape (n, classes) or (n, classes, …). Leave out a class that is never meant:
            logits of −∞, or −1e9, spoil the scale of the others.
        target: y, class numbers of shape (n,) or (n, …). What is no class's number, such as torch's
            −100, does not count.
        ignore_index: a class number that does not count either, such as that of padding.

    Returns:
        E, a scalar; at most the cross-entropy of z itself, up to the smoothing.

    Raises:
        ArgumentError: the shapes are not those of classes and their numbers.

    Cost: one cross-entropy with its gradient, and the softmaxes of z that Newton's method takes,
    five to ten on a CPU, and 24 elsewhere, where nothing waits to see whether β has settled, but
    once for n.

    Example:
        >>> z, y = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
        >>> one, hundred = calibrated_cross_entropy(z, y), calibrated_cross_entropy(100 * z, y)
        >>> bool(torch.isclose(one, hundred))
        True

    References:
        Platt 1999, section 2.2 (smoothed targets); Guo, Pleiss, Sun, Weinberger 2017, section 4.2
        (temperature scaling).
    """
    _check(logits, target)
    target = target.long()
    counts = (target >= 0) & (target < logits.shape[1]) & (target != ignore_index)
    target = torch.where(counts, target, _NO_CLASS)
    smoothing = 1 / (int(counts.sum()) + 2)
    with torch.no_grad():
        beta = _inverse_temperature(logits.detach(), target, smoothing)
    return torch.nn.functional.cross_entropy(
        beta * logits.to(beta.dtype), target, ignore_index=_NO_CLASS, label_smoothing=smoothing
    )


def calibrated_as(criterion: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `calibrated_cross_entropy`, without the class that a criterion says to ignore.

    It says so as torch's do, by `ignore_index`, or as a `functools.partial` with that.
    """
    given = getattr(criterion, "keywords", {}).get("ignore_index", _NO_CLASS)
    ignored = getattr(criterion, "ignore_index", given)
    if not isinstance(ignored, int) or ignored < 0:
        return calibrated_cross_entropy
    return partial(calibrated_cross_entropy, ignore_index=ignored)


def _inverse_temperature(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return β*, by Newton's method on a convex function of one number; 0 where it is too small.

    CE(β z, y) has the derivatives ⟨z⟩_p − ⟨z⟩_q and ⟨z²⟩_p − ⟨z⟩²_p, means over the examples, with
    p = softmax(β z) and q the smoothed targets. What does not count adds nothing at z = 0.
    """
    z, target = logits.movedim(1, -1).flatten(0, -2), target.reshape(-1, 1)
    z = (z - z.mean(1, keepdim=True)).to(torch.promote_types(z.dtype, torch.float32))
    z = z.masked_fill(target == _NO_CLASS, 0.0)
    scale = z.std()
    scale = torch.where(scale > 0, scale, 1.0)
    z = z / scale
    taught = (1 - smoothing) * z.gather(1, target.clamp(min=0)).mean()  # ⟨z⟩_q: z has mean 0
    beta = torch.ones_like(taught)
    for _ in range(_STEPS):
        p = torch.softmax(beta * z, 1)
        mean = (p * z).sum(1)
        variance = ((p * z * z).sum(1) - mean * mean).mean()
        newton = beta - (mean.mean() - taught) / variance.clamp(min=1e-12)
        before = beta
        beta = torch.minimum(torch.maximum(newton, beta / 2), beta * 2).clamp(_LOWEST, _HIGHEST)
        if beta.is_cpu and abs(beta / before - 1) <= _SETTLED:
            break
    return torch.where(beta > _LOWEST, beta / scale, 0.0)


def _check(logits: Tensor, target: Tensor) -> None:
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        raise ArgumentError(
            "`calibrated_cross_entropy` takes two tensors, logits and class numbers. "
            f"Got {type(logits).__name__} and {type(target).__name__}."
        )
    expected = (*logits.shape[:1], *logits.shape[2:])
    if logits.dim() < 2 or logits.shape[1] < 2 or target.shape != expected:
        raise ArgumentError(
            "`calibrated_cross_entropy` takes logits of shape (n, classes, …), two classes or "
            f"more, and class numbers of shape (n, …). Got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}."
        )
    if target.numel() == 0 or target.is_floating_point():
        raise ArgumentError(
            "`calibrated_cross_entropy` takes class numbers, one or more. "
            f"Got {target.numel()} of {target.dtype}."
        )
