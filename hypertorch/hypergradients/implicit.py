"""The implicit function theorem at s* = Φ(s*, λ): (I − Aᵀ) v = ∂_s E, dE/dλ = Bᵀ v + ∂_λ E.

A = ∂Φ/∂s and B = ∂Φ/∂λ of one step, as products; how training came to s* does not matter.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, HypertorchWarning, SolverError, UnsupportedError
from ..state import State, set_state
from ..transition import Linearised, Transition
from .engine import Carried, Engine, OuterLoss, Training, TrainingStep, Window, outer_gradient
from .linear_solvers import (
    ConjugateGradient,
    FixedPoint,
    LinearSolver,
    NormalConjugateGradient,
    TruncatedConjugateGradient,
)
from .linear_system import Solution, norm
from .nystrom import Nystrom
from .stationarity import OfState, OfWeights, Stationarity, is_torch_own

#: Settings of torch's own Φ in which its fixed point may move; ε only with decoupled decay.
_MOVE_THE_WEIGHTS = ("weight_decay", "eps")
#: Solvers of a symmetric system.
_SYMMETRIC = (ConjugateGradient, Nystrom, TruncatedConjugateGradient)
#: Settings of any other Φ that are taken for what these words mean.
_DO_NOT = ("lr", "momentum", "dampening")


@dataclass(frozen=True)
class Report:
    """How good the latest hypergradient of an `Implicit` is.

    Attributes:
        residual: ‖∂_s E − M v‖₂ / ‖∂_s E‖₂ of the linear system.
        converged: whether that reached the solver's tolerance.
        products: with M and Mᵀ, each about two gradients.
        displacement: ‖w_t − w_{t-1}‖₂ / ‖w_{t-1}‖₂ of the window's last step: 0 at a fixed point.
        gap: E(s*) − E to first order, in E's units: what E would gain if training went on to its
            fixed point. Near 0, or the point is none; a mini-batch's differs from the data's.
    """

    residual: float
    converged: bool
    products: int
    displacement: float
    gap: float


class Implicit(Engine):
    """Hypergradient of the fixed point s* that training converges to, by a linear system.

        s* = Φ(s*, λ),    (I − Aᵀ) v = ∂_s E,    dE/dλ = Bᵀ v + ∂_λ E

    Exact, up to the solver's tolerance, at a fixed point of Φ, whatever the number of steps that
    led there; elsewhere an estimate, whose error falls with the distance. `last` says how far both
    are. Only the last step of a window counts: use `window=1`. A and B are those of its loss: a
    mini-batch's, unless `inner_loss` is given.

    A fixed point does not depend on η, on momentum or on any other setting than the weight decay
    (and ε, if that decay is decoupled): the others are refused. Where a decay is part of g, torch's
    Φ rest where g = ∇L + λ w = 0; AdamW and its kin where λ w + g / (|g| + ε) = 0. That is of one
    loss: mini-batches keep AdamW's v far above g², and its weights from resting there.

    `FixedPoint` iterates with training's own A, momentum included: K steps from 0 give K steps of
    `Unroll` at SGD's fixed point. It diverges where training would not settle. Every other solver
    gets the system of the weights alone, symmetric: ∂g/∂w v = ∂_w E; or of another Φ than torch's,
    I − Aᵀ, which is not symmetric and which only `NormalConjugateGradient` can solve.
    `ConjugateGradient` is the fastest where the inner problem is convex, and reports where it is
    not. Far from a fixed point of a network it seldom is: `NormalConjugateGradient` goes on there,
    as do a short series, `FixedPoint(rtol=0, max_steps=5)`, which v's warm start lengthens, and
    `TruncatedConjugateGradient()`, which is a longer one at the same price.

    Args:
        solver: of the linear system; default `NormalConjugateGradient(max_steps=50)`, at most 101
            products. With `rtol=0` all `max_steps` steps are made and nothing is warned of:
            `FixedPoint(rtol=0, max_steps=K)` without `warm_start` is K terms of the Neumann series.
        inner_loss: a closure that computes the loss whose fixed point is meant, such as that of all
            training data, at the weights the model holds; default: that of the last step. With it
            training steps are plain ones, and the loop may stay as it is.
        warm_start: whether v starts from the last window's.

    Attributes:
        last: of the latest hypergradient, a `Report`; `None` before.

    Raises:
        ArgumentTypeError: an argument is not what it should be.
        SolverError (later, when the system is solved): it is not positive definite although the
            solver needs that, or the iteration diverges.

    Cost: each training step with the graph of its gradient; per window one outer gradient, and
    about two gradients per product and two more. Memory: the graph of one step, and some vectors.

    Example:
        >>> from hypertorch import HyperOptimizer, hypergradient
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> def loss(target):
        ...     return 0.5 * (model.weight - target).square().sum()
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1.0)
        >>> optimizer = HyperOptimizer(sgd, model, learn="weight_decay", outer=None)
        >>> for _ in range(60):
        ...     _ = optimizer.step(loss(6.0))  # to w* = 6 / (1 + λ) = 3
        >>> engine = Implicit(ConjugateGradient())
        >>> found = hypergradient(optimizer, [lambda: loss(6.0)], lambda: loss(1.0), engine)
        >>> round(found["weight_decay"].item(), 9)  # (w* − 1) · −6 / (1 + λ)²
        -3.0
        >>> engine.last.converged, engine.last.products
        (True, 2)

    References:
        Larsen et al. 1996; Pedregosa 2016, algorithm 1; Lorraine, Vicol, Duvenaud 2020, algorithms
        2 and 3; for Φ in place of ∇L, Grazzi et al. 2020 (AID-FP, AID-CG) and Clarke et al. 2022.
    """

    def __init__(
        self,
        solver: LinearSolver | None = None,
        *,
        inner_loss: Callable[[], Tensor] | None = None,
        warm_start: bool = True,
    ) -> None:
        self.solver = NormalConjugateGradient(max_steps=50) if solver is None else solver
        if not isinstance(self.solver, LinearSolver):
            raise ArgumentTypeError(
                "`solver` of Implicit must be a linear solver. "
                f"Got {solver!r}. Pass FixedPoint() or ConjugateGradient()."
            )
        if inner_loss is not None and not callable(inner_loss):
            raise ArgumentTypeError(
                "`inner_loss` of Implicit must be a closure that returns the loss. "
                f"Got {type(inner_loss).__name__}."
            )
        self.inner_loss, self.warm_start = inner_loss, warm_start
        self.needs = "loss" if inner_loss is None else "gradients"
        self.last: Report | None = None
        self._has_warned = False

    def check(self, training: Training) -> None:
        """Refuse settings that a fixed point does not depend on, and Φ without one.

        Raises:
            UnsupportedError: names it, and an engine that can.
        """
        for name in training.settings:
            if name in self._without_influence(training):
                raise UnsupportedError(
                    f"`Implicit` cannot learn `{name}`: at a fixed point the weights do not depend "
                    "on it. Use `Unroll` or `Forward`."
                )
        owner = type(training.optimizer).__name__
        if not is_torch_own(training.dynamics):
            if isinstance(self.solver, _SYMMETRIC):
                raise UnsupportedError(
                    f"`{type(self.solver).__name__}` needs a symmetric system, and that of "
                    f"{owner} is I − Aᵀ. Use `FixedPoint` or `NormalConjugateGradient`."
                )
        elif any(group.get("amsgrad") for group in _decoupled(training)):
            raise UnsupportedError(
                f"`Implicit` cannot differentiate {owner} with `amsgrad=True` and a decoupled "
                "decay: where it rests depends on the largest gradient on the way there. "
                "Use `Unroll` or `Forward`."
            )

    def _without_influence(self, training: Training) -> tuple[str, ...]:
        if not is_torch_own(training.dynamics):
            return _DO_NOT
        moving = _MOVE_THE_WEIGHTS if _decoupled(training) else _MOVE_THE_WEIGHTS[:1]
        return tuple(name for name in training.dynamics.constraints if name not in moving)

    def open(self, training: Training, carried: Carried | None = None) -> "ImplicitWindow":
        """Start from the present weights and buffers, and from the last window's v."""
        self.check(training)
        kind = ImplicitWindow if self.inner_loss is None else LiveImplicitWindow
        return kind(self, training, carried)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1 + 2 products, with the products of the latest window.

        Before there was one, as many as `solver.max_steps`. A gradient of `inner_loss` is counted
        as one, and Bᵀ v of what is in the loss as one product more.
        """
        products = self.solver.max_steps if self.last is None else self.last.products
        products += bool(training.in_loss)
        return horizon + 1 + 2 * products + (self.inner_loss is not None)

    def system(self, linearised: Linearised) -> Stationarity:
        """Return the linear system that the solver gets."""
        is_known = is_torch_own(linearised.transition.dynamics)
        if is_known and not isinstance(self.solver, FixedPoint):
            return OfWeights(linearised)
        return OfState(linearised)

    def solve(
        self, system: Stationarity, rhs: list[Tensor], start: list[Tensor] | None
    ) -> Solution:
        """Solve M v = rhs; warn once if that was not done to the tolerance."""
        fits = start is not None and [v.shape for v in start] == [b.shape for b in rhs]
        first = [v.to(b) for v, b in zip(start or (), rhs, strict=True)] if fits else None
        try:
            found = self.solver.solve(system.product, rhs, first, system.transposed)
        except SolverError as error:
            raise SolverError(f"{system.name}, of `Implicit` at the last step. {error}") from error
        if not (found.converged or self._has_warned or self.solver.rtol == self.solver.atol == 0):
            self._has_warned = True
            warnings.warn(
                f"The linear system of `Implicit` ended at a residual of {found.residual:.2g}, "
                f"above the tolerance, after {found.matvecs} products, and the hypergradient is as "
                f"inexact. Give {self.solver!r} more `max_steps` or a larger `rtol`; with `rtol=0` "
                "it makes `max_steps` steps, and this is not said.",
                HypertorchWarning,
                stacklevel=2,
            )
        return found

    def __repr__(self) -> str:
        own = ", inner_loss=…" if self.inner_loss is not None else ""
        return f"Implicit({self.solver!r}{own}{'' if self.warm_start else ', warm_start=False'})"


def _decoupled(training: Training) -> list[dict[str, object]]:
    """Return the param groups whose weights shrink apart from their gradient."""
    if not is_torch_own(training.dynamics):
        return []
    is_learned = "weight_decay" in training.settings
    return [
        group
        for group in training.optimizer.param_groups
        if group.get("decoupled_weight_decay") and (is_learned or group["weight_decay"] != 0)
    ]


class ImplicitWindow(Window):
    """Training steps of which the last one is differentiated, at its fast weights.

    A step's graph refers to the weights it was computed from, so these are not written to: later
    weights are in the model's slots, without a graph, until the window closes.
    """

    def __init__(self, engine: Implicit, training: Training, carried: Carried | None) -> None:
        super().__init__(training)
        self._engine = engine
        self._state = State.of(training.optimizer)
        self._adjoint: list[Tensor] | None = (carried or {}).get("adjoint")
        self._transition: Transition | None = None
        self._linearised: Linearised | None = None
        self._before: Sequence[Tensor] = self.params

    def step(self, step: TrainingStep) -> None:
        """Make the step s_t = Φ_t(s_{t-1}, λ), and keep it as the one to differentiate."""
        self._transition = step.transition
        self._linearised = self._at(step.with_graph())
        grads = [None if g is None else g.detach() for g in self._linearised.grads]
        step.check(grads)
        with torch.no_grad():
            following = step.transition(self._state, grads)
        self._before = self.params
        trained = [
            w if w is p else w.requires_grad_()
            for w, p in zip(following.params, self._before, strict=True)
        ]
        self.params = self.training.slots.fill(trained)
        self._state = State(self.params, following.buffers)

    def _at(self, loss: Tensor) -> Linearised:
        assert self._transition is not None
        return Linearised(self._transition, self._state, loss, self.training.hyperparameters)

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ; the engine's `last` says how good it is.

        Raises:
            SolverError: the linear system is not what the solver needs.
            WindowError: E is another model's.
        """
        values, loss = self.training.values(), outer_loss()
        at_weights, direct = outer_gradient(loss, self.params, values)
        system = self._engine.system(self._present())
        rhs = system.rhs(at_weights)
        size = _length(rhs)
        if not math.isfinite(loss.item() + size):
            return loss.detach(), {n: torch.full_like(v, math.nan) for n, v in values.items()}
        found = self._engine.solve(system, rhs, self._adjoint)
        self._adjoint = found.value
        self._engine.last = Report(
            residual=found.residual / (size or 1.0),
            converged=found.converged,
            products=found.matvecs,
            displacement=_displacement(self._before, self.params),
            gap=system.gap(found.value).item(),
        )
        through = system.pulled_back(found.value)
        return loss.detach(), {n: part + through[n] for n, part in direct.items()}

    def _present(self) -> Linearised:
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
    """Training steps on the live weights; what is differentiated is a step along `inner_loss`."""

    def step(self, step: TrainingStep) -> None:
        """Make the step by the optimizer itself."""
        self._transition = step.transition
        self._before = [p.detach().clone() for p in self.params]
        step.make(None)

    def _present(self) -> Linearised:
        """Return a step from where the weights are now, along the engine's own loss."""
        assert self._engine.inner_loss is not None
        self._state = State.of(self.training.optimizer)
        return self._at(self._engine.inner_loss())

    def close(self) -> Carried | None:
        """Let v go on; nothing is to be handed back."""
        return self._carried()


def _displacement(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return ‖w_t − w_{t-1}‖₂ / ‖w_{t-1}‖₂, over the weights that train."""
    pairs = [(w, p) for w, p in zip(after, before, strict=True) if p.requires_grad]
    with torch.no_grad():
        return _length([w - p for w, p in pairs]) / (_length([p for _, p in pairs]) or 1.0)


def _length(tensors: Sequence[Tensor]) -> float:
    """Return ‖·‖₂ over all entries of all tensors."""
    return math.hypot(*(norm(t) for t in tensors))
