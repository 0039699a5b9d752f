"""s = (params, buffers of the optimizer), and what else a training step may touch.

Where a live model keeps its parameters, how fast weights take their place and hand back to them,
snapshots to return to, and passes through a model that leave no trace.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, WindowError

#: Buffers that torch keeps on the host, whatever the device of the weights.
HOST_BUFFERS = ("step", "mu_product")


_NOT_IN_A_WINDOW = (
    "{} has to wait: a window is open, and its graph holds the weight. "
    "Call `optimizer.close()` first."
)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of all param groups, in order: how everything here counts them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class State:
    """s = (params, buffers of the optimizer), one entry per parameter, in the optimizer's order.

    Attributes:
        params: the weights.
        buffers: of each parameter, under torch's own keys; empty before its first step.
    """

    params: list[Tensor]
    buffers: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "State":
        """Return the live tensors themselves, not copies."""
        params = params_of(optimizer)
        return cls(params, [dict(optimizer.state.get(p, {})) for p in params])

    def parts(self) -> "Parts":
        """Return every tensor that s can be differentiated in: all but the step counters."""
        params = {(i, "param"): p for i, p in enumerate(self.params)}
        return params | {
            (i, key): value
            for i, buffers in enumerate(self.buffers)
            for key, value in buffers.items()
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step"
        }

    def replaced(self, parts: "Parts") -> "State":
        """Return this state with other tensors in the place of some of its parts."""
        params = [parts.get((i, "param"), p) for i, p in enumerate(self.params)]
        buffers = [
            {key: parts.get((i, key), value) for key, value in old.items()}
            for i, old in enumerate(self.buffers)
        ]
        return State(params, buffers)

    def copied(self) -> "State":
        """Return copies without a graph, of the step counters too: torch writes to them."""
        with torch.no_grad():
            buffers = [
                {key: v.clone() if isinstance(v, Tensor) else v for key, v in old.items()}
                for old in self.buffers
            ]
            return State([p.clone() for p in self.params], buffers)

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Return the state with `function` of every part."""
        return self.replaced({place: function(part) for place, part in self.parts().items()})


#: Tensors by their place in a state: (position of the parameter, "param" or the buffer's key).
Parts = dict[tuple[int, str], Tensor]


class FastParameter(torch.Tensor):
    """A differentiable weight w_t in a parameter's place: in a graph, yet taken for a Parameter.

    A copy or pickle of a model that holds one gets, in its place, a copy of the live Parameter it
    stands for, with the present value; an optimizer copied along refers to the same one.
    """

    _is_param = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    live: Tensor

    @property
    def grad(self) -> None:  # type: ignore[override]
        """None: the gradient of a fast weight never accumulates."""
        return None

    @property
    def data(self) -> Tensor:
        """The value, cut from the graph, which still sees what is written to it."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:
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


def _with_value(param: Tensor, value: Tensor) -> Tensor:
    """Return an unpickled parameter, brought to the value of the fast weight in its place."""
    param.data = value
    return param


class Slots:
    """Where a model keeps each parameter of an optimizer; tied parameters have several slots.

    Args:
        model: the live model.
        params: the optimizer's parameters, in order.

    Raises:
        ArgumentError: one of them is not in `model`.
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
        missing = sum(not slots for slots in self._places)
        if missing:
            raise ArgumentError(
                f"{missing} of the optimizer's {len(self.params)} parameters are not in `model`. "
                "Pass the model that the optimizer was built from."
            )

    def fill(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Put `tensors` into the model; return them as it now holds them."""
        held = [t if t is p else _fast(t, p) for t, p in zip(tensors, self.params, strict=True)]
        for tensor, slots in zip(held, self._places, strict=True):
            for module, name in slots:
                module._parameters[name] = tensor  # type: ignore[assignment]
        return held

    def hand_back(self, tensors: Sequence[Tensor]) -> None:
        """Put the live parameters back, with the values of `tensors`."""
        with torch.no_grad():
            for param, tensor in zip(self.params, tensors, strict=True):
                if tensor is not param:
                    param.copy_(tensor)
        self.fill(self.params)


def _fast(tensor: Tensor, live: Tensor) -> Tensor:
    fast = tensor.as_subclass(FastParameter)
    fast.live = live
    return fast


def set_state(optimizer: torch.optim.Optimizer, buffers: Sequence[Mapping[str, Any]]) -> None:
    """Give a live optimizer its buffers, parameter by parameter, cut from the graph."""
    params = params_of(optimizer)
    for param, state in zip(params, buffers, strict=True):
        if state:
            optimizer.state[param] = {k: _settled(k, v) for k, v in state.items()}


def _settled(key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key in HOST_BUFFERS:
        wide = torch.get_default_dtype() == torch.float64
        return value.detach().to("cpu", torch.float64 if wide else torch.float32, copy=True)
    return value.detach().clone()


class Snapshot:
    """The values of s and of the module buffers at one moment, to return to.

    Args:
        optimizer: the bare optimizer, with the present weights and buffers.
        module_buffers: as they were before the forward pass of the step that comes next.

    Attributes:
        state: copies of s, to be read alone.

    Cost: one copy of the weights and of the optimizer's buffers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module_buffers: "ModuleBuffers") -> None:
        self.state = State.of(optimizer).copied()
        self._params = params_of(optimizer)
        self._module_buffers = module_buffers

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Write everything back; the snapshot stays usable."""
        with torch.no_grad():
            for param, value in zip(self._params, self.state.params, strict=True):
                param.copy_(value)
        buffers = zip(self._params, State([], self.state.buffers).copied().buffers, strict=True)
        optimizer.state.clear()
        optimizer.state.update({param: own for param, own in buffers if own})
        self._module_buffers.restore()


class ModuleBuffers:
    """The buffers of a model's modules (BatchNorm statistics, …) at one moment.

    Cost: one copy of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (module, name, buffer, buffer._version, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def values(self) -> list[Tensor]:
        """Return the copies."""
        return [value for *_, value in self._saved]

    def holding(self, values: Sequence[Tensor]) -> "ModuleBuffers":
        """Return the same buffers with other values to restore, in the same order."""
        other = copy(self)
        pairs = zip(self._saved, values, strict=True)
        other._saved = [(*saved[:-1], value) for saved, value in pairs]
        return other

    def restore(self) -> None:
        """Put the same tensors back, with their values at that moment.

        A graph may have saved one, so the version of a buffer that nobody wrote to must not move.
        BatchNorm's kernel writes without moving it, so the value is written all the same.
        """
        with torch.no_grad():
            for module, name, buffer, version, value in self._saved:
                (buffer.data if buffer._version == version else buffer).copy_(value)
                module._buffers[name] = buffer


class TorchRandomState:
    """The state of torch's global random number generators."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Set them back to that state."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class RandomState(TorchRandomState):
    """The state of every global random number generator: torch's, `random`'s and numpy's."""

    def __init__(self) -> None:
        super().__init__()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy.random")  # imported by its first use: no state before
        self._numpy = numpy.get_state() if numpy else None

    def restore(self) -> None:
        """Set every generator back to that state."""
        super().restore()
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Within, the model may be used freely; after, its modes, buffers and the RNG are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers, randomness = ModuleBuffers(model), RandomState()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        buffers.restore()
        randomness.restore()
