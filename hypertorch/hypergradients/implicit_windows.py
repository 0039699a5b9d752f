"""The windows of `Implicit`: training steps, of which one is differentiated where it would rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..double_backward import TwiceDifferentiable
from ..state import State, set_state
from ..surroundings import leaving_no_trace
from ..transition import Linearised, Transition
from .averages import average_of, carried_on, weights_at
from .engine import (
    Carried,
    OuterLoss,
    Training,
    TrainingStep,
    Window,
    added,
    completed,
    outer_gradient,
)
from .linear_system import length

if TYPE_CHECKING:
    from .implicit import Implicit


@dataclass(frozen=True)
class Report:
    """How good the latest hypergradient of an `Implicit` is.

    Attributes:
        residual: ‖∂_s E − M v‖₂ / ‖∂_s E‖₂ of the linear system.
        converged: whether that reached the solver's tolerance.
        products: with M and Mᵀ, each about two gradients.
        displacement: ‖Φ(s) − w‖₂ / ‖w‖₂ of the step that was differentiated: 0 at a fixed point.
        gap: E(s*) − E to first order, in E's units: what E would gain if training went on to its
            fixed point. Near 0, or the point is none; a mini-batch's differs from the data's.
    """

    residual: float
    converged: bool
    products: int
    displacement: float
    gap: float


class ImplicitWindow(Window):
    """Training steps of which the last one is differentiated, at its fast weights.

    A step's graph refers to the weights it was computed from, so these are not written to: later
    weights are in the model's slots, without a graph, until the window closes.
    """

    def __init__(self, engine: "Implicit", training: Training, carried: Carried | None) -> None:
        super().__init__(training)
        self._engine = engine
        self._state = State.of(training.optimizer)
        self._adjoint: list[Tensor] | None = (carried or {}).get("adjoint")
        self._transition: Transition | None = None
        self._linearised: Linearised | None = None
        self._average = average_of(engine.average, training, carried)

    def step(self, step: TrainingStep) -> None:
        """Make the step s_t = Φ_t(s_{t-1}, λ), and keep it as the one to differentiate."""
        self._transition = step.transition
        self._linearised = self._at(step.with_graph())
        grads = self._linearised.settled_grads()
        step.check(grads)
        with torch.no_grad():
            following = step.transition(self._state, grads)
        trained = [
            w if w is p else w.requires_grad_()
            for w, p in zip(following.params, self.params, strict=True)
        ]
        self.params = self.training.slots.fill(trained)
        self._state = State(self.params, following.buffers)

    def _at(self, loss: Tensor) -> Linearised:
        assert self._transition is not None
        return Linearised(self._transition, self._state, loss, self.training.hyperparameters)

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ; the engine's `last` says how good it is.

        All of dE/dλ is NaN where E, its gradient or that of the inner loss is not finite.

        Raises:
            SolverError: the linear system is not what the solver needs.
            WindowError: E is another model's.
        """
        values = self.training.values()
        with weights_at(self._average, self.params, self.training.slots) as params:
            loss, at_weights, direct = outer_gradient(
                outer_loss, params, values, self._engine.average
            )
            present = self._present(params)
            system = self._engine.system(present)
        rhs = system.rhs(at_weights)
        size = length(rhs)
        at_loss = length(g for g in system.linearised.grads if g is not None)
        if not math.isfinite(loss.item() + size + at_loss):
            return loss, {n: torch.full_like(v, math.nan) for n, v in values.items()}
        found = self._engine.solve(system, rhs, self._adjoint)
        self._adjoint = found.value
        self.unforeseen = 2.0 * (found.products - self._engine.solver.max_steps)
        self._engine.last = Report(
            residual=found.residual / (size or 1.0),
            converged=found.converged,
            products=found.products,
            displacement=_displacement(present),
            gap=system.gap(found.value).item(),
        )
        through = system.pulled_back(found.value)
        return loss, completed(added(direct, through), values)

    def _present(self, params: Sequence[Tensor]) -> Linearised:
        """Return the step to differentiate: the last one."""
        assert self._linearised is not None
        return self._linearised

    def close(self) -> Carried | None:
        """Write weights and buffers to the live parameters and optimizer; v goes on."""
        self._linearised = None
        self.training.slots.hand_back(self.params)
        set_state(self.training.optimizer, self._state.buffers)
        return self._carried()

    def _carried(self) -> Carried | None:
        goes_on = self._engine.warm_start and self._adjoint is not None
        return {"adjoint": self._adjoint} if goes_on else None


class LiveImplicitWindow(ImplicitWindow):
    """Training steps on the live weights; what is differentiated is a step along `inner_loss`.

    With an average β that is a step from the averaged weights w̄, at which E is taken too.
    """

    def step(self, step: TrainingStep) -> None:
        """Make the step by the optimizer itself."""
        self._transition = step.transition
        step.make(None)
        if self._average is not None:
            self._average.update(self.params, step.transition)

    def _present(self, params: Sequence[Tensor]) -> Linearised:
        """Return a step from these weights, along the engine's own loss, which leaves no trace."""
        assert self._engine.inner_loss is not None
        model = self.training.slots.model
        self._state = State(list(params), State.of(self.training.optimizer).buffers)
        with TwiceDifferentiable(model).held(), leaving_no_trace(model):
            return self._at(self._engine.inner_loss())

    def close(self) -> Carried | None:
        """Let v go on, and w̄ where the next window begins at the same weights."""
        average = carried_on(self._average, self.training)
        return {**(self._carried() or {}), **(average or {})} or None


def _displacement(linearised: Linearised) -> float:
    """Return ‖Φ(s) − w‖₂ / ‖w‖₂, over the weights that train."""
    state = linearised.state
    with torch.no_grad():
        after = linearised.transition(state, linearised.settled_grads()).params
        pairs = [(w, p) for w, p in zip(after, state.params, strict=True) if p.requires_grad]
        return length([w - p for w, p in pairs]) / (length([p for _, p in pairs]) or 1.0)
