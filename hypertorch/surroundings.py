"""What a pass through a model moves besides s: buffers, hidden states, modes, random numbers.

All of it can be put back, so that a pass leaves no trace, and a step can be made again.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn


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
        self._missing = [
            (module, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is None
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
        for module, name in self._missing:
            module._buffers[name] = None


class ModuleAttributes:
    """What modules keep as plain attributes at one moment.

    That is tensors (a hidden state), numbers (a count of calls), lists and dictionaries (terms of a
    loss).
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, _attributes(module)) for module in model.modules()]
        self._contents = [
            (held, held.copy())
            for _, before in self._saved
            for held in before.values()
            if type(held) in (list, dict)
        ]

    def restore(self) -> None:
        """Let each module hold what it held, and lists and dictionaries hold what they did."""
        for module, before in self._saved:
            now = _attributes(module)
            for name in [name for name in now.keys() - before.keys() if _is_kept(now[name])]:
                del vars(module)[name]
            for name, value in before.items():
                found = now.get(name)
                if found is not value and (_is_kept(value) or _is_kept(found)):
                    vars(module)[name] = value
        for held, content in self._contents:
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(content)


#: What torch itself keeps in a module: parameters, buffers, submodules, hooks, the mode.
_OF_TORCH = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


def _is_kept(value: object) -> bool:
    is_plain = isinstance(value, (int, float)) or type(value) in (list, dict)
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return is_plain or any(isinstance(part, Tensor) for part in parts)


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
