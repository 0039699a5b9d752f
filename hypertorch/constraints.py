"""The set Λ a hyperparameter lives in, and the bijection λ = c(ρ) from unconstrained ρ onto it.

`torch.distributions` supplies the sets and the bijections; here is only what it leaves open: what
happens to a value on the boundary of Λ, where no ρ exists.
"""

import math
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import positive, real, simplex, unit_interval

from .entries import sparse_vector
from .errors import ArgumentError, ArgumentTypeError, kind_of

__all__ = [
    "BOUNDARY_MARGIN",
    "Constraint",
    "bounds_of",
    "check_constraint",
    "event_dims",
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


def check_constraint(constraint: Any, name: str) -> None:
    """Raise unless λ can live in a set.

    Args:
        constraint: Λ.
        name: what to call the hyperparameter in an error.

    Raises:
        ArgumentTypeError: it is no set, or one without a bijection onto it.
        ArgumentError: its numbers have bounds of their own.
    """
    if not isinstance(constraint, Constraint):
        got = kind_of(constraint) if isinstance(constraint, type) else repr(constraint)
        raise ArgumentTypeError(
            f"`constraint` of `{name}` must be a set such as `positive` or `interval(a, b)`, as "
            f"`hypertorch` has them. Got {got}."
        )
    try:
        biject_to(constraint)
    except NotImplementedError as error:
        raise ArgumentTypeError(
            f"`constraint` of `{name}` must be a set that torch.distributions.biject_to knows. "
            f"Got {constraint!r}. Use `real`, and let the loss map its value into the set."
        ) from error
    if any(torch.as_tensor(end).numel() > 1 for end in _ends(constraint)):
        raise ArgumentError(
            f"`constraint` of `{name}` must have the same bounds for all its numbers. Got "
            f"{constraint!r}. Use a Hyperparameter for each number."
        )


def _ends(constraint: Constraint) -> tuple[Any, Any]:
    """Return the bounds that a set holds; where there is none ±∞."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    lower = getattr(constraint, "lower_bound", -math.inf)
    return lower, getattr(constraint, "upper_bound", math.inf)


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
    return event_dims(constraint)[1] == 0


def event_dims(constraint: Constraint) -> tuple[int, int]:
    """Return over how many last dimensions numbers of ρ, and of λ, depend on each other."""
    bijection = biject_to(constraint)
    return bijection.domain.event_dim, bijection.codomain.event_dim


def bounds_of(constraint: Constraint) -> tuple[float, float]:
    """Return what each number of λ lies between: on a simplex 0 and 1, where there is none ±∞."""
    if isinstance(constraint, constraints.independent):
        return bounds_of(constraint.base_constraint)
    if isinstance(constraint, type(simplex)):
        return 0.0, 1.0
    lower, upper = _ends(constraint)
    return float(lower), float(upper)


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
    lower, upper = bounds_of(constraint)
    if not lower <= bounds[0] < bounds[1] <= upper:
        raise ArgumentError(
            f"`bounds` of `{name}` reach beyond its set. Got {bounds}, and it lies between "
            f"{lower:g} and {upper:g}."
        )
    ends = [to_raw(torch.as_tensor(b, dtype=torch.float64), constraint).item() for b in bounds]
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
