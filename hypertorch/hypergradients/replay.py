"""Reverse mode that recomputes: α_{t-1} = A_tᵀ α_t along states that were stored, not graphs.

Each step is differentiated by itself, from its state, with the random numbers and module buffers it
was made with. A state that was not stored is found from the one after it, where Φ has an inverse
(SGD with momentum), or by making the steps again from the stored one before it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..entries import settled, sparse_gradients
from ..errors import check_number
from ..state import Parts, State, by_place
from ..surroundings import ModuleBuffers
from ..transition import Linearised, leaf, vjp
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
    perceptron's takes a tenth of a state, a convolutional network's may take hundreds), and kept,
    in one graph for as many steps as there is room for.

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

    def prepare(self, training: Training) -> None:
        """Let a λ of many numbers in the loss be differentiated where it is indexed alone."""
        training.expect_rows()

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
    """Steps in a row that were made again and wait for their adjoint, in one graph.

    Attributes:
        state: s before the first of them, in leaves.
        following: s after the last, in the graph of `state` and λ.
        losses: of each, without a graph.
        is_closed: whether a loss uses leaves of its own, so that no step may follow: who
            differentiates a later loss in these is to see the weights, not how they came about.
    """

    state: State
    following: State
    losses: list[Tensor]
    is_closed: bool = False


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
                with sparse_gradients():
                    adjoint, found = self._through_segment(start, end, after, adjoint)
                total, end, after = added(total, found), start, self._stored.pop(start).state
                del self._module_buffers[start:]
            return loss, settled(completed(total, values))

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
        """Take α through steps, the last ones first, down to step `start`."""
        losses, total = list[Tensor](), dict[str, Tensor]()
        for step in steps:
            values = self.training.values()
            adjoint, of_hyperparameters = vjp(
                step.state, values, step.following, adjoint, keeps_graph=False
            )
            total = added(total, of_hyperparameters)
            losses += reversed(step.losses)
            del step  # what is left of its graph goes before there is another
        self._recording.check(reversed(losses), first=start)
        return adjoint, total

    def _back(self, start: int, end: int, after: State) -> Iterator[_Ready]:
        """Yield the steps from `end` back to `start`, of which the first state alone is stored.

        Raises:
            Astray: the way back does not lead there.
        """
        stored, after = self._stored[start], after.copied()
        for t in reversed(range(start + 1, end)):
            step = self._step_before(t, after)
            after = step.state.map(Tensor.detach)
            yield step
            del step
        check_arrival(self._step_back(start, after).params, stored.state.params)
        stored.module_buffers.restore()
        yield self._step_at(start, stored.state)

    def _step_before(self, t: int, after: State) -> _Ready:
        """Make step `t`, with its graph, from the state that Φ⁻¹ finds before `after`."""
        back = self._step_back(t, after)
        self._module_buffers[t].restore()
        params = as_leaves(back.params, self.training.slots.params)
        loss = self._recording.loss_again(t, params)
        linearised = self._linearised(t, State(params, []), loss)
        buffers = back.state(linearised.settled_grads()).map(leaf).buffers
        linearised = linearised.with_buffers(buffers)
        return _Ready(linearised.state, linearised.next_state(), [loss.detach()])

    def _step_back(self, t: int, after: State) -> StepBack:
        return StepBack(self._recording.transition(t), after, self._recording.moved(t))

    def _again(self, start: int, end: int) -> Iterator[_Ready]:
        """Yield the steps from `end` back to `start`, which are made again from there."""
        waiting, t = self._segment(start, end), end
        while waiting:
            steps = waiting.pop()
            if isinstance(steps, Moment):
                steps.module_buffers.restore()
                steps = self._step_at(t - 1, steps.state)
            t -= len(steps.losses)
            yield steps
            del steps

    def _segment(self, start: int, end: int) -> list[Moment | _Ready]:
        """Make the steps from `start` to `end` again, in one graph as far as there is room.

        The last one needs its graph at once, so that there is always room for that.
        """
        moment, t = self._stored[start], start
        moment.module_buffers.restore()
        state, graphs, moments = moment.state, list[_Ready](), list[Moment]()
        held = len(self._stored) + end - start - 1.0
        room = MOST * math.sqrt(len(self._recording)) if self._grows else 0.0
        while t < end - 1 and held + (self._graph or 0.0) <= room:
            held += self._measured(graphs, t, state)
            state, t = graphs[-1].following.map(Tensor.detach), t + 1
        if graphs and held > room:  # the first one was made to measure it
            graphs, moments = [], [moment]
        elif t == end - 1:
            self._join(graphs, t, state)
            t = end
        while t < end:
            moments.append(Moment(state, ModuleBuffers(self.training.slots.model)))
            if t < end - 1:
                state, _ = self._recording.again(t, state)
            t += 1
        self.states_held = max(self.states_held, math.ceil(held))
        return [*graphs, *moments]

    def _measured(self, graphs: list[_Ready], t: int, state: State) -> float:
        """Make step `t` from `state`, join it to `graphs`; return its graph's memory, in states."""
        if self._graph is None:
            with NewMemory() as memory:
                self._join(graphs, t, state)
            after = graphs[-1].following
            self._graph = memory.nbytes(besides=after.parts().values()) / after.nbytes
        else:
            self._join(graphs, t, state)
        return self._graph

    def _join(self, graphs: list[_Ready], t: int, state: State) -> None:
        """Make step `t` from `state` as a part of the last of `graphs`, or of a new one."""
        if not graphs or graphs[-1].is_closed:
            graphs.append(self._from(state))
        self._extend(graphs[-1], t)

    def _from(self, state: State) -> _Ready:
        """Return no step yet, from leaves."""
        params = as_leaves(state.params, self.training.slots.params)
        leaves = State(params, state.map(leaf).buffers)
        return _Ready(leaves, leaves, [])

    def _extend(self, steps: _Ready, t: int) -> None:
        """Make step `t` after other steps, in their graph."""
        loss = self._recording.loss_again(t, steps.following.params)
        linearised = self._linearised(t, steps.following, loss)
        weights, values = steps.following.params, self.training.values().values()
        steps.is_closed = not linearised.leaves() <= {id(leaf) for leaf in (*weights, *values)}
        steps.following = linearised.next_state()
        steps.losses.append(loss.detach())

    def _step_at(self, t: int, state: State) -> _Ready:
        """Make step `t` from `state`, in a graph of its own."""
        step = self._from(state)
        self._extend(step, t)
        return step

    def _linearised(self, t: int, state: State, loss: Tensor) -> Linearised:
        transition = self._recording.transition(t)
        return Linearised(transition, state, loss, self.training.settings)  # no ∂L/∂λ besides

    def close(self) -> Carried | None:
        """Forget the states."""
        self._stored.clear()
        self._module_buffers.clear()
        return None
