"""Which Φ belongs to which optimizer, what of it can be learned, and what is refused.

Registering a Φ also registers it with `higher`, which then unrolls it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import higher
import torch
from torch import Tensor

from ..constraints import Constraint
from ..errors import ArgumentError, UnsupportedError, did_you_mean, listed
from ..state import HOST_BUFFERS
from .arithmetic import Buffers

Update = Callable[..., tuple[Tensor, Buffers]]

#: Settings that torch keeps as a pair: our name → (torch's name, position).
_PAIRED = {"beta1": ("betas", 0), "beta2": ("betas", 1)}

#: Options under which torch's own step no longer is Φ, and why.
_REFUSED = {
    "fused": "a fused kernel rounds differently and skips steps by itself",
    "capturable": "it keeps its counters on the device and changes the arithmetic",
    "differentiable": "torch's own differentiable step detaches the first momentum buffer",
}


@dataclass(frozen=True)
class Inverse:
    """Φ⁻¹ of one tensor, in two parts: ∇L(w_{t-1}) is known once w_{t-1} is.

    It is asked of tensors that had a gradient in step t. Both parts may write to those of s_t that
    they are given, which nobody needs any longer; `settings` are the keyword arguments of Φ.

    Attributes:
        param: `(param, buffers, **settings) -> param`: w_{t-1} from s_t.
        buffers: `(param, grad, buffers, **settings) -> buffers`: all of t - 1, a step counter too,
            from w_{t-1}, ∇L(w_{t-1}) and those of t.
        growth: `(**settings) -> number`: how much a step back magnifies rounding, at most; infinite
            where there is none.
    """

    param: Callable[..., Tensor]
    buffers: Callable[..., Buffers]
    growth: Callable[..., float | Tensor]


@dataclass(frozen=True)
class Dynamics:
    """Φ of one kind of optimizer: s_t = Φ_t(s_{t-1}, λ), one tensor at a time.

    Attributes:
        update: the pure function `(param, grad, buffers, **settings) -> (param, buffers)`.
        constraints: the settings that can be learned and the set each lives in.
        flags: options that `update` reads and that are not learned.
        inverse: Φ⁻¹, where it has one.
    """

    update: Update
    constraints: Mapping[str, Constraint]
    flags: tuple[str, ...]
    inverse: Inverse | None = None

    def settings(self, group: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return the keyword arguments of `update` for parameter number `index` of `group`."""
        chosen = {name: read_setting(group, name) for name in self.constraints}
        own = {k: v[index] if isinstance(v, list) else v for k, v in chosen.items()}
        return {**own, **{flag: group[flag] for flag in self.flags}}

    def step(
        self, param: Tensor, grad: Tensor, buffers: Buffers, group: Mapping[str, Any], index: int
    ) -> tuple[Tensor, Buffers]:
        """Return Φ of one tensor, with the settings that `group` holds for it."""
        new, buffers = self.update(param, grad, buffers, **self.settings(group, index))
        if new.dtype == param.dtype:
            return new, buffers
        # A setting per element is wider than a half-precision weight, and would widen it.
        return new.to(param.dtype), {
            k: v.to(param.dtype) if isinstance(v, Tensor) and k not in HOST_BUFFERS else v
            for k, v in buffers.items()
        }


class _Unrolled(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
    """`higher`'s loop around our Φ: it differentiates the loss, Φ makes the step."""

    dynamics: Dynamics

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for group, grads, buffers in zip(self.param_groups, grouped_grads, self.state, strict=True):
            for i, grad in enumerate(grads):
                if grad is not None:
                    group["params"][i], buffers[i] = self.dynamics.step(
                        group["params"][i], grad, buffers[i], group, i
                    )


_REGISTRY: dict[type[torch.optim.Optimizer], Dynamics] = {}
_UNROLLED: dict[type[torch.optim.Optimizer], type[_Unrolled]] = {}


def register_dynamics(
    optimizer_type: type[torch.optim.Optimizer],
    update: Update,
    constraints: Mapping[str, Constraint],
    flags: tuple[str, ...] = (),
    inverse: Inverse | None = None,
) -> None:
    """Teach hypertorch, and `higher`, the Φ of an optimizer class.

    Args:
        optimizer_type: the class; subclasses are not included, since they may step differently. Its
            param groups have an `lr`.
        update: Φ, pure: `(param, grad, buffers, **settings) -> (new_param, new_buffers)`. `buffers`
            holds the optimizer's state of that parameter under torch's own keys, and is empty at
            the first step; a learned setting arrives as a tensor, a fixed one as a float.
        constraints: the float settings of `update` and the set each lives in. `beta1` and `beta2`
            stand for the two entries of torch's `betas`.
        flags: keyword arguments of `update` taken from the param group unchanged. A
            `Hyperparameter` of any shape may lie there too, such as one learning rate per step;
            `update` calls it, and it is learned when it is passed in `learn`.
        inverse: Φ⁻¹, by which `Replay` finds states that it did not store; `None`: it makes the
            steps again.

    Example:
        >>> from hypertorch import positive
        >>> class SignSGD(torch.optim.SGD): ...
        >>> def sign_sgd(param, grad, buffers, *, lr):
        ...     return param - lr * grad.sign(), buffers
        >>> register_dynamics(SignSGD, sign_sgd, {"lr": positive})
    """
    dynamics = Dynamics(update, dict(constraints), tuple(flags), inverse)
    _REGISTRY[optimizer_type] = dynamics
    name = f"Unrolled{optimizer_type.__name__}"
    _UNROLLED[optimizer_type] = type(name, (_Unrolled,), {"dynamics": dynamics})
    higher.register_optim(optimizer_type, _UNROLLED[optimizer_type])


def unrolled(optimizer: torch.optim.Optimizer) -> higher.optim.DifferentiableOptimizer:
    """Return `higher`'s differentiable version of `optimizer`, with its present buffers.

    `higher` copies what it is made of, and would copy every weight to learn its place in a group.
    It gets light stand-ins instead, and the weights with each step; the buffers it is given are the
    live ones, which Φ does not write to.
    """
    groups = [{**g, "params": [object() for _ in g["params"]]} for g in optimizer.param_groups]
    places = [place for group in groups for place in group["params"]]
    bare = SimpleNamespace(param_groups=groups, state={})
    window = _UNROLLED[type(optimizer)](bare, places)
    for buffers, group in zip(window.state, optimizer.param_groups, strict=True):
        buffers |= {
            i: dict(optimizer.state[p])
            for i, p in enumerate(group["params"])
            if p in optimizer.state
        }
    return window


def dynamics_of(optimizer: torch.optim.Optimizer) -> Dynamics:
    """Return the Φ of `optimizer`.

    Raises:
        UnsupportedError: there is none, or an option of the optimizer leaves it.
    """
    kind = type(optimizer)
    if kind not in _REGISTRY:
        names = listed(cls.__name__ for cls in _REGISTRY)
        raise UnsupportedError(
            f"No dynamics Φ for {kind.__name__}. Supported: {names}. "
            "Write one and call `register_dynamics`."
        )
    for group in optimizer.param_groups:
        check_options(kind.__name__, group)
    return _REGISTRY[kind]


def check_options(owner: str, group: Mapping[str, Any]) -> None:
    """Raise if a param group uses an option or a kind of tensor that Φ does not cover."""
    for option, reason in _REFUSED.items():
        if group.get(option):
            raise UnsupportedError(
                f"{owner} with `{option}=True` is not supported: {reason}. "
                f"Build it with `{option}=False`."
            )
    if any(p.is_complex() for p in group["params"]):
        raise UnsupportedError(
            f"{owner} has complex parameters, and Φ is real. Use `torch.view_as_real`."
        )


def check_learnable(owner: str, dynamics: Dynamics, name: str) -> None:
    """Raise unless `name` is a float setting of `dynamics`."""
    if name in dynamics.constraints:
        return
    available = listed(dynamics.constraints)
    if name in dynamics.flags:
        raise ArgumentError(
            f"`{name}` of {owner} is a switch and cannot be learned. Available: {available}."
        )
    hint = did_you_mean(name, dynamics.constraints)
    if name == "betas":
        hint = " Did you mean `beta1` and `beta2`?"
    raise ArgumentError(f"{owner} has no hyperparameter `{name}`.{hint} Available: {available}.")


def read_setting(group: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a param group by our name: `beta1` is `betas[0]`."""
    if name in group or name not in _PAIRED:
        return group[name]
    pair, position = _PAIRED[name]
    return group[pair][position]


def write_setting(group: dict[str, Any], name: str, value: float) -> None:
    """Set a setting of a param group by our name."""
    if name in _PAIRED:
        pair, position = _PAIRED[name]
        values = list(group[pair])
        values[position] = value
        group[pair] = tuple(values)
    else:
        group[name] = value
