"""Where a live model keeps its parameters, and how fast weights take their place and hand back."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, WindowError

_NOT_IN_A_WINDOW = (
    "{} has to wait: a window is open, and its graph holds the weight. "
    "Call `optimizer.close()` first."
)


class FastParameter(torch.Tensor):
    """A differentiable weight w_t in a parameter's place: in a graph, yet taken for a Parameter.

    A copy or pickle of a model that holds one gets, in its place, a copy of the live Parameter it
    stands for, with the present value; an optimizer copied along refers to the same one.
    """

    _is_param = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    live: Tensor

    @property
    def grad(self) -> Tensor | None:
        """None: the gradient of a fast weight never accumulates."""
        return None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise WindowError(_NOT_IN_A_WINDOW.format("Giving a weight a gradient"))

    @property
    def data(self) -> Tensor:
        """The value, cut from the graph, which still sees what is written to it."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not _is_all_of(value, self):
            raise WindowError(_NOT_IN_A_WINDOW.format("Moving or replacing a weight (`.data = …`)"))

    @property
    def requires_grad(self) -> bool:
        """Whether it is differentiated; a weight cannot be frozen while its window lasts."""
        return bool(torch.Tensor.requires_grad.__get__(self))  # type: ignore[attr-defined]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if not value:
            raise WindowError(_NOT_IN_A_WINDOW.format("Freezing a weight"))

    def requires_grad_(self, requires_grad: bool = True) -> "FastParameter":
        """Do nothing, or refuse to freeze a weight while its window lasts."""
        self.requires_grad = requires_grad
        return self

    def _value(self) -> Tensor:
        return self.detach().clone().as_subclass(torch.Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = memo[id(self.live)] = nn.Parameter(self._value())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _with_value, (self.live, self._value())


def _is_all_of(value: Tensor, weight: Tensor) -> bool:
    """Whether to assign it changes nothing, as in `weight.data = weight.data`."""
    where, own = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (value, weight))
    return where == own


def _with_value(param: Tensor, value: Tensor) -> Tensor:
    """Return an unpickled parameter, brought to the value of the fast weight in its place."""
    param.data = value
    return param


class Slots:
    """Where a model keeps each parameter of an optimizer; tied parameters have several slots.

    Args:
        model: the live model.
        params: the optimizer's parameters, in order. One that the model no longer has, such as
            that of a head that was replaced, has no slot and gets no gradient.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        self.model = model
        self.params = list(params)
        places: dict[Tensor, list[tuple[nn.Module, str]]] = {p: [] for p in self.params}
        for module in model.modules():
            for name, param in module._parameters.items():
                if param is not None and param in places:
                    places[param].append((module, name))
        self._places = list(places.values())
        self._held = list(self.params)

    def check(self) -> None:
        """Raise if a parameter has no slot: the model is another one, or in a window of another.

        Raises:
            ArgumentError: says how many.
        """
        missing = sum(not slots for slots in self._places)
        held = (p for module in self.model.modules() for p in module._parameters.values())
        if missing and any(isinstance(p, FastParameter) for p in held):
            raise ArgumentError(
                "A window of another HyperOptimizer is open on `model`, which holds its weights. "
                "Call `close()` of that one first."
            )
        if missing:
            raise ArgumentError(
                f"{missing} of the optimizer's {len(self.params)} parameters are not in `model`. "
                "Pass the model that the optimizer was built from."
            )

    def fill(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Put `tensors` into the model; return them as it now holds them.

        Raises:
            WindowError: somebody has put something else there since.
        """
        for before, slots in zip(self._held, self._places, strict=True):
            for module, name in slots:
                if module._parameters.get(name) is not before:
                    what = f"Replacing a weight (`{name}` of a {type(module).__name__})"
                    raise WindowError(_NOT_IN_A_WINDOW.format(what))
        held = [t if t is p else _fast(t, p) for t, p in zip(tensors, self.params, strict=True)]
        for tensor, slots in zip(held, self._places, strict=True):
            for module, name in slots:
                module._parameters[name] = tensor  # type: ignore[assignment]
        self._held = held
        return held

    def empty(self) -> None:
        """Put each live parameter where the model holds a fast weight of it, wherever that is."""
        own = set(self.params)
        for module in self.model.modules():
            for name, held in module._parameters.items():
                if isinstance(held, FastParameter) and held.live in own:
                    module._parameters[name] = held.live
        self._held = list(self.params)

    def hand_back(self, tensors: Sequence[Tensor]) -> None:
        """Put the live parameters back, with the values of `tensors`."""
        with torch.no_grad():
            for param, tensor in zip(self.params, tensors, strict=True):
                if tensor is not param:
                    param.copy_(tensor)
        self.empty()


def _fast(tensor: Tensor, live: Tensor) -> Tensor:
    fast = tensor.as_subclass(FastParameter)
    fast.__dict__.update(vars(live))
    fast.live = live
    return fast
