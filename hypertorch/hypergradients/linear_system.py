"""One linear system M v = b on lists of tensors: flat vectors inside, products counted.

M is a function; the entries of all tensors together are one vector of R^n.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, SolverError

#: v ↦ M v. Takes a list of tensors of the right-hand side's shapes and returns as many.
Matvec = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
        value: v, in the shapes of the right-hand side, without a graph.
        residual: ‖b − M v‖₂ over all entries of all tensors, of this very `value`.
        products: products with M or Mᵀ that were asked for.
        converged: whether `residual` is at most max(rtol ‖b‖₂, atol).
    """

    value: list[Tensor]
    residual: float
    products: int
    converged: bool


class System:
    """M v = b on flat vectors, with its products counted."""

    def __init__(
        self, matvec: Matvec, rhs: Sequence[Tensor], transposed: Matvec | None = None
    ) -> None:
        self.matvec, self.transposed = matvec, transposed
        self.like = list(rhs)
        self.b = self.flat(rhs, "rhs")
        self.products = 0

    def flat(self, tensors: Sequence[Tensor], name: str) -> Tensor:
        """Return the tensors as one vector, once their shapes are b's."""
        shapes, expected = ([list(t.shape) for t in part] for part in (tensors, self.like))
        if not shapes or shapes != expected:
            raise ArgumentError(
                f"`{name}` must have the shapes of the right-hand side. "
                f"Got {shapes}, expected {expected}."
            )
        return torch.cat([t.detach().flatten() for t in tensors])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector as tensors of b's shapes and dtypes."""
        parts = vector.split([t.numel() for t in self.like])
        return [part.view_as(t).to(t.dtype) for part, t in zip(parts, self.like, strict=True)]

    def times(self, v: Tensor) -> Tensor:
        """Return M v."""
        self.products += 1
        return self.flat(self.matvec(self.split(v)), "matvec(v)")

    def times_transposed(self, v: Tensor) -> Tensor:
        """Return Mᵀ v."""
        if self.transposed is None:
            raise ArgumentError(
                "This solver needs `transposed`, the product with Mᵀ. Pass it, or use "
                "`FixedPoint`, or for a symmetric positive definite M, `ConjugateGradient`."
            )
        self.products += 1
        return self.flat(self.transposed(self.split(v)), "transposed(v)")

    def residual(self, v: Tensor) -> Tensor:
        """Return b − M v."""
        return self.b - self.times(v)


def dot(x: Tensor, y: Tensor) -> float:
    """Return ⟨x, y⟩, summed in float64 whatever the vectors are."""
    return torch.dot(x.double(), y.double()).item()


def norm(x: Tensor) -> float:
    """Return ‖x‖₂, likewise."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


def length(tensors: Iterable[Tensor]) -> float:
    """Return ‖·‖₂ over all entries of all tensors, likewise."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return norm(torch.stack([n.to(norms[0].device) for n in norms])) if norms else 0.0


def finite(number: float, system: System) -> float:
    """Return the number, once it is one."""
    if not math.isfinite(number):
        raise SolverError(
            f"The linear system gave {number} after {system.products} products. The right-hand "
            "side or the product with M is not finite: look at the losses that they come from."
        )
    return number
