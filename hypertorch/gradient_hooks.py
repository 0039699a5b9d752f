"""Hooks that a user put on the gradients of weights: `backward` runs them, a window does not."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .errors import UnsupportedError


def refuse_gradient_hooks(model: nn.Module, params: Iterable[Tensor], who: str) -> None:
    """Refuse weights whose gradient a hook may change, for who computes it in another way.

    Raises:
        UnsupportedError: names one, and engines that learn from `.grad` as it is.
    """
    own = set(params)
    for name, param in model.named_parameters():
        if param in own and (param._backward_hooks or param._post_accumulate_grad_hooks):
            raise UnsupportedError(
                f"`{name}` has a hook on its gradient, which {who} would not run. Change the "
                "gradient in the loss or the model (mask the weight itself), or call "
                "`loss.backward(); step()` with `engine=FirstOrder()`."
            )


@contextmanager
def hooks_set_aside(params: Iterable[Tensor]) -> Iterator[None]:
    """Within, a gradient is the derivative itself: no hook of these weights runs."""
    held = [(p, p._backward_hooks) for p in params if p._backward_hooks]
    for param, _ in held:
        param._backward_hooks = None
    try:
        yield
    finally:
        for param, hooks in held:
            param._backward_hooks = hooks
