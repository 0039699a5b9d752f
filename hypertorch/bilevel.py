"""Hyperparameters of a nested problem found offline: min_λ E(w(λ), λ), w(λ) = argmin_w h(w, λ).

HOAG solves the inner problem and the linear system of the hypergradient only as exactly as the
progress in λ deserves: to tolerances ε_k that fall.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .errors import ArgumentTypeError, SolverError
from .hypergradients.linear_solvers import LinearSolver
from .hypergradients.linear_system import dot, length
from .hyperparameters import Hyperparameter
from .inner_problem import InnerProblem, InnerSolver, Loss, Minimizer, check_callable, copy
from .nested_problem import Costs, Evaluation, NestedProblem
from .step_rules import Descent, Move, Published, StepRule

__all__ = [
    "HOAG",
    "Costs",
    "Descent",
    "InnerProblem",
    "Iteration",
    "Minimizer",
    "Move",
    "NestedProblem",
    "Published",
    "StepRule",
    "cubic",
    "exact",
    "exponential",
    "quadratic",
]

#: k ↦ ε_k, the tolerance of iteration k = 0, 1, ….
Schedule = Callable[[int], float]


def exponential(start: float = 0.1, factor: float = 0.9) -> Schedule:
    """Return ε_k = start · factor^k."""
    return partial(_geometric, start, factor)


def quadratic(start: float = 0.1) -> Schedule:
    """Return ε_k = start / (k + 1)²."""
    return partial(_power, start, 2)


def cubic(start: float = 0.1) -> Schedule:
    """Return ε_k = start / (k + 1)³."""
    return partial(_power, start, 3)


def exact(tolerance: float = 1e-10) -> Schedule:
    """Return ε_k = tolerance, for every k."""
    return partial(_geometric, tolerance, 1.0)


def _geometric(start: float, factor: float, k: int) -> float:
    return start * factor**k


def _power(start: float, exponent: int, k: int) -> float:
    return start / (k + 1) ** exponent


@dataclass(frozen=True)
class Iteration:
    """What happened at one λ.

    Attributes:
        hyperparameters: λ by name, at which all the rest was computed.
        outer_loss: E(w, λ).
        accepted: whether λ was kept. If not, λ and w went back, and there is no hypergradient.
        hypergradient: df/dλ by name, in λ's units.
        tolerance: ε_k.
        inner_residual: ‖∇_w h‖₂ over its first value (or `scale`); at most ε_k unless the inner
            solver could not.
        linear_residual: ‖∂_w E − H v‖₂ / ‖∂_w E‖₂; likewise.
        step_length: D, how far ρ moved into this iteration, after projection; 0 in the first one
            and in those that solve again after a rejection.
        step_size: 1/L, by which the next iteration moves ρ per df/dρ.
        stationarity: ‖P(ρ − df/dρ) − ρ‖₂: 0 at a solution.
        costs: since the beginning.
        seconds: of wall-clock time inside `step` since the beginning.
    """

    hyperparameters: dict[str, Tensor]
    outer_loss: float
    accepted: bool
    tolerance: float
    inner_residual: float
    step_size: float
    step_length: float
    costs: Costs
    seconds: float
    hypergradient: dict[str, Tensor] = field(default_factory=dict)
    linear_residual: float = math.nan
    stationarity: float = math.nan


class HOAG:
    """Hyperparameter optimisation with approximate gradient, for a convex inner problem.

        min_λ E(w(λ), λ),   w(λ) = argmin_w h(w, λ)

    Iteration k: (i) minimise h from the last w until ‖∇_w h‖ ≤ ε_k (of its first value); (ii)
    solve H v = ∂_w E from the last v until ‖∂_w E − H v‖ ≤ ε_k ‖∂_w E‖; (iii) p = df/dλ by that v;
    (iv) ρ ← P(ρ − p/L), with λ = c(ρ) and P the projection on the hyperparameters' `bounds`. If
    Σ ε_k is finite this converges to a stationary point.

    The step adapts: L_0 = ‖p_0‖ / √m, so that the first one has length 1 per entry of ρ. A step
    after which E is not lower is taken back, with L ← 2 L and this and all later ε halved; one that
    lowers it well lets L fall. `step_rule` says when: `Descent()`, or `Published()` as in the
    released code.

    A set Λ is kept **by transform** with `Hyperparameter(value, positive)` (ρ = log λ), and **by
    projection** with `Hyperparameter(value, bounds=(a, b))` (ρ = λ); both together are a box in ρ.

    Where it does not apply: h must be smooth in w and strictly convex at w(λ), and both losses
    must be deterministic. A learning rate or momentum does not change w(λ): use `HyperOptimizer`.

    Args:
        inner_loss: h, a closure that computes it from `params` and from `λ()`.
        outer_loss: E, likewise; it may depend on λ directly too.
        params: w, the leaf tensors that training moves, from where they are. They hold w(λ) after.
        hyperparameters: λ, one or several, each with a name of its own.
        tolerance: ε_k: `quadratic()` (the default), `exponential()`, `cubic()`, `exact()`, or any
            function of k.
        inner_solver: moves w; called with an `InnerProblem` and the ‖∇_w h‖₂ to reach.
        linear_solver: of (ii); its `rtol` is replaced by ε_k.
        step_rule: how L adapts and which steps are taken back; its `max_step` is the length of the
            first one.
        scale: the ‖∇_w h‖₂ that ε_k is relative to; `None`: its first value. Give one where w
            starts at a solution already.

    Raises:
        ArgumentError: no params, no hyperparameters, or two of one name.
        UnsupportedError: `linear_solver` is `Lanczos`, which solves another system.

    Cost: per iteration the inner solver's gradients, one more with a graph, one outer gradient, and
    a Hessian product per step of the linear solver. Memory: one graph of h, and some fifty copies
    of w, most of them L-BFGS's.

    Example:
        >>> import hypertorch
        >>> x, y = torch.linspace(-1, 1, 20), torch.linspace(-1, 1, 20) ** 3
        >>> w = torch.zeros(2, requires_grad=True)
        >>> decay = Hyperparameter(1.0, hypertorch.positive, name="decay", bounds=(1e-4, 1e4))
        >>> def error(part):
        ...     return (w[0] * x[part] + w[1] - y[part]).square().mean()
        >>> hoag = HOAG(
        ...     lambda: error(slice(0, 20, 2)) + decay() * w.square().sum(),
        ...     lambda: error(slice(1, 20, 2)), [w], [decay],
        ... )
        >>> first, *_, last = hoag.minimize(max_steps=20)
        >>> last.outer_loss < first.outer_loss
        True

    References:
        Pedregosa 2016, algorithm 1 and the adaptive step size of its section 3.
    """

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss,
        params: Iterable[Tensor],
        hyperparameters: Hyperparameter | Iterable[Hyperparameter],
        *,
        tolerance: Schedule | None = None,
        inner_solver: InnerSolver | None = None,
        linear_solver: LinearSolver | None = None,
        step_rule: StepRule | None = None,
        scale: float | None = None,
    ) -> None:
        self.problem = NestedProblem(
            inner_loss, outer_loss, params, hyperparameters, inner_solver, linear_solver, scale
        )
        self.tolerance = tolerance or quadratic()
        check_callable(self.tolerance, "tolerance")
        self.step_rule = Descent() if step_rule is None else step_rule
        if not isinstance(self.step_rule, StepRule):
            raise ArgumentTypeError(
                f"`step_rule` must be one such as Descent(). Got {type(step_rule).__name__}."
            )
        self.iterations: list[Iteration] = []
        self._tightening = 1.0  # of ε; halved by each rejection
        self._lipschitz = 0.0  # L, above 0 from the first iteration on
        self._point: _Point | None = None  # the last λ that was accepted
        self._is_back = True  # λ is at that point: the next iteration does not move it
        self._seconds = 0.0

    def minimize(
        self,
        max_steps: int = 100,
        callback: Callable[[Iteration], object] | None = None,
        atol: float | None = None,
    ) -> list[Iteration]:
        """Make iterations until one of three says stop, and return all since the beginning.

        Args:
            max_steps: so many at most.
            callback: called with each iteration; anything true that it returns is the end.
            atol: the end is where `stationarity` is at most this. It is as inexact as ε_k: while
                that is loose, λ may seem to rest at a bound.
        """
        for _ in range(max_steps):
            iteration = self.step()
            rests = atol is not None and iteration.stationarity <= atol
            if (callback is not None and callback(iteration)) or rests:
                break
        return self.iterations

    def step(self) -> Iteration:
        """Make one iteration: move λ, solve, and accept or roll back.

        Afterwards λ and w are those of the last accepted iteration.

        Raises:
            SolverError: H is not positive definite at w(λ), or df/dλ is not finite.
        """
        started = time.perf_counter()
        tolerance = self._next_tolerance()
        moved = 0.0 if self._is_back else self._displace(1 / self._lipschitz)
        here = {h.name: h().detach().clone() for h in self._hyperparameters}
        evaluation = self.problem.solved(tolerance)
        factor = self._judge(evaluation, tolerance, moved)
        self._is_back = factor > 1
        self._lipschitz *= factor
        results = self._roll_back() if self._is_back else self._accept(evaluation, tolerance)
        self._seconds += time.perf_counter() - started
        iteration = Iteration(
            hyperparameters=here,
            outer_loss=evaluation.outer_loss.item(),
            accepted=not self._is_back,
            tolerance=tolerance,
            inner_residual=evaluation.residual,
            step_size=1 / self._lipschitz,
            step_length=moved,
            costs=self.problem.costs,
            seconds=self._seconds,
            **results,
        )
        self.iterations.append(iteration)
        return iteration

    def _next_tolerance(self) -> float:
        """Return ε_k, halved by each rejection, and nowhere below what rounding allows."""
        rounding = 100 * torch.finfo(self.problem.inner.params[0].dtype).eps
        return max(self.tolerance(len(self.iterations)) * self._tightening, rounding)

    @property
    def _hyperparameters(self) -> list[Hyperparameter]:
        return list(self.problem.hyperparameters.values())

    def _judge(self, at: Evaluation, tolerance: float, moved: float) -> float:
        """Return what the step rule says of the step that led here; 1 if there was none."""
        before, after = self._point, at.outer_loss.item()
        if before is None or moved == 0:
            return 1.0
        if not math.isfinite(after):
            return 2.0
        rounding = 10 * torch.finfo(at.outer_loss.dtype).eps * abs(before.outer_loss)
        inexactness = before.inexactness + self._inexactness(at) + rounding
        tolerances = before.tolerance, tolerance
        return self.step_rule.judge(
            Move(before.outer_loss, after, *tolerances, moved, self._lipschitz, inexactness)
        )

    def _inexactness(self, at: Evaluation) -> float:
        """Return |⟨v, ∇_w h⟩|, to first order |E(w, λ) − E(w(λ), λ)|."""
        adjoint = cast(list[Tensor], self.problem.adjoint)
        pairs = zip(adjoint, at.derivatives.gradient, strict=True)
        return abs(sum(dot(v.flatten(), g.flatten()) for v, g in pairs))

    def _accept(self, at: Evaluation, tolerance: float) -> dict[str, Any]:
        """Keep this λ with its df/dρ, and return what of it belongs in the record."""
        value = at.outer_loss.item()
        hypergradient, residual = self.problem.differentiated(at, tolerance)
        slope = [h.pull_back(hypergradient[h.name]) for h in self._hyperparameters]
        if not math.isfinite(value + length(slope)):
            raise SolverError(
                f"In iteration {len(self.iterations)} the outer loss is {value:g} and the norm of "
                f"its hypergradient {length(slope):g}. Keep λ in a smaller box by `bounds`."
            )
        per_entry = length(slope) / sum(p.numel() for p in slope) ** 0.5
        self._lipschitz = self.step_rule.lipschitz(self._lipschitz or None, per_entry) or 1.0
        self._point = _Point(
            value,
            tolerance,
            self._inexactness(at),
            [h.raw.detach().clone() for h in self._hyperparameters],
            [p.detach().clone() for p in self.problem.inner.params],
            slope,
        )
        stationarity = self._displace(1.0)
        self._displace(0.0)
        return {
            "hypergradient": hypergradient,
            "linear_residual": residual,
            "stationarity": stationarity,
        }

    def _displace(self, step_size: float) -> float:
        """Put ρ at P(ρ_k − step_size · df/dρ), λ at c(ρ), and return ρ's distance from ρ_k."""
        point, distances = cast(_Point, self._point), []
        for h, raw, slope in zip(self._hyperparameters, point.raws, point.slope, strict=True):
            h.put(raw - step_size * slope)
            distances.append(h.raw.detach() - raw)
        return length(distances)

    def _roll_back(self) -> dict[str, Any]:
        """Return to the last accepted λ and w, and halve ε."""
        self._displace(0.0)
        copy(cast(_Point, self._point).params, self.problem.inner.params)
        self._tightening /= 2
        return {}


@dataclass(frozen=True)
class _Point:
    """An accepted λ: E and ε there and the error of E, ρ, w(λ), and df/dρ."""

    outer_loss: float
    tolerance: float
    inexactness: float
    raws: list[Tensor]
    params: list[Tensor]
    slope: list[Tensor]
