"""A window's steps as they can be made again: s_t = Φ_t(s_{t-1}, λ) on the same batches and noise.

What is kept of a step is its closure, its Φ_t, and the modules' modes and torch's random numbers as
it began; states are computed again from the start of the window. The live weights are not written
to: a step that is made again has weights of its own, in the model's slots.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import WindowError
from ..hyperparameters import all_at
from ..loss_graph import LossGraph, narrowest
from ..state import State
from ..surroundings import (
    ModuleBuffers,
    ModuleModes,
    TorchRandomState,
    keeping_modes,
    leaving_no_trace,
)
from ..transition import Transition, gradients
from .engine import OuterLoss, Training, TrainingStep


@dataclass(frozen=True)
class Moment:
    """Where steps can go on from: s and the module buffers, which nobody writes to."""

    state: State
    module_buffers: ModuleBuffers


@dataclass(frozen=True)
class _Made:
    """A step: not the `TrainingStep`, which holds the optimizer, and would keep it for ever."""

    transition: Transition
    closure: Callable[[], Tensor]
    modes: ModuleModes
    randomness: TorchRandomState
    loss: Tensor
    moved: list[bool]


#: How far the loss of a step that is made again may be off, of itself and at all, by the precision
#: that it is computed in; a narrower one may be off by one in a hundred.
_TOLERANCES = {torch.float64: (1e-6, 1e-12), torch.float32: (1e-4, 1e-8)}


class Recording:
    """The steps of one window, and how to make them again.

    Args:
        training: what is trained and learned.
        measures: whether to see how much memory the first step's loss holds for its gradient.

    Attributes:
        start: the state before the first step.
        activations: that memory, in bytes.

    Cost: one copy of the state; each step, the modules' modes and the state of torch's random
    number generators.
    """

    def __init__(self, training: Training, measures: bool = False) -> None:
        self.training, self._measures = training, measures
        self.start = self.present()
        self._made: list[_Made] = []
        self.activations, self._precision = 0, torch.float64

    def __len__(self) -> int:
        return len(self._made)

    def present(self) -> Moment:
        """Return a copy of the live state."""
        state = State.of(self.training.optimizer).copied()
        return Moment(state, ModuleBuffers(self.training.slots.model))

    def make(self, step: TrainingStep) -> None:
        """Make a training step on the live weights and record it.

        Raises:
            WindowError: the loss does not depend on the weights.
        """
        modes, randomness = ModuleModes(self.training.slots.model), TorchRandomState()
        is_measured = self._measures and not self._made
        with NewMemory() if is_measured else nullcontext() as memory:
            loss = step.evaluate()
        if memory is not None:
            self.activations = memory.nbytes(besides=[])
        if not self._made:
            self._precision = narrowest(loss)
        grads = gradients(loss, self.training.slots.params)
        step.make(grads)
        assert step.closure is not None
        moved = [grad is not None for grad in grads]
        self._made.append(
            _Made(step.transition, step.closure, modes, randomness, loss.detach(), moved)
        )

    def transition(self, t: int) -> Transition:
        """Return Φ of step number `t`."""
        return self._made[t].transition

    def moved(self, t: int) -> list[bool]:
        """Return whether each parameter had a gradient in step number `t`."""
        return self._made[t].moved

    def loss_again(self, t: int, params: Sequence[Tensor]) -> Tensor:
        """Compute the inner loss of step `t` at other weights, in its modes, with its noise."""
        self._made[t].modes.restore()
        self._made[t].randomness.restore()
        self.training.slots.fill(params)
        return self._made[t].closure()

    def again(self, t: int, state: State) -> tuple[State, Tensor]:
        """Make step `t` from `state`, at the hyperparameters' present values.

        Returns:
            The state after it, without a graph, and the loss before it.
        """
        leaves = as_leaves(state.params, self.training.slots.params)
        loss = self.loss_again(t, leaves)
        grads = gradients(loss, leaves)
        with torch.no_grad():
            return self.transition(t)(state, grads), loss.detach()

    def rerun(self, values: Mapping[str, Tensor]) -> State:
        """Make all steps again from the window's start with other values of the hyperparameters.

        Args:
            values: λ by name; one that is missing keeps its present value.

        Returns:
            s_K; module buffers and modes are those of the model then.
        """
        self.start.module_buffers.restore()
        state = self.start.state
        with all_at(self.training.hyperparameters, values):
            for t in range(len(self)):
                state, _ = self.again(t, state)
        return state

    def outer_loss_at(
        self, state: State, outer_loss: OuterLoss, values: Mapping[str, Tensor]
    ) -> Tensor:
        """Return E at the weights of `state`, without a graph; the model keeps them."""
        slots = self.training.slots
        weights = slots.fill(as_leaves(state.params, slots.params))
        with all_at(self.training.hyperparameters, values), leaving_no_trace(slots.model):
            loss = outer_loss()
            LossGraph(loss, weights).check_references()
            return loss.detach()

    @contextmanager
    def made_again(self) -> Iterator[None]:
        """Within, steps may be made again; after, the model has its live weights and its modes."""
        with keeping_modes(self.training.slots.model):
            try:
                yield
            finally:
                self.training.slots.empty()

    def check(self, losses: Iterable[Tensor], first: int = 0) -> None:
        """Raise if steps, made again with the same λ, had other losses.

        Args:
            losses: of the steps from `first` on, in order.
            first: the number of the first of them.

        Raises:
            WindowError: a closure is not replayable.
        """
        again = list(losses)
        then = [made.loss for made in self._made[first : first + len(again)]]
        pairs = torch.stack([torch.stack(then).flatten(), torch.stack(again).flatten()])
        rtol, atol = _TOLERANCES.get(self._precision, (1e-2, 1e-8))
        for t, (before, now) in enumerate(pairs.T.tolist(), start=first):
            if not abs(now - before) <= max(rtol * abs(before), atol):
                raise WindowError(
                    f"The closure of step {t} of the window returned {before:.6g} when first "
                    f"called and {now:.6g} on replay. Bind its batch: "
                    "functools.partial(loss_fn, x, y), take weights from the model, and draw "
                    "random numbers from torch's global generator."
                )


def as_leaves(params: Sequence[Tensor], live: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights as leaves, differentiable where the live ones train."""
    return [
        p.detach().requires_grad_(own.requires_grad) for p, own in zip(params, live, strict=True)
    ]


class NewMemory(TorchDispatchMode):
    """The memory that was taken within and is still held afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._old: WeakSet[Any] = WeakSet()
        self._new: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note whose memory an operation reads, and whose it made."""
        for storage in _storages((args, kwargs)):
            if storage not in self._new:
                self._old.add(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._old:
                self._new.add(storage)
        return result

    def nbytes(self, besides: Iterable[Tensor]) -> int:
        """Return how many bytes it is, without what `besides` hold."""
        own = WeakSet(_storages(list(besides)))
        return sum(storage.nbytes() for storage in self._new if storage not in own)


def _storages(nested: Any) -> list[Any]:
    tensors = (leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))
    return [t.untyped_storage() for t in tensors if t.layout == torch.strided]
