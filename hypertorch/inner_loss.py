"""What a user hands to `step`: a loss with its graph, a closure that computes one, or gradients.

An engine says which of them it needs in a window; what is given may be more, and must not be less.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_loss
from .double_backward import without_recomputation
from .errors import ArgumentError, WindowError
from .gradient_hooks import hooks_set_aside
from .hypergradients import Engine, OuterLoss
from .surroundings import keeping_modes, leaving_no_trace

WRITTEN_TO = (
    "Weights were written to, frozen or released between the steps of a window, for the third "
    "time. That cuts the window short, and little is learned. Make the change a part of the model "
    "(torch.nn.utils.parametrize), or make it once per `update_every` steps."
)
LEFT_OUT = (
    "The closure returned no loss with a graph and has not called backward: no step is made. "
    "Return the loss, unless the batch is to be left out."
)


class InnerLoss:
    """The inner loss of one training step.

    Args:
        given: a scalar tensor with its graph; a closure that returns one, with or without calling
            backward on it; or `None`, after the user's own `loss.backward()`.
        params: the weights that train.

    Attributes:
        closure: what computes the loss; `None` where a tensor or nothing was given.
        loss: the loss, once it is known.
        has_gradients: whether backward has been called on it.
    """

    def __init__(self, given: Any, params: Sequence[Tensor]) -> None:
        self.params = params
        self.closure: Callable[[], Any] | None = given if callable(given) else None
        self.loss: Tensor | None = None if callable(given) else given
        self.has_gradients = given is None
        if not (self.closure or self.has_gradients):
            check_loss(given, "The inner loss")

    def evaluate(self) -> None:
        """Call the closure, unless it has been, and see whether it calls backward."""
        self._call()
        if self.closure is not None and not self.has_gradients:
            check_loss(self.loss, "The inner loss")

    def _call(self) -> None:
        if self.closure is None or self.loss is not None or self.has_gradients:
            return
        seen: list[Tensor] = []
        trainable = [p for p in self.params if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(seen.append) for p in trainable]
        try:
            with torch.enable_grad():
                self.loss = self.closure()
        finally:
            for hook in hooks:
                hook.remove()
        self.has_gradients = bool(seen)

    def is_left_out(self) -> bool:
        """Whether the closure has neither a loss nor a gradient: a trainer skips its batch.

        A loss without a graph is none. Gradients that were there before are stepped along, as by
        the bare optimizer.
        """
        self._call()
        loss = self.value()
        has_loss = self.loss is not None if loss is None else loss.requires_grad
        if self.closure is None or has_loss or self.has_gradients:
            return False
        self.has_gradients = any(p.grad is not None for p in self.params)
        return not self.has_gradients

    def backward(self) -> None:
        """See that the weights' `.grad` holds the gradient of this loss, and of nothing else."""
        self.evaluate()
        if not self.has_gradients:
            assert self.loss is not None
            for param in self.params:  # zero_grad(), which would cost 1 % of a small net's step
                param.grad = None
            self.loss.backward()
            self.has_gradients = True

    def gradients(self) -> list[Tensor | None]:
        """Return what the weights' `.grad` holds.

        Raises:
            WindowError: none holds anything.
        """
        grads = [p.grad for p in self.params]
        if all(grad is None for grad in grads):
            raise WindowError(
                "There is no gradient to step along. Pass the loss, `step(loss)`, or call "
                "`loss.backward()` on a loss of this optimizer's model first."
            )
        return grads

    def value(self) -> Tensor | None:
        """Return the loss where it is a tensor that can be watched."""
        return self.loss if isinstance(self.loss, Tensor) else None

    def replayable(self) -> Callable[[], Tensor]:
        """Return the closure, which raises unless it returns a scalar with a graph."""
        assert self.closure is not None
        return functools.partial(_with_graph, checked(self.closure, "The inner loss"))

    def suits(self, engine: Engine) -> bool:
        """Whether it is enough for a step of a window.

        Raises:
            ArgumentError: the engine needs a closure, and a loss was given.
        """
        if engine.needs == "closure" and self.loss is not None:
            raise ArgumentError(
                f"`{engine!r}` computes the losses of a window again, and `step` got a tensor. "
                "Pass a closure: `step(functools.partial(loss_fn, x, y))`; or use `Unroll()`."
            )
        if engine.needs == "loss":
            self.evaluate()
        return engine.needs == "gradients" or not self.has_gradients


def _with_graph(closure: Callable[[], Tensor]) -> Tensor:
    with torch.enable_grad():
        return closure()


def checked(loss: OuterLoss, what: str, has_graph: bool = True) -> OuterLoss:
    """Return the same loss, which raises unless it returns a scalar, by default with a graph."""

    def evaluate() -> Tensor:
        value = loss()
        check_loss(value, what, has_graph)
        return value

    return evaluate


def checked_outer(outer_loss: OuterLoss, engine: Engine, model: nn.Module) -> OuterLoss:
    """Return E as a scalar, which raises unless `engine` can use it, and keeps the model's modes.

    What is computed after it, a step made again or `inner_loss`, is in training's modes then.
    """
    loss = checked(outer_loss, "The outer loss", engine.differentiates_outer_loss)

    def evaluate() -> Tensor:
        with keeping_modes(model):
            return loss().reshape(())

    return evaluate


def one_batch(outer_loss: OuterLoss) -> AbstractContextManager[None]:
    """Within, let a `ValidationLoss` return E on one batch, however often it is asked."""
    hold = getattr(outer_loss, "one_batch", None)
    return hold() if hold else nullcontext()


@contextmanager
def guarded(outer_loss: OuterLoss, model: nn.Module) -> Iterator[None]:
    """Within, let an engine use the model for one outer update; after, no trace of it is left."""
    torch.clear_autocast_cache()  # of weights as they were before the step
    unhooked = hooks_set_aside(model.parameters())
    with leaving_no_trace(model), without_recomputation(), unhooked, one_batch(outer_loss):
        yield


def missing_loss(inner: InnerLoss, engine: Engine, horizon: int, is_open: bool) -> str:
    """Return what to say of a step in a window that comes with gradients alone.

    Raises:
        WindowError: the window is open; where it is only due, the step is a plain one.
    """
    instead = "step(loss)" if engine.needs == "loss" else "step(functools.partial(loss_fn, x, y))"
    if inner.closure is not None:
        instead = (
            f"Leave `backward()` and `zero_grad()` out of it: `{instead}` sees to both. Where a "
            "trainer owns the closure, pass `engine=FirstOrder()`, which learns from its gradients."
        )
        if is_open:
            raise WindowError(
                f"A window of {horizon} steps is open, and the closure called backward itself: no "
                f"loss is left to differentiate. {instead}"
            )
        return (
            "The closure called backward itself, which makes a plain step, from which "
            f"{engine!r} learns nothing. {instead}"
        )
    if is_open:
        raise WindowError(
            f"A window of {horizon} steps is open, and `step()` got no loss to differentiate. "
            f"Pass it, `{instead}`, without calling backward; or switch learning off with "
            "`outer=None`."
        )
    return (
        f"`step()` without a loss is a plain step, from which {engine!r} learns nothing. "
        f"Replace `loss.backward(); optimizer.step()` by `optimizer.{instead}`, or pass "
        "`engine=FirstOrder()`."
    )
