"""Reverse mode that recomputes: α_{t-1} = A_tᵀ α_t along states that were stored, not graphs.

Each step is differentiated by itself, from its state, with the random numbers and module buffers it
was made with. A state that was not stored is found from the one after it, where Φ has an inverse
(SGD with momentum), or by making the steps again from the stored one before it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import check_number
from ..state import Parts, State, by_place
from ..surroundings import ModuleBuffers
from ..transition import Gradients, Linearised, vjp
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
from .inverse_steps import StepBack, check_arrival, is_short, reach
from .recording import Moment, NewMemory, Recording, as_leaves


class Replay(Engine):
    """Exact hypergradient of a window of K steps, in the memory of states instead of graphs.

    The same number as `Unroll`'s, to rounding. It needs closures that return the same loss when
    called again; dropout and BatchNorm replay exactly.

    Args:
        spacing: how many steps lie between two stored states: with 1 (the default) every state is
            stored; with `None` the spacing grows with the window, so that at most 2.4 √K states are
            held (76 at K = 1024).

    Between stored states SGD with momentum goes back by Φ⁻¹, as long as that magnifies rounding 32
    times at most (32 steps at μ = 0.9, 344 at 0.99), the weights are in single or double precision
    and the module buffers small. Where that does not lead to the stored state, and for other
    dynamics, steps are made again from there. With `None` they are too where graphs are small (a
    perceptron's takes a tenth of a state, a convolutional network's may take hundreds), and kept.

    Cost: K training steps, one outer gradient, and for each step a gradient with its graph and a
    Hessian-vector product (about three gradients); one more gradient where steps are made again
    whose graphs are not kept.
    Memory: K / spacing + spacing states, and a step's graph; where Φ⁻¹ is used, K / spacing states
    and the module buffers of each step, which are a 64th of a state at most.

    References:
        Franceschi et al. 2017, eq. (7)-(9); checkpoints as in Griewank 1992 and Shaban et al. 2019;
        Φ⁻¹ of Maclaurin et al. 2015, algorithm 2.
    """

    needs = "closure"

    def __init__(self, spacing: int | None = 1) -> None:
        if spacing is not None:
            expected = "a whole number of steps, at least 1, or None"
            check_number("`spacing` of Replay", spacing, expected, lambda n: n >= 1, int)
        self.spacing = spacing

    def open(self, training: Training, carried: Carried | None = None) -> "ReplayedWindow":
        """Start a recording at the present weights and buffers."""
        return ReplayedWindow(training, self.spacing, self._reach(training))

    def _reach(self, training: Training) -> float:
        """Return how many steps back Φ⁻¹ may go: none is needed where every state is stored."""
        return 0.0 if self.spacing == 1 else reach(training)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1 + 3 K, or K + 1 + 4 K where every step is made again once more."""
        far, spacing = self._reach(training), self.spacing or 1
        if self.spacing is None:
            while math.ceil(horizon / spacing) > _most(spacing, far):
                spacing *= 2
        is_made_once = spacing == 1 or _goes_back(spacing, far)
        return horizon + 1 + (3 if is_made_once else 4) * horizon

    def __repr__(self) -> str:
        return f"Replay(spacing={self.spacing})"


#: States held together at most, over √K, where the spacing grows.
MOST = 2.4

#: Activations of a step, over a state, below which the graphs of a whole segment find room.
SMALL = 0.25


def _goes_back(spacing: int, reach: float) -> bool:
    """Whether Φ⁻¹ finds the states between those that are stored."""
    return reach >= max(1, spacing - 1)


def _most(spacing: int, reach: float) -> int:
    """Return how many states may be stored: steps made again need as many between them."""
    return 4 * spacing if _goes_back(spacing, reach) else max(3, 2 * spacing - 1)


@dataclass
class _Ready:
    """A step that was made again and waits for its adjoint.

    Attributes:
        state: s_{t-1}, in leaves.
        following: s_t, in the graph of s_{t-1} and λ.
        loss: without a graph.
    """

    state: State
    following: State
    loss: Tensor


class ReplayedWindow(LiveWindow):
    """Steps on the live weights, of which some states are kept.

    Attributes:
        states_held: the largest number of states held at one time, so far, graphs that are kept
            for later counted in states.
    """

    def __init__(self, training: Training, spacing: int | None, reach: float) -> None:
        super().__init__(training)
        self._grows, self._spacing = spacing is None, spacing or 1
        self._reach = reach
        self._recording = Recording(training, measures=self._grows and reach > 0)
        self._stored: dict[int, Moment] = {0: self._recording.start}
        self._module_buffers: list[ModuleBuffers] = []  # before each step, for the way back
        self.states_held = 1
        self._graph: float | None = None  # the memory of a step's graph, in states

    def step(self, step: TrainingStep) -> None:
        """Make the step, and store the state before it if its turn has come."""
        t = len(self._recording)
        if t and t % self._spacing == 0:
            self._stored[t] = self._recording.present()
            self.states_held = max(self.states_held, len(self._stored))
        if self._grows and len(self._stored) > _most(self._spacing, self._reach):
            self._thin_out()
        if self._goes_back:
            self._module_buffers.append(self._buffers_now())
        self._recording.make(step)
        if t == 0 and self._grows and self._graphs_are_small():
            self._reach = 0.0

    def _graphs_are_small(self) -> bool:
        """Whether steps are best made again with graphs that are all kept."""
        return self._recording.activations < SMALL * State.of(self.training.optimizer).nbytes

    @property
    def _goes_back(self) -> bool:
        return _goes_back(self._spacing, self._reach)

    def _thin_out(self) -> None:
        """Double the spacing: every other stored state goes."""
        self._spacing *= 2
        self._stored = {t: kept for t, kept in self._stored.items() if t % self._spacing == 0}
        if not self._goes_back:
            self._module_buffers.clear()

    def _buffers_now(self) -> ModuleBuffers:
        """Return a copy of the module buffers, or what there is where there are none."""
        start = self._recording.start.module_buffers
        return ModuleBuffers(self.training.slots.model) if start.values() else start

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ.

        Raises:
            WindowError: a closure is not replayable, or E is another model's.
        """
        with self._recording.made_again():
            values = self.training.values()
            loss, at_end, total = outer_gradient(outer_loss, self.params, values)
            adjoint, end = by_place(at_end), len(self._recording)
            after = State.of(self.training.optimizer)
            for start in sorted(self._stored, reverse=True):
                adjoint, found = self._through_segment(start, end, after, adjoint)
                total, end, after = added(total, found), start, self._stored.pop(start).state
                del self._module_buffers[start:]
            return loss, completed(total, values)

    def _through_segment(
        self, start: int, end: int, after: State, adjoint: Parts
    ) -> tuple[Parts, dict[str, Tensor]]:
        """Take α from `after`, the state at step `end`, to step `start`; also return Σ Bᵀα."""
        if self._has_way_back(start, end, after):
            try:
                return self._along(start, self._back(start, end, after), adjoint)
            except Exception:  # at wrong weights anything is raised: what is real is so again
                pass
        return self._along(start, self._again(start, end), adjoint)

    def _has_way_back(self, start: int, end: int, after: State) -> bool:
        """Whether Φ⁻¹ finds the states between `start` and `end`, one at the least."""
        if not self._goes_back or end - start == 1:
            return False
        stored, steps = self._stored[start].state, range(start + 1, end)
        has_same = [b.keys() for b in stored.buffers] == [b.keys() for b in after.buffers]
        return has_same and is_short(self._recording.transition(t) for t in steps)

    def _along(
        self, start: int, steps: Iterator[_Ready], adjoint: Parts
    ) -> tuple[Parts, dict[str, Tensor]]:
        """Take α through steps, the last one first, down to step `start`."""
        losses, total = [], dict[str, Tensor]()
        for step in steps:
            values = self.training.values()
            adjoint, of_hyperparameters = vjp(
                step.state, values, step.following, adjoint, keeps_graph=False
            )
            total = added(total, of_hyperparameters)
            losses.append(step.loss)
            del step  # its graph goes before there is another
        self._recording.check(reversed(losses), first=start)
        return adjoint, total

    def _back(self, start: int, end: int, after: State) -> Iterator[_Ready]:
        """Yield the steps from `end` back to `start`, of which the first state alone is stored.

        Raises:
            Astray: the way back does not lead there.
        """
        stored, after = self._stored[start], after.copied()
        for t in reversed(range(start + 1, end)):
            back = self._step_back(t, after)
            self._module_buffers[t].restore()
            ready = self._ready(t, back.params, back.state)
            after = ready.state.map(Tensor.detach)
            yield ready
            del ready
        check_arrival(self._step_back(start, after).params, stored.state.params)
        stored.module_buffers.restore()
        yield self._ready_at(start, stored.state)

    def _step_back(self, t: int, after: State) -> StepBack:
        return StepBack(self._recording.transition(t), after, self._recording.moved(t))

    def _again(self, start: int, end: int) -> Iterator[_Ready]:
        """Yield the steps from `end` back to `start`, which are made again from there."""
        waiting = self._segment(start, end)
        for t in reversed(range(start, end)):
            step = waiting.pop()
            if isinstance(step, Moment):
                step.module_buffers.restore()
                step = self._ready_at(t, step.state)
            yield step
            del step

    def _segment(self, start: int, end: int) -> list[Moment | _Ready]:
        """Make the steps from `start` to `end` again, with graphs as far as there is room."""
        recording, moment = self._recording, self._stored[start]
        moment.module_buffers.restore()
        waiting: list[Moment | _Ready] = []
        held = len(self._stored) + end - start - 1.0
        room = MOST * math.sqrt(len(recording)) if self._grows else 0.0
        for t in range(start, end - 1):
            if held + (self._graph or 0.0) <= room:  # the first one is made to measure it
                step, graph = self._measured(t, moment.state)
                state, fits = step.following.map(Tensor.detach), held + graph <= room
                held += graph if fits else 0.0
                waiting.append(step if fits else moment)
            else:
                state, _ = recording.again(t, moment.state)
                waiting.append(moment)
            moment = Moment(state, ModuleBuffers(self.training.slots.model))
        self.states_held = max(self.states_held, math.ceil(held))
        return [*waiting, moment]

    def _measured(self, t: int, state: State) -> tuple[_Ready, float]:
        """Make step `t` from `state`, with its graph; return its memory, in states, too."""
        if self._graph is not None:
            return self._ready_at(t, state), self._graph
        with NewMemory() as memory:
            step = self._ready_at(t, state)
        after = step.following
        self._graph = memory.nbytes(besides=after.parts().values()) / after.nbytes
        return step, self._graph

    def _ready_at(self, t: int, state: State) -> _Ready:
        """Make step `t` from `state`, with its graph."""
        return self._ready(t, state.params, lambda grads: state)

    def _ready(
        self, t: int, params: Sequence[Tensor], state_of: Callable[[Gradients], State]
    ) -> _Ready:
        """Make step `t`, with its graph, from a state that may follow from ∇L at its weights."""
        leaves = as_leaves(params, self.training.slots.params)
        loss = self._recording.loss_again(t, leaves)
        hyperparameters, transition = self.training.hyperparameters, self._recording.transition(t)
        linearised = Linearised(transition, State(leaves, []), loss, hyperparameters)
        free = state_of(linearised.settled_grads()).map(lambda p: p.detach().requires_grad_())
        linearised = linearised.with_buffers(free.buffers)
        return _Ready(linearised.state, linearised.next_state(), loss.detach())

    def close(self) -> Carried | None:
        """Forget the states."""
        self._stored.clear()
        self._module_buffers.clear()
        return None
