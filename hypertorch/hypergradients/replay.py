"""Reverse mode that recomputes: α_{t-1} = A_tᵀ α_t along states that were stored, not graphs.

Each step is differentiated by itself, from its stored state, with the random numbers and module
buffers it was made with. Between stored states the steps are made again.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from ..errors import check_number
from ..state import Parts, State, by_place
from ..surroundings import ModuleBuffers
from ..transition import Linearised, vjp
from .engine import (
    Carried,
    Engine,
    LiveWindow,
    OuterLoss,
    Training,
    TrainingStep,
    added,
    completed,
    outer_gradient,
)
from .recording import Moment, NewMemory, Recording, as_leaves


class Replay(Engine):
    """Exact hypergradient of a window of K steps, in the memory of states instead of graphs.

    The same number as `Unroll`'s, to rounding. It needs closures that return the same loss when
    called again; dropout and BatchNorm replay exactly.

    Args:
        spacing: how many steps lie between two stored states: with 1 (the default) every state is
            stored and none is computed again; with `None` the spacing grows with the window, so
            that at most 2.4 √K states are held (76 at K = 1024), and each step is made once more:
            with its graph where that fits within this number, and else for its state alone.

    Cost: K training steps, one outer gradient, and for each step a gradient with its graph and a
    Hessian-vector product (about three gradients); with a spacing other than 1, one more gradient,
    which `None` saves where activations are small beside the weights: a perceptron's graph takes a
    tenth of a state, a convolutional network's may take hundreds.
    Memory: K / spacing + spacing states, and the graph of one step.

    References:
        Franceschi et al. 2017, eq. (7)-(9); checkpoints as in Griewank 1992 and Shaban et al. 2019.
    """

    needs = "closure"

    def __init__(self, spacing: int | None = 1) -> None:
        if spacing is not None:
            expected = "a whole number of steps, at least 1, or None"
            check_number("`spacing` of Replay", spacing, expected, lambda n: n >= 1, int)
        self.spacing = spacing

    def open(self, training: Training, carried: Carried | None = None) -> "ReplayedWindow":
        """Start a recording at the present weights and buffers."""
        return ReplayedWindow(training, self.spacing)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1 + 3 K, or K + 1 + 4 K where every step is made again once more."""
        return horizon + 1 + (3 if self.spacing == 1 else 4) * horizon

    def __repr__(self) -> str:
        return f"Replay(spacing={self.spacing})"


#: States held together at most, over √K, where the spacing grows.
MOST = 2.4


@dataclass
class _Ready:
    """A step that was made again and waits for its adjoint.

    Attributes:
        state: s_{t-1}, in leaves.
        following: s_t, in the graph of s_{t-1} and λ.
        loss: without a graph.
        graph: its memory, in states.
    """

    state: State
    following: State
    loss: Tensor
    graph: float


class ReplayedWindow(LiveWindow):
    """Steps on the live weights, of which some states are kept.

    Attributes:
        states_held: the largest number of states held at one time, so far, graphs that are kept
            for later counted in states.
    """

    def __init__(self, training: Training, spacing: int | None) -> None:
        super().__init__(training)
        self._recording = Recording(training)
        self._grows, self._spacing = spacing is None, spacing or 1
        self._stored: dict[int, Moment] = {0: self._recording.start}
        self.states_held = 1
        self._graph: float | None = None  # the memory of a step's graph, in states

    def step(self, step: TrainingStep) -> None:
        """Make the step, and store the state before it if its turn has come."""
        t = len(self._recording)
        if t and t % self._spacing == 0:
            self._stored[t] = self._recording.present()
            self.states_held = max(self.states_held, len(self._stored))
        if self._grows and len(self._stored) >= max(4, 2 * self._spacing):
            self._thin_out()
        self._recording.make(step)

    def _thin_out(self) -> None:
        """Double the spacing: every other stored state goes."""
        self._spacing *= 2
        self._stored = {t: kept for t, kept in self._stored.items() if t % self._spacing == 0}

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ.

        Raises:
            WindowError: a closure is not replayable, or E is another model's.
        """
        with self._recording.made_again():
            values = self.training.values()
            loss, at_end, total = outer_gradient(outer_loss, self.params, values)
            adjoint, end = by_place(at_end), len(self._recording)
            for start in sorted(self._stored, reverse=True):
                adjoint, found = self._through_segment(start, end, adjoint)
                total, end = added(total, found), start
            return loss, completed(total, values)

    def _through_segment(
        self, start: int, end: int, adjoint: Parts
    ) -> tuple[Parts, dict[str, Tensor]]:
        """Take α from step `end` back to step `start`; return it, and Σ Bᵀα on the way."""
        losses, total = [], dict[str, Tensor]()
        waiting = self._segment(start, end)
        for t in reversed(range(start, end)):
            step = waiting.pop()
            if isinstance(step, Moment):
                step.module_buffers.restore()
                step = self._ready(t, step.state)
            values = self.training.values()
            adjoint, of_hyperparameters = vjp(step.state, values, step.following, adjoint)
            total = added(total, of_hyperparameters)
            losses.append(step.loss)
        self._recording.check(reversed(losses), first=start)
        del self._stored[start]
        return adjoint, total

    def _segment(self, start: int, end: int) -> list[Moment | _Ready]:
        """Make the steps from `start` to `end` again, with graphs as far as there is room."""
        recording, moment = self._recording, self._stored[start]
        moment.module_buffers.restore()
        waiting: list[Moment | _Ready] = []
        held = len(self._stored) + end - start - 1.0
        room = MOST * math.sqrt(len(recording)) if self._grows else 0.0
        for t in range(start, end - 1):
            if held + (self._graph or 0.0) <= room:  # the first one is made to measure it
                step = self._ready(t, moment.state, is_measured=self._graph is None)
                state = step.following.map(Tensor.detach)
                fits = held + step.graph <= room
                held += step.graph if fits else 0.0
                waiting.append(step if fits else moment)
            else:
                state, _ = recording.again(t, moment.state)
                waiting.append(moment)
            moment = Moment(state, ModuleBuffers(self.training.slots.model))
        self.states_held = max(self.states_held, math.ceil(held))
        return [*waiting, moment]

    def _ready(self, t: int, state: State, is_measured: bool = False) -> _Ready:
        """Make step `t` from `state`, with its graph, which may be measured."""
        with NewMemory() if is_measured else nullcontext() as memory:
            state = self._leaves(state)
            loss = self._recording.loss_again(t, state.params)
            hyperparameters = self.training.hyperparameters
            linearised = Linearised(self._recording.transition(t), state, loss, hyperparameters)
            following = linearised.next_state()
        del linearised  # ∇L, which few graphs hold
        if memory is not None:
            parts = following.parts().values()
            self._graph = memory.nbytes(besides=parts) / sum(p.nbytes for p in parts)
        return _Ready(state, following, loss.detach(), self._graph or 0.0)

    def _leaves(self, state: State) -> State:
        """Return the state as leaves: weights that train, and all buffers, differentiable."""
        free = state.map(lambda part: part.detach().requires_grad_())
        return State(as_leaves(state.params, self.training.slots.params), free.buffers)

    def close(self) -> Carried | None:
        """Forget the states."""
        self._stored.clear()
        return None
