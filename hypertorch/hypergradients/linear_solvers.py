"""Matrix-free solvers of M v = b, with M a function of a list of tensors.

FixedPoint (the Neumann series): v ← v + α (b − M v).  ConjugateGradient: M symmetric, positive.
NormalConjugateGradient: Mᵀ M v = Mᵀ b.  Lanczos: |M|⁻¹ b, with |eigenvalues|, in a few steps.
What M is (a Hessian, I − Aᵀ) is not their business.
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SolverError, check_number
from .linear_system import Matvec, Solution, System, dot, finite, norm

#: A fixed-point residual this many times ‖b‖ is taken for divergence, not for a transient.
DIVERGED = 1e3


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """How M v = b is solved, M being known by its products alone.

    Args:
        rtol: stop when ‖b − M v‖₂ ≤ max(rtol ‖b‖₂, atol).
        atol: the same, in b's units. With both 0, only `max_steps` stops.
        max_steps: iterations at most; 0 returns the start and its residual.

    Raises:
        ArgumentError: one of them is negative or not finite.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            self._require(name, "a finite number, 0 or more", lambda n: 0 <= n < math.inf)
        self._require("max_steps", "a whole number, 0 or more", lambda n: n >= 0, int)

    def _require(
        self, name: str, expected: str, holds: Callable[[Any], bool], kind: type = numbers.Real
    ) -> None:
        check_number(f"`{name}`", getattr(self, name), expected, holds, kind)

    def solve(
        self,
        matvec: Matvec,
        rhs: Sequence[Tensor],
        start: Sequence[Tensor] | None = None,
        transposed: Matvec | None = None,
    ) -> Solution:
        """Return v with M v ≈ b, how good it is and what it cost.

        Args:
            matvec: v ↦ M v.
            rhs: b, tensors of any shapes and one device.
            start: v to start from, of b's shapes; `None`: 0, which saves one product.
            transposed: v ↦ Mᵀ v, where the solver needs it.

        Raises:
            ArgumentError: shapes differ, or `transposed` is needed.
            SolverError: M is not what the solver needs, or the iteration diverged.
        """
        system = System(matvec, rhs, transposed)
        v = torch.zeros_like(system.b) if start is None else system.flat(start, "start")
        r = system.b if start is None else system.residual(v)
        goal = max(self.rtol * norm(system.b), self.atol)
        v, r = self._iterate(system, v, r, goal)
        size = finite(norm(r), system)
        return Solution(system.split(v), size, system.products, size <= goal)

    @abstractmethod
    def _iterate(self, system: System, v: Tensor, r: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        """Return the last v and r = b − M v, from the first ones."""


@dataclass(frozen=True, kw_only=True)
class FixedPoint(LinearSolver):
    """Fixed-point iteration v ← v + α (b − M v); with M = I − A and α = 1 it is v ← b + A v.

    From 0, K steps give the first K terms of the **Neumann series** α Σ_k (I − α M)^k b: the two
    are one iteration. α = 1, M = I − A is the series Σ A^k b; α < 1, M = H is Lorraine's. For K
    terms and no test of the residual, write `FixedPoint(rtol=0, max_steps=K)`.

    Converges where ρ(I − α M) < 1, with an error that falls like ρ(I − α M)^K. M need not be
    symmetric.

    Args:
        step: α > 0.

    Raises:
        SolverError: the residual grew to `DIVERGED` times its scale.

    Cost: one product per step, one vector.

    References:
        Lorraine, Vicol, Duvenaud 2020, algorithm 3; Grazzi et al. 2020 (AID-FP).
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("step", "a positive number", lambda alpha: 0 < alpha < math.inf)

    def _iterate(self, system: System, v: Tensor, r: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        scale = max(norm(system.b), norm(r))
        for k in range(self.max_steps):
            if norm(r) <= goal:
                break
            v = v + self.step * r
            r = system.residual(v)
            if not norm(r) <= DIVERGED * scale:
                raise SolverError(
                    f"The fixed-point iteration diverges: the residual is {norm(r):.3g} after "
                    f"{k + 1} steps, and ‖b‖ is {norm(system.b):.3g}. It needs "
                    f"ρ(I − step · M) < 1: lower `step` (now {self.step:g}), or use "
                    "`ConjugateGradient` or `NormalConjugateGradient`."
                )
        return v, r


class _ConjugateDirections(LinearSolver):
    """Runs of a recursion in v and r, each checked against b − M v and restarted from there.

    Rounding parts the recursion's r from b − M v; when a run no longer halves the latter, it ends.
    """

    def _iterate(self, system: System, v: Tensor, r: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        steps = 0
        while norm(r) > goal and steps < self.max_steps:
            v, steps = self._run(system, v, r, goal, steps)
            before, r = norm(r), system.residual(v)
            if norm(r) > before / 2:
                break
        return v, r

    @abstractmethod
    def _run(
        self, system: System, v: Tensor, r: Tensor, goal: float, steps: int
    ) -> tuple[Tensor, int]:
        """Return v once the recursion's ‖r‖ is at most `goal`, and the steps made so far."""

    @staticmethod
    def _target(r: Tensor, goal: float) -> float:
        """Return where a run from r ends: at rounding, if `goal` lies below it."""
        return max(goal, torch.finfo(r.dtype).eps * norm(r))


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(_ConjugateDirections):
    """Conjugate gradient, for a symmetric positive definite M.

        α = ‖r‖² / ⟨p, M p⟩,   v ← v + α p,   r ← r − α M p,   p ← r + (‖r_new‖² / ‖r_old‖²) p

    Exact after as many steps as M has distinct eigenvalues, save for rounding.

    Raises:
        SolverError: a direction with ⟨p, M p⟩ ≤ 0 was met (or 0 up to rounding, next to the largest
            one seen): M is indefinite or singular, or not symmetric. A b that lies in the positive
            part of an indefinite M is solved, correctly, without that being noticed.

    Cost: one product per step and one at the end, four vectors.

    References:
        Hestenes and Stiefel 1952; for hypergradients, Pedregosa 2016.
    """

    def _run(
        self, system: System, v: Tensor, r: Tensor, goal: float, steps: int
    ) -> tuple[Tensor, int]:
        p, square, largest, target = r, dot(r, r), 0.0, self._target(r, goal)
        while square**0.5 > target and steps < self.max_steps:
            product, length = system.times(p), dot(p, p)
            curvature = dot(p, product) / length
            largest = max(largest, curvature)
            if not curvature > torch.finfo(p.dtype).eps * largest:
                raise _not_positive(curvature, steps, system)
            alpha = square / (curvature * length)
            v, r = v + alpha * p, r - alpha * product
            square, old = dot(r, r), square
            p = r + (square / old) * p
            steps += 1
        return v, steps


@dataclass(frozen=True, kw_only=True)
class Lanczos(LinearSolver):
    """A few steps of Lanczos: an estimate of |M|⁻¹ b, which needs no convexity.

        M Q ≈ Q T,   Q_1 = b / ‖b‖,   v = ‖b‖ Q |T|⁻¹ e_1

    with Q orthonormal in the span of b, M b, …, and T tridiagonal. Where M is positive definite
    these are the steps of `ConjugateGradient`. Where it is not, as between the minima of a network,
    M⁻¹ would turn the directions of negative curvature round; |M|, with |eigenvalues|, does not. No
    eigenvalue of T counts for less than a hundredth of the largest. For a hypergradient online,
    where the last digit of a noisy system is worth nothing; v starts from 0 always. `HOAG`, which
    needs M⁻¹ b to a tolerance, refuses it.

    Cost: one product per step, `max_steps` vectors.

    References:
        Lanczos 1950; |M| as in Dauphin et al. 2014 (saddle-free Newton).
    """

    rtol: float = 0.0
    max_steps: int = 5

    def solve(
        self,
        matvec: Matvec,
        rhs: Sequence[Tensor],
        start: Sequence[Tensor] | None = None,
        transposed: Matvec | None = None,
    ) -> Solution:
        """Return v ≈ |M|⁻¹ b in the span.

        It solves M v = b only where all eigenvalues are positive and within a hundredfold;
        `residual` and `converged` are of M v = b all the same.

        Args:
            matvec: v ↦ M v, symmetric.
            rhs: b.
            start, transposed: do not count.
        """
        return super().solve(matvec, rhs, None, transposed)

    def _iterate(self, system: System, v: Tensor, r: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        b, size = system.b, norm(system.b)
        if size <= goal or self.max_steps == 0:
            return torch.zeros_like(b), b
        space, image = b.new_empty(2, self.max_steps, len(b))  # Q and M Q, in rows
        torch.div(b, size, out=space[0])
        for k in range(1, self.max_steps + 1):
            known, rest = space[:k], image[k - 1].copy_(system.times(space[k - 1]))
            if k == self.max_steps:
                break
            for _ in range(2):  # twice is enough for orthogonality to rounding
                rest = torch.addmv(rest, known.T, known @ rest, alpha=-1)
            length = finite(norm(rest), system)
            if length <= torch.finfo(b.dtype).eps * norm(image[k - 1]) * len(b) ** 0.5:
                break  # the span is invariant: nothing is left of b
            torch.div(rest, length, out=space[k])
        space, image = space[:k], image[:k]
        values, vectors = torch.linalg.eigh((image @ space.T + space @ image.T).double() / 2)
        largest = values.abs().max().clamp(min=torch.finfo(b.dtype).tiny)
        weights = vectors @ (vectors[0] / values.abs().clamp(min=0.01 * largest))
        weights = (weights * size).to(b)
        return weights @ space, b - weights @ image


@dataclass(frozen=True, kw_only=True)
class NormalConjugateGradient(_ConjugateDirections):
    """Conjugate gradient on the normal equations Mᵀ M v = Mᵀ b, for any invertible M.

    Kept in the residual of the system itself (CGLS), which falls in every step:

        α = ‖Mᵀ r‖² / ‖M p‖²,   v ← v + α p,   r ← r − α M p,   p ← Mᵀ r + β p.

    The condition number is squared: for a symmetric positive M use `ConjugateGradient`. For a
    singular M it ends at a least-squares solution, with `converged` false unless that solves it.

    Cost: two products per step, one with M and one with Mᵀ, so `transposed` is needed, and one at
    the end; four vectors.

    References:
        Hestenes and Stiefel 1952, section 10; Björck 1996, algorithm 7.4.1.
    """

    def _run(
        self, system: System, v: Tensor, r: Tensor, goal: float, steps: int
    ) -> tuple[Tensor, int]:
        p, old, rounding, target = torch.zeros_like(r), 1.0, 0.0, self._target(r, goal)
        while norm(r) > target and steps < self.max_steps:
            gradient = system.times_transposed(r)
            square = dot(gradient, gradient)
            if not square**0.5 > rounding * norm(r):  # Mᵀ r = 0: a least-squares solution
                break
            p = gradient + (square / old) * p
            product = system.times(p)
            length = finite(dot(product, product), system)
            alpha = square / length
            v, r = v + alpha * p, r - alpha * product
            rounding = max(rounding, torch.finfo(p.dtype).eps * (length / dot(p, p)) ** 0.5)
            old, steps = square, steps + 1
        return v, steps


def _not_positive(curvature: float, steps: int, system: System) -> SolverError:
    finite(curvature, system)
    return SolverError(
        f"M is not positive definite: pᵀ M p = {curvature:.3g} · ‖p‖² in step {steps + 1} of "
        "conjugate gradient. It is indefinite or singular there, or not symmetric: the solution "
        "would be wrong. Add a multiple of the identity (a weight decay), get closer to a minimum "
        "of the inner loss, or use `NormalConjugateGradient`."
    )
