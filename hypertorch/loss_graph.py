"""What the graph of an inner loss says of where it comes from, and what torch says of it."""

from collections.abc import Sequence, Set
from typing import Any, NoReturn

import torch
from torch import Tensor

from .double_backward import missing_derivative
from .errors import UnsupportedError, WindowError


def check_references(loss: Tensor, fast: Sequence[Tensor], live: Sequence[Tensor]) -> None:
    """Raise if `loss` uses a weight as it was at the window's start, through an old reference.

    Args:
        loss: the inner loss of a step after the window's first.
        fast: the weights as the model holds them now.
        live: the optimizer's parameters, in whose place they are.

    Cost: one walk over the graph of `loss`, down to the present weights.
    """
    replaced = {id(p) for p, w in zip(live, fast, strict=True) if w is not p}
    present = {w.grad_fn for w in fast if w.grad_fn is not None}
    seen = _nodes(loss, present)
    is_old = any(id(getattr(node, "variable", None)) in replaced for node in seen)
    if is_old and not present.isdisjoint(seen):
        raise WindowError(
            "The loss uses a weight as it was when the window opened, from a reference that was "
            "taken before. Take weights from the model in every step: "
            "`model.parameters()`, `model.layer.weight`."
        )


def narrowest(loss: Tensor) -> torch.dtype:
    """Return the narrowest type of float that `loss` is computed in, as within autocast.

    Cost: one walk over its graph.
    """
    held = [m.dtype for node in _nodes(loss) if node for m in node._input_metadata]
    return min((d for d in [loss.dtype, *held] if d.is_floating_point), key=lambda d: d.itemsize)


def _nodes(loss: Tensor, ends: Set[Any] = frozenset()) -> set[Any]:
    """Return the nodes of a loss's graph, those in `ends` and `None` for constants included."""
    seen, ahead = {loss.grad_fn}, [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node in ends or node is None:
            continue
        new = [following for following, _ in node.next_functions if following not in seen]
        seen.update(new)
        ahead += new
    return seen


def explain(error: RuntimeError, in_closure: bool = False) -> NoReturn:
    """Raise a step's error again, or say what to do about what torch says in its own words.

    Args:
        error: what was raised.
        in_closure: whether the step got a closure.

    Raises:
        WindowError: the loss's graph was used up or written to.
        UnsupportedError: it cannot be differentiated twice.
    """
    if said := missing_derivative(error):
        raise UnsupportedError(
            f"{said} Call `loss.backward(); step()` with `engine=FirstOrder()`, which needs none."
        ) from error
    if "modified by an inplace operation" in str(error):
        raise WindowError(
            f"The loss cannot be differentiated any more: {error} A weight may have been written "
            "to, or the window closed, between the loss and its step. Do so after the step."
        ) from error
    if "backward through the graph a second time" not in str(error):
        raise error
    if in_closure:
        raise WindowError(
            "The graph of the closure's loss was used up before its step. `step(closure)` runs "
            "backward itself: leave `backward()` and `zero_grad()` out of the closure, and let it "
            "compute the loss anew."
        ) from error
    raise WindowError(
        "The loss's graph was used up before its step. `step(loss)` runs backward itself: "
        "remove `loss.backward()`, or make a plain step, `step()`, after it."
    ) from error
