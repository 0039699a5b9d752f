"""f(λ) = E(w(λ), λ) with w(λ) = argmin_w h(w, λ), and df/dλ by the implicit function theorem.

    H v = ∂_w E,      df/dλ = ∂_λ E − (∂²h/∂λ∂w)ᵀ v,      H = ∂²h/∂w² at w(λ).

How λ then moves is not its business.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import (
    ArgumentError,
    ArgumentTypeError,
    SolverError,
    UnsupportedError,
    check_number,
    warn,
)
from .hypergradients.linear_solvers import ConjugateGradient, Lanczos, LinearSolver
from .hypergradients.linear_system import length
from .hyperparameters import Hyperparameter
from .inner_problem import (
    Derivatives,
    InnerProblem,
    InnerSolver,
    Loss,
    Minimizer,
    check_callable,
    evaluated,
)


@dataclass(frozen=True)
class Costs:
    """What has been computed since the beginning.

    Attributes:
        inner_gradients: ∇_w h, those of the inner solver included.
        outer_gradients: ∂E.
        hessian_products: H v, about two gradients each.
    """

    inner_gradients: int
    outer_gradients: int
    hessian_products: int


@dataclass(frozen=True)
class Evaluation:
    """What is known at one λ once w(λ) is.

    Attributes:
        outer_loss: E, with its graph.
        derivatives: of h at w(λ).
        residual: ‖∇_w h‖₂ / scale.
    """

    outer_loss: Tensor
    derivatives: Derivatives
    residual: float


class NestedProblem:
    """E, h, w and λ, with w(λ) and df/dλ computed to a tolerance, each from the last one.

    Args:
        inner_loss: h, a closure that computes it from `params` and from `λ()`.
        outer_loss: E, likewise; it may depend on λ directly too.
        params: w, leaf tensors.
        hyperparameters: λ, one or several, each with a name of its own.
        inner_solver: moves w; called with an `InnerProblem` and the ‖∇_w h‖₂ to reach.
        linear_solver: of H v = ∂_w E; its `rtol` is replaced by the tolerance.
        scale: the ‖∇_w h‖₂ that tolerances are relative to; `None`: its first value. Give one where
            w starts at a solution already.

    Raises:
        ArgumentError: no params, no hyperparameters, or two of one name.
        ArgumentTypeError: a hyperparameter is not a `Hyperparameter`.
        UnsupportedError: `linear_solver` is `Lanczos`, which solves another system.
    """

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss,
        params: Iterable[Tensor],
        hyperparameters: Hyperparameter | Iterable[Hyperparameter],
        inner_solver: InnerSolver | None = None,
        linear_solver: LinearSolver | None = None,
        scale: float | None = None,
    ) -> None:
        self.inner = InnerProblem(inner_loss, params)
        check_callable(outer_loss, "outer_loss")
        self.outer_loss = outer_loss
        self.hyperparameters = _by_name(hyperparameters)
        for h in self.hyperparameters.values():
            h.to(self.inner.params[0].device, self.inner.params[0].dtype)
        self.inner_solver = Minimizer() if inner_solver is None else inner_solver
        check_callable(self.inner_solver, "inner_solver")
        self.linear_solver = ConjugateGradient() if linear_solver is None else linear_solver
        if not isinstance(self.linear_solver, LinearSolver):
            raise ArgumentTypeError(
                "`linear_solver` must be one such as ConjugateGradient(). "
                f"Got {type(linear_solver).__name__}."
            )
        if scale is not None:
            check_number("`scale`", scale, "a number above 0", lambda s: 0 < s < math.inf)
        if isinstance(self.linear_solver, Lanczos):
            raise UnsupportedError(
                "`HOAG` cannot use `Lanczos`: it returns an estimate of |H|⁻¹ ∂_w E, and not the v "
                "of H v = ∂_w E to a tolerance. Use `ConjugateGradient` or "
                "`NormalConjugateGradient`."
            )
        self.adjoint: list[Tensor] | None = None  # v, from which the next system starts
        self.scale = scale
        self._outer_gradients = 0
        self._has_warned = False

    def value(self, tolerance: float) -> float:
        """Return f(λ) at the present λ, with ‖∇_w h‖₂ ≤ `tolerance` · scale."""
        return self.solved(tolerance).outer_loss.item()

    def hypergradient(self, tolerance: float) -> dict[str, Tensor]:
        """Return df/dλ by name at the present λ, both problems solved to `tolerance`."""
        return self.differentiated(self.solved(tolerance), tolerance)[0]

    @property
    def costs(self) -> Costs:
        """What has been computed so far."""
        return Costs(self.inner.gradients, self._outer_gradients, self.inner.products)

    def solved(self, tolerance: float) -> Evaluation:
        """Move w from where it is to w(λ), and look at both losses there."""
        if self.scale is None:
            self.scale = self._first_gradient()
        self.inner_solver(self.inner, tolerance * self.scale)
        derivatives = self.inner.derivatives()
        residual = length(derivatives.gradient) / self.scale
        if not residual <= 1.01 * tolerance:
            self._warn(residual, tolerance)
        return Evaluation(evaluated(self.outer_loss, "outer_loss"), derivatives, residual)

    def differentiated(self, at: Evaluation, tolerance: float) -> tuple[dict[str, Tensor], float]:
        """Return df/dλ by name and ‖∂_w E − H v‖₂ / ‖∂_w E‖₂.

        Raises:
            SolverError: H is not positive definite.
        """
        self._outer_gradients += 1
        params = self.inner.params
        values = [h() for h in self.hyperparameters.values()]
        gradients = torch.autograd.grad(at.outer_loss, [*params, *values], allow_unused=True)
        of_params, direct = gradients[: len(params)], gradients[len(params) :]
        rhs = [_or_zeros(g, p) for g, p in zip(of_params, params, strict=True)]
        self.adjoint, residual = self._adjoint(at.derivatives, rhs, tolerance)
        crosses = at.derivatives.product(values, self.adjoint)
        parts = zip(self.hyperparameters.items(), direct, crosses, strict=True)
        hypergradient = {name: _total(h, d, cross) for (name, h), d, cross in parts}
        return hypergradient, residual

    def _adjoint(
        self, derivatives: Derivatives, rhs: Sequence[Tensor], tolerance: float
    ) -> tuple[list[Tensor], float]:
        solver = replace(self.linear_solver, rtol=tolerance, atol=0.0)
        product = derivatives.hessian_product  # H is symmetric
        try:
            solution = solver.solve(product, rhs, start=self.adjoint, transposed=product)
        except SolverError as error:
            raise SolverError(f"H v = ∂_w E, with M = H = ∂²h/∂w² at w(λ): {error}") from error
        return solution.value, solution.residual / (length(rhs) or 1.0)

    def _first_gradient(self) -> float:
        """Return ‖∇_w h‖ at the beginning, once h is known to be deterministic."""
        (first, gradient), (again, _) = (self.inner.value_and_gradient() for _ in range(2))
        if not bool(torch.isclose(first, again, rtol=1e-4, equal_nan=True)):
            raise ArgumentError(
                f"`inner_loss` gave {first.item():g} and then {again.item():g} at the same "
                "weights. It must be deterministic: use all of the data, and no dropout."
            )
        return length(gradient) or 1.0

    def _warn(self, residual: float, tolerance: float) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"The inner solver ended at a relative residual of {residual:.2g}, above the "
                f"tolerance {tolerance:.2g}, and the hypergradient is as inexact. Give it more "
                "steps, or ask for less (this is said once)."
            )


def _by_name(
    hyperparameters: Hyperparameter | Iterable[Hyperparameter],
) -> dict[str, Hyperparameter]:
    several = (
        [hyperparameters] if isinstance(hyperparameters, Hyperparameter) else list(hyperparameters)
    )
    for h in several:
        if not isinstance(h, Hyperparameter):
            raise ArgumentTypeError(
                f"`hyperparameters` must hold `Hyperparameter` objects. Got {type(h).__name__}."
            )
    names = [h.name for h in several]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(
            f"`hyperparameters` must be one or several, each with its own `name=`. Got {names}."
        )
    return dict(zip(names, several, strict=True))


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _total(h: Hyperparameter, direct: Tensor | None, cross: Tensor | None) -> Tensor:
    if direct is None and cross is None:
        raise ArgumentError(
            f"Neither loss depends on `{h.name}`. Call it inside the losses, anew each time, as "
            f"in `{h.name}() * w.square().sum()`: whenever it moves it is another tensor."
        )
    return _or_zeros(direct, h()) - _or_zeros(cross, h())
