"""The set Λ a hyperparameter lives in, and the bijection λ = c(ρ) from unconstrained ρ onto it.

`torch.distributions` supplies the sets and the bijections; here is only what it leaves open: what
happens to a value on the boundary of Λ, where no ρ exists.
"""

import math
from numbers import Real
from typing import cast

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import positive, real, simplex, unit_interval

from .entries import sparse_vector
from .errors import ArgumentError

__all__ = [
    "BOUNDARY_MARGIN",
    "Constraint",
    "bounds_of",
    "interval",
    "is_elementwise",
    "just_inside",
    "positive",
    "pulled_back",
    "real",
    "simplex",
    "to_raw",
    "to_value",
    "unit_interval",
]

Constraint = constraints.Constraint

#: How far inside Λ a value on its boundary starts: absolute for a half line, a fraction of the
#: width for an interval, a fraction of the uniform distribution mixed in for a simplex.
BOUNDARY_MARGIN = {"half line": 1e-6, "interval": 1e-3, "simplex": 1e-3}


def interval(lower: float, upper: float) -> Constraint:
    """Return the set of the numbers between two ends.

    Args:
        lower: its lower end.
        upper: its upper end, above the lower one.

    Raises:
        ArgumentError: the ends are not finite, or not in this order.
    """
    are_numbers = isinstance(lower, Real) and isinstance(upper, Real)
    if not (are_numbers and -math.inf < lower < upper < math.inf):
        raise ArgumentError(
            f"`interval` needs two finite ends, the lower one first. Got {lower!r} and {upper!r}. "
            "Use `positive` for numbers above 0, `real` for any."
        )
    return constraints.interval(lower, upper)


def to_value(raw: Tensor, constraint: Constraint) -> Tensor:
    """Return λ = c(ρ)."""
    if _is_positive(constraint):
        return raw.exp()  # what torch's own transform does, among other things
    return cast(Tensor, biject_to(constraint)(raw))


def to_raw(value: Tensor, constraint: Constraint) -> Tensor:
    """Return ρ = c⁻¹(λ) for a λ strictly inside Λ."""
    return cast(Tensor, biject_to(constraint).inv(value))


def pulled_back(gradient: Tensor, raw: Tensor, value: Tensor, constraint: Constraint) -> Tensor:
    """Return dE/dρ = (∂c/∂ρ)ᵀ dE/dλ at λ = c(ρ)."""
    if gradient.is_sparse and is_elementwise(constraint):
        (where,) = gradient.indices()
        raw, value = raw.detach(), value.detach()
        found = pulled_back(gradient.values(), raw[where], value[where], constraint)
        return sparse_vector(where, found, raw.shape).coalesce()
    if _is_positive(constraint):
        return gradient * value
    raw = raw.detach().requires_grad_()
    with torch.enable_grad():  # a step may stand within torch.no_grad()
        again = to_value(raw, constraint)
    return gradient if again is raw else torch.autograd.grad(again, raw, gradient.to_dense())[0]


def _is_positive(constraint: Constraint) -> bool:
    """Whether it is `positive`, or a copy."""
    return isinstance(constraint, type(positive)) and float(constraint.lower_bound) == 0


def is_elementwise(constraint: Constraint) -> bool:
    """Whether each number of λ depends on one number of ρ, and not on a vector of them."""
    return cast(int, biject_to(constraint).codomain.event_dim) == 0


def bounds_of(constraint: Constraint) -> tuple[float, float]:
    """Return what each number of λ lies between: on a simplex 0 and 1, where there is none ±∞."""
    if isinstance(constraint, constraints.independent):
        return bounds_of(constraint.base_constraint)
    if isinstance(constraint, type(simplex)):
        return 0.0, 1.0
    lower = float(getattr(constraint, "lower_bound", -math.inf))
    return lower, float(getattr(constraint, "upper_bound", math.inf))


def just_inside(value: Tensor, constraint: Constraint, name: str) -> Tensor:
    """Return `value`, moved just inside `constraint` where it lies on the boundary.

    Args:
        value: λ, in its own units.
        constraint: Λ.
        name: what to call the hyperparameter in an error.

    Raises:
        ArgumentError: `value` is not finite or lies outside Λ.
    """
    if not bool(torch.isfinite(value).all()):
        raise ArgumentError(f"`{name}` must be finite. Got {value.tolist()}.")
    if isinstance(constraint, type(simplex)):
        return _inside_simplex(value, name)
    lower, upper = bounds_of(constraint)
    if bool(((value < lower) | (value > upper)).any()):
        raise ArgumentError(
            f"`{name}` lies outside its set. Got {value.tolist()}, "
            f"expected values between {lower:g} and {upper:g}."
        )
    found = _clamped(value, lower, upper)
    if not bool(constraint.check(found).all()):
        raise ArgumentError(f"`{name}` lies outside its set, {constraint}. Got {value.tolist()}.")
    return found


def raw_ends(bounds: tuple[float, float], constraint: Constraint, name: str) -> tuple[float, ...]:
    """Return what ρ lies between where each number of λ lies between `bounds`.

    Raises:
        ArgumentError: they reach beyond Λ, or there is no such box.
    """
    if not is_elementwise(constraint):
        raise ArgumentError(f"`{name}` takes no `bounds`: its numbers do not move one by one.")
    ends = [to_raw(torch.tensor(b, dtype=torch.float64), constraint).item() for b in bounds]
    if any(map(math.isnan, ends)):
        lower, upper = bounds_of(constraint)
        raise ArgumentError(
            f"`bounds` of `{name}` reach beyond its set. Got {bounds}, and it lies between "
            f"{lower:g} and {upper:g}."
        )
    return min(ends), max(ends)


def _clamped(value: Tensor, lower: float, upper: float) -> Tensor:
    width = upper - lower
    margin = (
        BOUNDARY_MARGIN["interval"] * width
        if math.isfinite(width)
        else BOUNDARY_MARGIN["half line"]
    )
    value = torch.where(value == lower, torch.full_like(value, lower + margin), value)
    return torch.where(value == upper, torch.full_like(value, upper - margin), value)


def _inside_simplex(value: Tensor, name: str) -> Tensor:
    if bool((value < 0).any()) or not bool(((value.sum(-1) - 1).abs() < 1e-4).all()):
        raise ArgumentError(
            f"`{name}` lies outside the simplex. Got {value.tolist()}, "
            "expected non-negative values that sum to 1."
        )
    if not bool((value == 0).any()):
        return value
    margin = BOUNDARY_MARGIN["simplex"]
    return (1 - margin) * value + margin / value.shape[-1]
