"""Dual numbers x + Σ_j z_j ε_j: forward mode through pointwise operations, many directions at once.

Torch's own takes one direction at a time, computes x anew for each, and is slow on Φ. What has no
rule here is refused, so that whatever passes through is pointwise: an entry of the result depends
on the same entry of the arguments alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
            of_args = [a.tangents if isinstance(a, Dual) else _NONE for a in args]
            found = {}
            for direction in {n for tangents in of_args for n in tangents}:
                z = [tangents.get(direction) for tangents in of_args]
                found[direction] = _RULES[name](z, value, *args, **kwargs)
            result = value.as_subclass(Dual)
            result.tangents = {n: z for n, z in found.items() if z is not None}
            return result


_NONE: Tangents = {}


def dual(value: Tensor, tangents: Mapping[str, Tangent]) -> Tensor:
    """Return x + Σ_j z_j ε_j, which is x itself where every z_j is zero."""
    if not tangents:
        return value
    result = value.detach().as_subclass(Dual)
    result.tangents = dict(tangents)
    return result


def tangents_of(x: Any) -> Tangents:
    """Return z_j by name."""
    return x.tangents if isinstance(x, Dual) else {}


# The rules: the arguments' z, the value and the arguments of an operation, to the value's z.

Z = Sequence[Any]


def _plus(a: Any, b: Any, factor: float) -> Any:
    """Return a + factor · b."""
    if a is None or b is None:
        return a if b is None else b * factor
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.add(a, b, alpha=factor)
    return a + b * factor


def _plus_product(a: Any, x: Any, y: Any, factor: float = 1) -> Any:
    """Return a + factor · x y, where a missing x or y is zero."""
    if x is None or y is None:
        return a
    if a is None:
        return x * y if factor == 1 else x * y * factor
    if isinstance(a, Tensor) and isinstance(x, Tensor):
        if isinstance(y, Tensor):
            return torch.addcmul(a, x, y, value=factor)
        return torch.add(a, x, alpha=factor * y)
    return a + x * y * factor


def _add(z: Z, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _plus(z[0], z[1], alpha)


def _subtract(z: Z, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _plus(z[0], z[1], -alpha)


def _multiply(z: Z, out: Tensor, x: Any, y: Any) -> Any:
    return _plus_product(_plus_product(None, z[0], y), x, z[1])


def _addcmul(z: Z, out: Tensor, a: Any, x: Any, y: Any, *, value: float = 1) -> Any:
    is_short = z[0] is None and isinstance(z[1], Tensor) and isinstance(z[2], float) and value == 1
    if is_short and z[2] == 1:
        return torch.addcmul(x, z[1], y)  # x + z_x y, in one operation
    return _plus_product(_plus_product(z[0], z[1], y, value), x, z[2], value)


def _divide(z: Z, out: Tensor, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise NoRule(f"div, rounding_mode={rounding_mode!r}")
    return _plus_product(z[0], out, z[1], -1) / y  # (z_x − out z_y) / y


def _power(z: Z, out: Tensor, x: Any, y: Any) -> Any:
    along_x = None if z[0] is None else _plus_product(None, z[0], y * x ** (y - 1))
    if z[1] is None:
        return along_x
    return _plus_product(along_x, z[1], out * (x.log() if isinstance(x, Tensor) else math.log(x)))


def _maximum(z: Z, out: Tensor, x: Any, y: Any) -> Any:
    of_x, of_y = (_like(of, out) for of in z)
    both = torch.where(x == y, (of_x + of_y) / 2, of_y)  # as torch has it
    return torch.where(x > y, of_x, both)


def _where(z: Z, out: Tensor, condition: Tensor, x: Any, y: Any) -> Any:
    return torch.where(condition, *(_like(of, out) for of in z[1:]))


def _like(tangent: Any, out: Tensor) -> Tensor:
    """Return a tangent as a tensor: a number would be taken for a float32."""
    return tangent if isinstance(tangent, Tensor) else out.new_full((), tangent or 0.0)


def _converted(z: Z, out: Tensor, *args: Any, **kwargs: Any) -> Any:
    return z[0].to(out) if isinstance(z[0], Tensor) else z[0]


def _of_one(derivative: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    return lambda z, out, x: z[0] * derivative(x, out)


def _flipped(rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda z, out, x, y: rule(z[::-1], out, y, x)


def _named() -> dict[str, Callable[..., Any]]:
    """Return the rules under every name that torch has for an operation."""
    rules: dict[str, Callable[..., Any]] = {
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
