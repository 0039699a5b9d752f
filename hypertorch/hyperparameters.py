"""λ: a raw tensor ρ, and the constraint that maps it to λ = c(ρ)."""

import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .constraints import (
    Constraint,
    check_constraint,
    event_dims,
    is_elementwise,
    just_inside,
    pulled_back,
    raw_ends,
    real,
    to_raw,
    to_value,
)
from .entries import entries, ordinary
from .errors import ArgumentError, ArgumentTypeError, warn


class Hyperparameter:
    """A learnable λ = c(ρ), with ρ unconstrained.

    Calling it returns λ: a leaf tensor, the same one until the next outer update moves ρ. A loss
    that uses it is differentiable in λ; the hypergradient dE/dλ then arrives in λ's own units, and
    `pull_back` turns it into dE/dρ = (∂c/∂ρ)ᵀ dE/dλ.

    Args:
        value: the starting value of λ, a number or a tensor of any shape, inside `constraint`. On
            the boundary (where ρ would be infinite) it starts just inside, by
            `constraints.BOUNDARY_MARGIN`, and says so once.
        constraint: the set λ lives in: `positive` (ρ = log λ), `unit_interval` and `interval(a, b)`
            (ρ = a logit), `simplex` (stick breaking), `real` (ρ = λ, the default), or any other
            constraint that `torch.distributions.biject_to` knows, with one pair of bounds for all.
        name: what logs and errors call it.
        bounds: `(lower, upper)` in λ's units; an outer update never leaves them. `None`: none.

    Cost: with one number for each of many training examples, on a CPU, `weights()[rows]` costs a
    window of `Unroll` or `Replay` no more than its rows do, where `rows` is a tensor of int64.

    Raises:
        ArgumentError: `value` or `bounds` lie outside `constraint`, `bounds` are not ordered, or
            the numbers of `constraint` have bounds of their own.
        ArgumentTypeError: `value` is not made of numbers, `constraint` is no set or has no
            bijection, or `bounds` are no pair.

    Example:
        >>> from hypertorch import unit_interval
        >>> alpha = Hyperparameter(0.25, unit_interval, name="alpha")
        >>> alpha()
        tensor(0.2500, requires_grad=True)
        >>> weights = Hyperparameter(torch.full((5,), 0.5), unit_interval)
        >>> weights()[torch.tensor([0, 3])].shape
        torch.Size([2])
    """

    def __init__(
        self,
        value: float | Sequence[float] | Tensor,
        constraint: Constraint = real,
        *,
        name: str | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.name = name or "hyperparameter"
        check_constraint(constraint, self.name)
        self.constraint = constraint
        self.is_indexed = False
        self.bound(bounds)
        self.set(_as_tensor(value, self.name))

    def bound(self, bounds: tuple[float, float] | None) -> None:
        """Let outer updates keep λ inside `bounds` from now on."""
        if bounds is not None and not _is_pair(bounds):
            raise ArgumentTypeError(
                f"`bounds` of `{self.name}` must be a pair of numbers, (lower, upper), or None. "
                f"Got {bounds!r}."
            )
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ArgumentError(f"`bounds` of `{self.name}` must be ordered. Got {bounds}.")
        ends = raw_ends(bounds, self.constraint, self.name) if bounds is not None else ()
        self.bounds, self._raw_bounds = bounds, ends

    def set(self, value: Tensor) -> None:
        """Let λ be `value`, in its own units; ρ follows."""
        inside = just_inside(value.detach(), self.constraint, self.name)
        if not torch.equal(inside, value):
            warn(
                f"`{self.name}` starts at {_brief(inside)}, just inside its set: "
                f"{_brief(value)} lies on the boundary, where its hypergradient vanishes."
            )
        raw = to_raw(inside, self.constraint).clone(memory_format=torch.contiguous_format)
        known = getattr(self, "raw", None)
        if known is not None and _kind(known) == _kind(raw):
            known.detach().copy_(raw)  # an outer rule may hold it
        else:
            self.raw = raw.requires_grad_()
        self.refresh()

    @torch.no_grad()
    def take_over(self, value: Tensor) -> None:
        """Let λ be `value`, of its shape; ρ stays the same tensor, which an outer rule may hold."""
        if torch.equal(value.to(self.value), self.value):
            return  # ρ would move by a rounding
        self.raw.copy_(to_raw(just_inside(value, self.constraint, self.name), self.constraint))
        self.refresh()

    def refresh(self) -> None:
        """Let λ be c(ρ) again, after ρ moved."""
        raw = self.raw.detach()
        value = to_value(raw, self.constraint)
        value = value.clone() if value is raw else value
        self.value = (entries(value) if self.is_indexed else value).requires_grad_()

    def expect_rows(self, expected: bool = True) -> None:
        """Let λ, if it is many numbers, be differentiated where it is indexed alone, or no more."""
        self.is_indexed = expected
        (entries if expected else ordinary)(self.value)

    def __call__(self) -> Tensor:
        """Return λ, a leaf tensor with `requires_grad`."""
        return self.value

    @contextmanager
    def at(self, value: Tensor) -> Iterator[None]:
        """Let λ be `value` for a while, whatever ρ is: a perturbed or a differentiable one."""
        own = self.value
        self.value = value
        try:
            yield
        finally:
            self.value = own

    def pull_back(self, hypergradient: Tensor) -> Tensor:
        """Return dE/dρ = (∂c/∂ρ)ᵀ dE/dλ, of ρ's shape; sparse, element by element, if dE/dλ is."""
        return pulled_back(hypergradient, self.raw, self.value.detach(), self.constraint)

    def in_own_units(self, gradient: Tensor) -> Tensor:
        """Return the dE/dλ of least norm that `pull_back` turns into dE/dρ = `gradient`.

        Element by element it is dE/dρ / c′(ρ), and 0 where c′(ρ) is 0 in floating point: there
        `pull_back` returns 0 of anything. On a simplex whose numbers are 0 and 1 in floating point
        it is NaN. Where k numbers of λ depend on each other, on a simplex of k values or in a
        matrix of k entries, it costs k vectors of ρ's size.
        """
        raw = self.raw.detach().requires_grad_()
        value = to_value(raw, self.constraint)
        if value is raw:
            return gradient
        if is_elementwise(self.constraint):
            (slope,) = torch.autograd.grad(value.sum(), raw)
            return torch.where(slope == 0, 0.0, gradient / slope)
        of_raw, of_value = event_dims(self.constraint)
        jacobian = _jacobian(value.flatten(-of_value), raw, of_raw)
        return _least_norm(jacobian, gradient.flatten(-of_raw)).reshape(value.shape)

    def moved(self, by: Tensor) -> Tensor:
        """Return c(ρ + by), inside `bounds`: what λ would be. Nothing moves."""
        raw = self.raw.detach() + by
        if self.bounds is not None:
            raw = raw.clamp(*self._raw_bounds)
        return to_value(raw, self.constraint)

    @torch.no_grad()
    def put(self, raw: Tensor) -> None:
        """Let ρ be `raw`, brought inside `bounds`, and λ c(ρ); ρ stays the same tensor."""
        self.raw.copy_(raw)
        self.clamp_()

    def clamp_(self) -> None:
        """Bring ρ, which has moved, back inside `bounds`, if there are any, and λ to c(ρ)."""
        if self.bounds is not None:
            self.raw.detach().clamp_(*self._raw_bounds)
        self.refresh()

    def to(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Move ρ and λ to where the weights are; return whether they were elsewhere."""
        is_elsewhere = (self.raw.device, self.raw.dtype) != (device, dtype)
        if is_elsewhere:
            self.raw = self.raw.detach().to(device, dtype).requires_grad_()
            self.refresh()
        return is_elsewhere

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}={_brief(self.value)})"


@contextmanager
def all_at(
    hyperparameters: Mapping[str, Hyperparameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let λ be `values`, by name, for a while; one that is missing keeps its present value."""
    with ExitStack() as held:
        for name, value in values.items():
            held.enter_context(hyperparameters[name].at(value))
        yield


def held_as(hyperparameter: Hyperparameter, groups: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys under which param groups hold a hyperparameter, for their Φ to call."""
    return {key for group in groups for key, held in group.items() if held is hyperparameter}


def number_of(held: Any) -> Tensor | None:
    """Return what a param group holds, a number, a tensor or a `Hyperparameter`, as a tensor."""
    if isinstance(held, Hyperparameter):
        return held().detach()
    if isinstance(held, (int, float)):
        return torch.tensor(held, dtype=torch.float64)
    return held if isinstance(held, Tensor) else None


def _jacobian(value: Tensor, raw: Tensor, dims: int) -> Tensor:
    """Return ∂λ/∂ρ of vectors λ, of shape (…, size of λ, size of ρ).

    Args:
        value: λ.
        raw: ρ, a vector or a tensor of more dimensions for each λ.
        dims: how many.
    """
    parts = value.unbind(-1)
    rows = [torch.autograd.grad(part.sum(), raw, retain_graph=True)[0] for part in parts]
    return torch.stack(rows, dim=-1 - dims).flatten(-dims)


def _least_norm(jacobian: Tensor, gradient: Tensor) -> Tensor:
    """Return the shortest x with Jᵀ x = `gradient`: with J = Q R, it is Q R⁻ᵀ `gradient`."""
    q, r = torch.linalg.qr(jacobian)
    solved = torch.linalg.solve_triangular(r.mT, gradient.unsqueeze(-1), upper=False)
    return (q @ solved).squeeze(-1)


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
        floating = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"`{name}` must be made of numbers. Got {value!r}.") from error
    return floating


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _is_pair(bounds: Any) -> bool:
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    return is_pair and all(
        end.numel() == 1 if isinstance(end, Tensor) else isinstance(end, numbers.Real)
        for end in bounds
    )


def _brief(value: Tensor) -> str:
    if value.numel() > 4:
        return f"{value.numel()} values, {value.min().item():g} to {value.max().item():g}"
    if value.numel() == 1:
        return f"{value.item():g}"
    return "[" + ", ".join(f"{v:g}" for v in value.flatten().tolist()) + "]"
