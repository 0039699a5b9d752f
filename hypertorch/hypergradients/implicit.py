"""The implicit function theorem at s* = Φ(s*, λ): (I − Aᵀ) v = ∂_s E, dE/dλ = Bᵀ v + ∂_λ E.

A = ∂Φ/∂s and B = ∂Φ/∂λ of one step, as products; how training came to s* does not matter.
"""

from collections.abc import Callable

from torch import Tensor

from ..dynamics import Dynamics
from ..errors import ArgumentError, ArgumentTypeError, SolverError, UnsupportedError, warn
from ..settings import where_learned
from ..transition import Linearised
from .averages import check_average
from .engine import Carried, Engine, Training
from .implicit_windows import ImplicitWindow, LiveImplicitWindow, Report
from .linear_solvers import (
    ConjugateGradient,
    FixedPoint,
    Lanczos,
    LinearSolver,
    NormalConjugateGradient,
)
from .linear_system import Solution
from .nystrom import Nystrom
from .stationarity import OfState, OfWeights, Stationarity, is_torch_own

#: Settings of torch's own Φ in which its fixed point may move; ε only with decoupled decay.
_MOVE_THE_WEIGHTS = ("weight_decay", "eps")
#: Solvers of a symmetric system.
_SYMMETRIC = (ConjugateGradient, Nystrom, Lanczos)
#: Settings of any other Φ, and keys of Hyperparameters in its param groups, that are taken for what
#: these words mean.
_DO_NOT = ("lr", "momentum", "dampening")


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
    loss: mini-batches keep AdamW's v far above g², and its weights from resting there (see
    `holds_preconditioner`).

    `FixedPoint` iterates with training's own A, momentum included: K steps from 0 give K steps of
    `Unroll` at SGD's fixed point. It diverges where training would not settle. Every other solver
    gets the system of the weights alone, symmetric: ∂g/∂w v = ∂_w E; or of another Φ than torch's,
    I − Aᵀ, which is not symmetric and which only `NormalConjugateGradient` can solve.
    `ConjugateGradient` is the fastest where the inner problem is convex, and reports where it is
    not. Far from a fixed point of a network it seldom is: `NormalConjugateGradient` goes on there,
    as do a short series, `FixedPoint(rtol=0, max_steps=5)`, which v's warm start lengthens, and
    `Lanczos()`, which is a better one at the same price.

    Args:
        solver: of the linear system; default `NormalConjugateGradient(max_steps=50)`, some 102
            products at most. With `rtol=0` all `max_steps` steps are made and nothing is warned of:
            `FixedPoint(rtol=0, max_steps=K)` without `warm_start` is K terms of the Neumann series.
        inner_loss: a closure that computes the loss whose fixed point is meant, such as that of all
            training data, at the weights the model holds; default: that of the last step. With it
            training steps are plain ones, and the loop may stay as it is.
        average: β; E and the linear system are then those at exponentially averaged weights w̄, as
            in `FirstOrder`, in place of the last ones. These are off the fixed point by their own
            noise, which w̄ has averaged out: with mini-batches, v is the surer for it. It takes an
            `inner_loss`; module buffers (BatchNorm's statistics) stay those of the last weights.
        warm_start: whether v starts from the last window's.
        holds_preconditioner: with a decoupled decay, whether the √v + ε of AdamW and its kin is
            held as training has made it, and the weights taken to rest where

                g + λ (√v + ε) w = 0.

            Mini-batches need that: their v is the variance of a gradient whose mean is small.

    Attributes:
        last: of the latest hypergradient, a `Report`; `None` before. Of several optimizers that
            share the engine, it is the latest one's.

    Raises:
        ArgumentError: an argument is not what it should be.
        SolverError (later, when the system is solved): it is not positive definite although the
            solver needs that, or the iteration diverges.

    Cost: each training step with the graph of its gradient; per window one outer gradient, and
    about two gradients per product and two more. Memory: the graph of one step, and some vectors.

    Example:
        >>> import torch
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
        average: float | None = None,
        warm_start: bool = True,
        holds_preconditioner: bool = False,
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
        check_average(average, "Implicit")
        if average is not None and inner_loss is None:
            raise ArgumentError(
                "`average` of Implicit needs an `inner_loss`: the last step's loss was computed at "
                "the last weights. Pass a closure that computes it at those the model holds."
            )
        if holds_preconditioner and isinstance(self.solver, FixedPoint):
            raise ArgumentError(
                "`holds_preconditioner` of Implicit has no meaning for FixedPoint, which solves in "
                "weights and buffers together. Use NormalConjugateGradient(), or leave it out."
            )
        self.inner_loss, self.average, self.warm_start = inner_loss, average, warm_start
        self.holds_preconditioner = holds_preconditioner
        self.needs = "loss" if inner_loss is None else "gradients"
        self.differentiates_twice = inner_loss is None  # a window sees to its own loss itself
        self.last: Report | None = None
        self._has_warned = False

    def check(self, training: Training) -> None:
        """Refuse settings that a fixed point does not depend on, and Φ without one.

        Raises:
            UnsupportedError: names it, and an engine that can.
        """
        for name, words in training.in_dynamics.items():
            for word in sorted(words.intersection(self._without_influence(training))):
                its = "" if word == name else f", a param group's `{word}`"
                raise UnsupportedError(
                    f"`Implicit` cannot learn `{name}`{its}: at a fixed point the weights do not "
                    "depend on it. Use `Unroll` or `Forward`."
                )
        owner = type(training.optimizer).__name__
        if not is_torch_own(training.dynamics):
            if isinstance(self.solver, _SYMMETRIC):
                raise UnsupportedError(
                    f"`{type(self.solver).__name__}` needs a symmetric system, and that of "
                    f"{owner} is I − Aᵀ. Use `FixedPoint` or `NormalConjugateGradient`."
                )
        elif not self.holds_preconditioner and any(
            group.get("amsgrad") for group in _decoupled(training)
        ):
            raise UnsupportedError(
                f"`Implicit` cannot differentiate {owner} with `amsgrad=True` and a decoupled "
                "decay: where it rests depends on the largest gradient on the way there. "
                "Use `Unroll`, `Forward` or `holds_preconditioner=True`."
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
        """Return K + 1 + 2 products, as if the solver took `max_steps` of them.

        How many it took, a window counts. A gradient of `inner_loss` is counted as one, and Bᵀ v of
        what is in the loss, or of the whole state (`FixedPoint`), as one product more.
        """
        is_of_state = not self._is_of_weights(training.dynamics)
        products = self.solver.max_steps + (is_of_state or bool(training.in_loss))
        return horizon + 1 + 2 * products + (self.inner_loss is not None)

    def system(self, linearised: Linearised) -> Stationarity:
        """Return the linear system that the solver gets."""
        if self._is_of_weights(linearised.transition.dynamics):
            return OfWeights(linearised, self.holds_preconditioner)
        return OfState(linearised)

    def _is_of_weights(self, dynamics: Dynamics) -> bool:
        return is_torch_own(dynamics) and not isinstance(self.solver, FixedPoint)

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
            warn(
                f"The linear system of `Implicit` ended at a residual of {found.residual:.2g}, "
                f"above the tolerance, after {found.products} products, and the hypergradient is "
                f"as inexact. Give {self.solver!r} more `max_steps` or a larger `rtol`; with "
                "`rtol=0` it makes `max_steps` steps, and this is not said."
            )
        return found

    def __repr__(self) -> str:
        own = ", inner_loss=…" if self.inner_loss is not None else ""
        mean = "" if self.average is None else f", average={self.average}"
        cold = "" if self.warm_start else ", warm_start=False"
        held = ", holds_preconditioner=True" if self.holds_preconditioner else ""
        return f"Implicit({self.solver!r}{own}{mean}{cold}{held})"


def _decoupled(training: Training) -> list[dict[str, object]]:
    """Return the param groups whose weights shrink apart from their gradient."""
    if not is_torch_own(training.dynamics):
        return []
    groups = training.optimizer.param_groups
    learned_in = where_learned(training.settings, "weight_decay", len(groups))
    return [
        group
        for group, is_learned in zip(groups, learned_in, strict=True)
        if group.get("decoupled_weight_decay") and (is_learned or group["weight_decay"] != 0)
    ]
