"""What a pass through a model moves besides s: buffers, hidden states, modes, random numbers.

All of it can be put back, so that a pass leaves no trace, and a step can be made again.
"""

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ModuleBuffers:
    """The buffers of a model's modules (BatchNorm statistics, …) at one moment.

    Cost: one copy of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (module, dict(module._buffers.items()), [*module._non_persistent_buffers_set])
            for module in model.modules()
        ]
        self._copies = [
            _Copy.of(buffer)
            for _, buffers, _ in self._held
            for buffer in buffers.values()
            if buffer is not None
        ]

    def values(self) -> list[Tensor]:
        """Return the copies."""
        return [value for *_, value in self._copies]

    def holding(self, values: Sequence[Tensor]) -> "ModuleBuffers":
        """Return the same buffers with other values to restore, in the same order."""
        other = copy(self)
        pairs = zip(self._copies, values, strict=True)
        other._copies = [saved._replace(value=value) for saved, value in pairs]
        return other

    def restore(self) -> None:
        """Put the same tensors back, with their values at that moment, and no others."""
        _write_back(self._copies)
        for module, buffers, non_persistent in self._held:
            for name in [name for name, _ in module._buffers.items() if name not in buffers]:
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
            _refill(module._non_persistent_buffers_set, non_persistent)


class ModuleAttributes:
    """What modules keep as plain attributes at one moment.

    That is tensors (a hidden state), numbers (a count of calls), tuples, lists, dictionaries, sets
    and deques (terms of a loss), and what is within these. Tensors in a graph and parameters stay
    as they are; what is within modules and other objects is not looked at.

    Cost: one copy of the tensors without a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, _attributes(module)) for module in model.modules()]
        values = [value for _, before in self._saved for value in before.values()]
        self._contents, tensors = _within(values)
        registered = _registered(model) if tensors else set()
        self._copies = [_Copy.of(tensor) for tensor in tensors if id(tensor) not in registered]

    def restore(self) -> None:
        """Let each module hold what it held, with the contents and values of that moment."""
        for module, before in self._saved:
            now = _attributes(module)
            for name in [name for name in now.keys() - before.keys() if _is_kept(now[name])]:
                del vars(module)[name]
            for name, value in before.items():
                found = now.get(name)
                if found is not value and (_is_kept(value) or _is_kept(found)):
                    vars(module)[name] = value
        for held, parts in self._contents:
            _refill(held, parts)
        _write_back(self._copies)


class _Copy(NamedTuple):
    """A tensor, and its version and value at one moment."""

    tensor: Tensor
    version: int
    value: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "_Copy":
        return cls(tensor, tensor._version, tensor.clone())


def _write_back(copies: Iterable[_Copy]) -> None:
    """Give tensors their values at that moment.

    A graph may have saved one, so the version of a tensor that nobody wrote to must not move.
    BatchNorm's kernel writes without moving it, so the value is written all the same.
    """
    with torch.no_grad():
        for tensor, version, value in copies:
            if tensor.shape != value.shape:  # it was resized, or given other `.data`
                tensor.data = torch.empty_like(value)
            (tensor.data if tensor._version == version else tensor).copy_(value)


#: Containers that can be refilled; all that can be looked into; what a pass may not leave behind.
_REFILLED = (list, dict, set, deque)
_CONTAINERS = (*_REFILLED, tuple, frozenset)
_KEPT = (*_CONTAINERS, Tensor, int, float, complex)
#: Types of values that hold no others.
_SCALARS = frozenset({bool, int, float, str, type(None)})
#: What torch itself keeps in a module: parameters, buffers, submodules, hooks, the mode.
_OF_TORCH = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


def _is_kept(value: object) -> bool:
    return isinstance(value, _KEPT)


def _within(values: list[Any]) -> tuple[list[tuple[Any, list[Any]]], list[Tensor]]:
    """Return the containers with their parts, and the plain tensors, at any depth, each once."""
    contents, tensors, seen = [], [], set[int]()
    while values:
        value = values.pop()
        if type(value) in _SCALARS or id(value) in seen:
            continue
        seen.add(id(value))
        if _is_plain(value):
            tensors.append(value)
        elif isinstance(value, _CONTAINERS):
            parts = _parts(value)
            if not _SCALARS.issuperset(map(type, parts)):
                values += parts
            if isinstance(value, _REFILLED):
                contents.append((value, parts))
    return contents, tensors


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor, but in no graph and no parameter, that can be written to."""
    if type(value) is not Tensor or value.requires_grad or value.is_inference():
        return False
    return value.layout is torch.strided and not value.is_nested and 0 not in value.stride()


def _registered(model: nn.Module) -> set[int]:
    """Return the `id`s of a model's parameters and buffers."""
    tensors = (
        (*module._parameters.values(), *module._buffers.values()) for module in model.modules()
    )
    return {id(tensor) for held in tensors for tensor in held}


def _parts(held: Any) -> list[Any]:
    """Return what a container holds; of a dictionary, its keys and then its values."""
    return [*held, *held.values()] if isinstance(held, dict) else [*held]


def _refill(held: Any, parts: list[Any]) -> None:
    """Let a container hold the same objects again, unless it does."""
    now = _parts(held)
    if len(now) == len(parts) and all(map(is_, now, parts)):
        return
    held.clear()
    if isinstance(held, dict):
        half = len(parts) // 2
        held.update(dict(zip(parts[:half], parts[half:], strict=True)))
    else:
        (held.update if isinstance(held, set) else held.extend)(parts)


class ModuleModes:
    """Whether each module of a model trains or is evaluated, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Set each module back to its mode at that moment; a module is slow to write to."""
        for module, training in self._saved:
            if module.training != training:
                module.training = training


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
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Within, modules may be set to train or to evaluate; after, each has its mode of before."""
    modes = ModuleModes(model)
    try:
        yield
    finally:
        modes.restore()


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Within, the model may be used freely; after, what a pass moves besides s is as before."""
    buffers, attributes, randomness = ModuleBuffers(model), ModuleAttributes(model), RandomState()
    with keeping_modes(model):
        try:
            yield
        finally:
            buffers.restore()
            attributes.restore()
            randomness.restore()
