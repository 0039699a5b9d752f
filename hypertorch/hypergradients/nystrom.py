"""v = (M_k + ρ I)⁻¹ b, with M_k of rank k: M replaced by what k of its columns say of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverError
from .linear_solvers import LinearSolver
from .linear_system import System, finite, norm


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    """Nyström: M replaced by a matrix M_k of rank k, from k of its columns, plus a damping ρ.

        M_k = C W⁺ Cᵀ,   C = M[:, K],   W = M[K, K],   v ← v + (M_k + ρ I)⁻¹ (b − M v)

    for a symmetric, positive semi-definite M; K are k random columns. One step from 0 (the default)
    is Hataya and Yamada's v = (M_k + ρ I)⁻¹ b; with k = n it is exactly (M + ρ I)⁻¹ b, and with
    k < n an estimate whose error the residual shows. More steps refine it towards M⁻¹ b where what
    M_k leaves out is small next to ρ (‖M − M_k‖ < 2ρ), and diverge elsewhere.

    Args:
        rank: k; n where that is smaller.
        damping: ρ > 0, in M's units.
        seed: of the choice of columns; the same seed, the same columns.

    Raises:
        SolverError: W is not symmetric, or has a negative eigenvalue: so has M.

    Cost: k products, one more per step; k vectors. Rounding is magnified by ‖M‖ / ρ.

    References:
        Hataya and Yamada 2023, eq. (5)-(6); the inverse by the singular values of C W^{-1/2}
        instead of Woodbury's formula, as Frangella, Tropp and Udell 2023.
    """

    max_steps: int = 1
    rank: int = 10
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("damping", "a positive number", lambda rho: 0 < rho < math.inf)
        self._require("rank", "a whole number, at least 1", lambda k: k >= 1, int)

    def _iterate(self, system: System, v: Tensor, r: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        if norm(r) <= goal or self.max_steps == 0:
            return v, r
        basis, values = self._decomposed(system)
        for _ in range(self.max_steps):
            part = basis.T @ r
            v = v + (r - basis @ part) / self.damping + basis @ (part / (values + self.damping))
            r = system.residual(v)
            if norm(r) <= goal:
                break
        return v, r

    def _decomposed(self, system: System) -> tuple[Tensor, Tensor]:
        """Return orthonormal U and s ≥ 0 with M_k = U diag(s) Uᵀ."""
        n, b = len(system.b), system.b
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(n, generator=generator)[: self.rank].tolist()
        columns = []
        for index in chosen:
            unit = torch.zeros_like(b)
            unit[index] = 1
            columns.append(system.times(unit))
        stacked = torch.stack(columns, 1)  # C
        finite(norm(stacked), system)
        roots, vectors = _positive_part(stacked[chosen])
        basis, singular, _ = torch.linalg.svd(stacked @ (vectors / roots), full_matrices=False)
        return basis, singular**2


def _positive_part(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return √λ and vectors of W's positive eigenvalues, once W is symmetric and positive."""
    scale, rounding = w.abs().max(), torch.finfo(w.dtype).eps
    if bool((w - w.T).abs().max() > rounding**0.5 * scale):
        raise SolverError(
            "M is not symmetric, and `Nystrom` needs that. Use `FixedPoint` or "
            "`NormalConjugateGradient`."
        )
    values, vectors = torch.linalg.eigh((w + w.T) / 2)
    if bool(values[0] < -(rounding**0.5) * scale):
        raise SolverError(
            f"M is not positive semi-definite: it has an eigenvalue of {values[0].item():.3g} or "
            "less. `Nystrom` needs that: use `FixedPoint` or `NormalConjugateGradient`, or add a "
            "multiple of the identity to M."
        )
    kept = values > len(values) * rounding * scale
    return values[kept].sqrt(), vectors[:, kept]
