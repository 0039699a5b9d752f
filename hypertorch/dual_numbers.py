"""Dual numbers x + Σ_j z_j ε_j: forward mode through pointwise operations, many directions at once.

Torch's own takes one direction at a time, computes x anew for each, and is slow on Φ. What has no
rule here is refused, so that whatever passes through is pointwise: an entry of the result depends
on the same entry of the arguments alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

#: z_j: of x's shape, or of one that broadcasts to it, a float included; an absent one is zero.
Tangent = Tensor | float
Tangents = dict[str, Tangent]


class NoRule(Exception):
    """An operation that is not pointwise, or that has no rule here; its name."""


class Dual(Tensor):
    """x as a tensor, with z_j by name in `tangents`."""

    tangents: Tangents

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return func(x) with its tangents."""
        name, kwargs = func.__name__, kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            value = func(*args, **kwargs)
            if name in _CONSTANT and not (name == "__get__" and isinstance(value, Tensor)):
                return value
            if name not in _RULES:
                raise NoRule(name)
            along = {n for a in args if isinstance(a, Dual) for n in a.tangents}
            found = {n: _RULES[name](_Along(n), value, *args, **kwargs) for n in along}
            return dual(value, {n: z for n, z in found.items() if z is not None})


def dual(value: Tensor, tangents: Mapping[str, Tangent]) -> Tensor:
    """Return x + Σ_j z_j ε_j, which is x itself where every z_j is zero."""
    if not tangents:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        result = value.detach().as_subclass(Dual)
    result.tangents = dict(tangents)
    return result


def tangents_of(x: Any) -> Tangents:
    """Return z_j by name."""
    return x.tangents if isinstance(x, Dual) else {}


class _Along:
    """x ↦ z_j, for one j."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: Any) -> Tangent | None:
        return tangents_of(x).get(self.name)


# The rules: z, the value of the operation and its arguments, to the tangent of the value.


def _plus(a: Tangent | None, b: Tangent | None, factor: float = 1) -> Tangent | None:
    """Return a + factor · b."""
    if a is None or b is None:
        return a if b is None else b * factor
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.add(a, b, alpha=factor)
    return a + b * factor


def _plus_product(a: Tangent | None, x: Any, y: Any, factor: float = 1) -> Tangent | None:
    """Return a + factor · x y, where a missing x or y is zero."""
    if x is None or y is None:
        return a
    if a is None:
        return cast(Tangent, x * y if factor == 1 else x * y * factor)
    if isinstance(a, Tensor) and isinstance(x, Tensor):
        if isinstance(y, Tensor):
            return torch.addcmul(a, x, y, value=factor)
        return torch.add(a, x, alpha=factor * y)
    return cast(Tangent, a + x * y * factor)


def _add(z: _Along, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Tangent | None:
    return _plus(z(x), z(y), alpha)


def _subtract(z: _Along, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Tangent | None:
    return _plus(z(x), z(y), -alpha)


def _multiply(z: _Along, out: Tensor, x: Any, y: Any) -> Tangent | None:
    return _plus_product(_plus_product(None, z(x), y), x, z(y))


def _addcmul(z: _Along, out: Tensor, a: Any, x: Any, y: Any, *, value: float = 1) -> Any:
    z_x, z_y = z(x), z(y)
    is_short = z(a) is None and isinstance(z_x, Tensor) and isinstance(z_y, float) and value == 1
    if is_short and z_y == 1:
        return torch.addcmul(x, cast(Tensor, z_x), y)  # x + z_x y, in one operation
    return _plus_product(_plus_product(z(a), z_x, y, value), x, z_y, value)


def _divide(z: _Along, out: Tensor, x: Any, y: Any) -> Tangent | None:
    return cast(Tangent, cast(Any, _plus_product(z(x), out, z(y), -1)) / y)  # (z_x − out z_y) / y


def _power(z: _Along, out: Tensor, x: Any, y: Any) -> Tangent | None:
    along_x = None if z(x) is None else _plus_product(None, z(x), y * x ** (y - 1))
    if z(y) is None:
        return along_x
    return _plus_product(along_x, z(y), out * (x.log() if isinstance(x, Tensor) else math.log(x)))


def _maximum(z: _Along, out: Tensor, x: Any, y: Any) -> Tangent | None:
    of_x, of_y = (0.0 if of is None else of for of in (z(x), z(y)))
    both = torch.where(x == y, (of_x + of_y) / 2, of_y)  # as torch has it
    return torch.where(x > y, of_x, both)


def _where(z: _Along, out: Tensor, condition: Tensor, x: Any, y: Any) -> Tangent | None:
    of_x, of_y = (0.0 if of is None else of for of in (z(x), z(y)))
    return torch.where(condition, of_x, of_y)


def _converted(z: _Along, out: Tensor, x: Any, *args: Any, **kwargs: Any) -> Tangent | None:
    return x_z.to(out) if isinstance(x_z := z(x), Tensor) else x_z


def _of_one(derivative: Callable[[Any, Tensor], Any]) -> Callable[..., Tangent | None]:
    def rule(z: _Along, out: Tensor, x: Any) -> Tangent | None:
        return cast(Tangent, cast(Any, z(x)) * derivative(x, out))

    return rule


def _flipped(rule: Callable[..., Tangent | None]) -> Callable[..., Tangent | None]:
    return lambda z, out, x, y: rule(z, out, y, x)


def _named() -> dict[str, Callable[..., Tangent | None]]:
    """Return the rules under every name that torch has for an operation."""
    rules: dict[str, Callable[..., Tangent | None]] = {
        "addcmul": _addcmul,
        "maximum": _maximum,
        "where": _where,
        "to": _converted,
    }
    two = {"add": _add, "sub": _subtract, "mul": _multiply, "truediv": _divide, "pow": _power}
    for name, rule in two.items():
        rules |= dict.fromkeys((name, f"__{name}__"), rule)
        rules[f"__r{name}__"] = _flipped(rule)
    rules |= {"div": _divide, "rsub": _flipped(_subtract), "__rdiv__": _flipped(_divide)}
    one: dict[str, Callable[[Any, Tensor], Any]] = {
        "neg": lambda x, out: -1.0,
        "sqrt": lambda x, out: 0.5 / out,
        "exp": lambda x, out: out,
        "log": lambda x, out: 1 / x,
        "abs": lambda x, out: torch.sgn(x),
    }
    for name, derivative in one.items():
        rules |= dict.fromkeys((name, f"__{name}__"), _of_one(derivative))
    return rules


_RULES = _named()

#: What has no derivative, or is no number.
_CONSTANT = {
    *("__get__", "dim", "size", "numel", "is_floating_point", "zeros_like", "ones_like"),
    *("full_like", "sign", "detach", "__gt__", "gt", "__lt__", "lt", "__ge__", "ge", "__le__"),
    *("le", "__eq__", "eq", "__ne__", "ne", "isfinite"),
}
