"""What the graph of a loss says of where it comes from, and what torch says of it."""

from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from .double_backward import missing_derivative
from .errors import UnsupportedError, WindowError
from .slots import FastParameter

#: Derivatives of a normalisation, in a loss, of which torch's own second derivatives are wrong.
_INEXACT = {
    "NativeLayerNormBackwardBackward0": "LayerNorm",
    "NativeBatchNormBackwardBackward0": "BatchNorm or InstanceNorm",
    "CudnnBatchNormBackwardBackward0": "BatchNorm or InstanceNorm",
}


class LossGraph:
    """What an inner or outer loss was computed from, down to the weights that the model holds.

    Args:
        loss: one without a graph says nothing.
        weights: as the model holds them now.

    Cost: one walk over the graph, at the first question.
    """

    def __init__(self, loss: Tensor, weights: Sequence[Tensor]) -> None:
        self._loss, self._weights = loss, weights
        self._fast = [w for w in weights if isinstance(w, FastParameter)]

    @cached_property
    def _seen(self) -> set[Any]:
        return _nodes(self._loss, {w.grad_fn for w in self._weights if w.grad_fn is not None})

    def leaves(self) -> set[int]:
        """Return the ids of the leaves that require a gradient."""
        return {id(node.variable) for node in self._seen if hasattr(node, "variable")}

    def reaches_weights(self) -> bool:
        """Return whether it was computed from one of the weights that train, or several."""
        training = [w for w in self._weights if w.requires_grad]
        present, leaves = self._seen - {None}, self.leaves()
        return any(w.grad_fn in present or id(w) in leaves for w in training)

    def functions(self) -> list[str]:
        """Return the names of the autograd functions in it that are neither torch's nor ours."""
        kinds = {type(node)._forward_cls for node in self._seen if hasattr(node, "_forward_cls")}
        ours = ("torch", __name__.partition(".")[0])
        return sorted(k.__name__ for k in kinds if k.__module__.partition(".")[0] not in ours)

    def check_references(self, former: Set[int] = frozenset()) -> None:
        """Refuse a loss that uses a weight as it was at the window's start, or at `former` leaves.

        Raises:
            WindowError: it does, through an old reference.
        """
        if not self._fast or self.leaves().isdisjoint({id(w.live) for w in self._fast} | former):
            return
        if not self._seen.isdisjoint({w.grad_fn for w in self._fast}):
            raise WindowError(
                "The loss uses a weight as it was when the window opened, from a reference that "
                "was taken before. Take weights from the model in every step: "
                "`model.parameters()`, `model.layer.weight`."
            )

    def check_second_derivatives(self) -> None:
        """Refuse a loss that uses a gradient of which torch's second derivatives are wrong.

        Raises:
            UnsupportedError: names the layer.
        """
        for node in self._seen:
            layer = _INEXACT.get(node.name()) if node is not None else None
            if layer and getattr(node, "_saved_train", True):
                raise UnsupportedError(
                    f"The loss uses a gradient through {layer}, as a gradient penalty does, of "
                    "which torch's second derivatives are wrong. Write the normalisation in "
                    "operations of its own; or call `loss.backward(); step()` with "
                    "`engine=FirstOrder()`, which needs none."
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


def explain(error: RuntimeError, in_closure: bool, has_loss: bool) -> NoReturn:
    """Raise a step's error again, or say what to do about what torch says in its own words.

    Args:
        error: what was raised.
        in_closure: whether the step got a closure.
        has_loss: whether it got anything.

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
    if not has_loss:
        raise WindowError(
            "The outer loss comes from a graph that is used up. The model keeps a tensor from its "
            "last pass, such as a hidden state: let `forward` detach it, or take it as an argument."
        ) from error
    raise WindowError(
        "The loss's graph was used up before its step. `step(loss)` runs backward itself: "
        "remove `loss.backward()`, or make a plain step, `step()`, after it."
    ) from error
