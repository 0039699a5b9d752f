"""How ρ moves: ρ_{k+1} = ρ_k − step_k, from one noisy hypergradient h_k = dE/dρ per window.

The default rule needs no tuning; any `torch.optim` optimizer over the ρ can take its place.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .entries import MANY
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    HypertorchError,
    UnsupportedError,
    check_number,
    kind_of,
)
from .wrapper import hooked

OuterFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class GatedSign(torch.optim.Optimizer):
    """Move each ρ by the sign of its hypergradient, as far as that sign can be trusted.

    Most single hypergradients are noise, and their size changes by decades within a run; their sign
    over a few windows is what is left. With averages m and s of h and h² (decay γ), over an
    effective number n of windows,

        t = m / √((s − m²) / n),      ρ ← ρ − κ sign(t) clip((|t| − 1) / 2, 0, 1):

    no step below one standard error, the full step κ from three on. A hypergradient of exactly zero
    says nothing (its hyperparameter had no part in the window) and changes nothing. It works
    element by element, so that a vector of λ has as many gates.

    That a sign is sure does not mean that it matters: scale-invariant layers hardly depend on their
    weight decay, and what is left of dE/dλ is the bias of its estimate. With `negligible` = ν the
    standard error is taken to be √((s − m²) / n + ν² E²), so that below ν E there is no step, and
    the full one from 3 ν E on.

    Args:
        params: the raw ρ.
        max_step: κ, in ρ's units: for a positive λ, nats (0.2 is 22 % at most per update). Or one
            for each hyperparameter, in the order in which they are learned.
        decay: γ in [0, 1).
        negligible: ν ≥ 0, the share of E that a change of ρ by one must be worth.

    Attributes:
        takes_sparse: that it does; see the function.

    Cost: three vectors of ρ's size; no host synchronisation.

    Example:
        >>> rho = torch.zeros(2, requires_grad=True)
        >>> rule = GatedSign([rho], max_step=0.5)
        >>> rho.grad = torch.tensor([1e-9, -3e4])
        >>> _ = rule.step()
        >>> rho
        tensor([-0.5000,  0.5000], requires_grad=True)

    References:
        A significance gate as in COHG (2026); steps by the sign as in Micaelli and Storkey 2021.
    """

    takes_sparse = True

    def __init__(
        self,
        params: Iterable[Tensor],
        max_step: float | Sequence[float] = 0.2,
        decay: float = 0.8,
        negligible: float = 0.0,
    ) -> None:
        params = list(params)
        if not isinstance(max_step, (int, float)) and len(max_step) != len(params):
            raise ArgumentError(
                "`max_step` of GatedSign must be a number, or one for each hyperparameter. "
                f"Got {len(max_step)} for {len(params)}."
            )
        for step in [max_step] if isinstance(max_step, (int, float)) else max_step:
            check_number("`max_step` of GatedSign", step, "a number above 0", lambda n: n > 0)
        expected = "at least 0 and below 1"
        check_number("`decay` of GatedSign", decay, expected, lambda g: 0 <= g < 1)
        check_number("`negligible` of GatedSign", negligible, "0 or above", lambda n: n >= 0)
        chosen = {"max_step": max_step, "decay": decay, "negligible": negligible}
        super().__init__(params, chosen)

    @hooked
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every ρ that has a gradient.

        Args:
            closure: returns E; without it nothing is negligible.
        """
        size = None if closure is None else abs(closure())
        for group in self.param_groups:
            most, params, share = group["max_step"], group["params"], group["negligible"]
            rule = {"decay": group["decay"], "least": share * size if share and closure else None}
            steps = [most] * len(params) if isinstance(most, (int, float)) else most
            together: dict[Any, list[Tensor]] = {}
            for raw, max_step in zip(params, steps, strict=True):
                if raw.grad is None:
                    continue
                if raw.numel() >= MANY and raw.device.type == "cpu":
                    self._move_some_of(raw, raw.grad, max_step=max_step, **rule)
                else:
                    together.setdefault((max_step, raw.dtype, raw.device), []).append(raw)
            for (max_step, *_), raws in together.items():
                self._move(raws, max_step=max_step, **rule)

    def _move(self, raws: list[Tensor], **rule: Any) -> None:
        """Move several ρ as one vector."""
        rows = zip(*[(raw, *self._averages(raw)) for raw in raws], strict=True)
        parts = [tensor for row in rows for tensor in row]
        gradient = _flatten_dense_tensors([raw.grad for raw in raws])
        before = _flatten_dense_tensors(parts).view(4, -1)
        after = torch.stack(_moved(gradient, *before.unbind(), **rule))
        kept = torch.where(gradient != 0, after, before).view(-1)
        torch._foreach_copy_(parts, _unflatten_dense_tensors(kept, parts))

    def _move_some_of(self, raw: Tensor, gradient: Tensor, **rule: Any) -> None:
        """Move the entries of a ρ that have a hypergradient: a batch's, of a weight per example."""
        parts = [raw, *self._averages(raw)]
        where, informative = _informative(gradient)
        before = [part.view(-1)[where] for part in parts]
        moved = _moved(informative, *before, **rule)
        for part, new in zip(parts, moved, strict=True):
            part.view(-1)[where] = new

    def _averages(self, raw: Tensor) -> list[Tensor]:
        """Return how many windows there were, m and √s."""
        state, names = self.state[raw], ("seen", "mean", "rms")
        if not state:
            state.update({name: torch.zeros_like(raw) for name in names})
        return [state[name] for name in names]


#: Torch's optimizers that cannot step along a gradient alone, and what to use besides Adam.
_NO_RULES: dict[type[torch.optim.Optimizer], tuple[str, str]] = {
    torch.optim.LBFGS: (
        "evaluates E again within a step",
        "; or `HOAG`, for a problem at rest",
    ),
    torch.optim.SparseAdam: ("takes sparse gradients alone", ""),
}


def new_rule(factory: OuterFactory, raws: list[Tensor]) -> torch.optim.Optimizer:
    """Return the outer rule for these ρ.

    Raises:
        ArgumentTypeError: it is no torch optimizer, or the factory raised a TypeError.
        ArgumentError: the factory raised another error.
        UnsupportedError: it is one that cannot step along a gradient alone.
    """
    rule = _built(factory, raws)
    if not isinstance(rule, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"`outer` must return a torch optimizer for the raw tensors. Got {kind_of(rule)}. "
            "Pass functools.partial(torch.optim.Adam, lr=0.05)."
        )
    for kind, (does, instead) in _NO_RULES.items():
        if isinstance(rule, kind):
            raise UnsupportedError(
                f"`outer` cannot be {kind.__name__}, which {does}. Use "
                f"functools.partial(torch.optim.Adam, lr=0.05){instead}."
            )
    return rule


def _built(factory: OuterFactory, raws: list[Tensor]) -> Any:
    try:
        return factory(raws)
    except HypertorchError:
        raise
    except Exception as error:
        kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
        shapes = [tuple(raw.shape) for raw in raws]
        raise kind(
            f"`outer` could not be built for ρ of shapes {shapes}. Got {type(error).__name__}: "
            f"{error}. Use functools.partial(torch.optim.Adam, lr=0.05)."
        ) from error


def takes_sparse(rule: torch.optim.Optimizer) -> bool:
    """Return whether a rule says `takes_sparse = True` of itself.

    It then finds a sparse dE/dρ in `.grad` where a window had to do with a few of many numbers; any
    other rule finds a dense one.
    """
    return getattr(rule, "takes_sparse", False)


def _informative(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a hypergradient is not zero, and what it is there."""
    if not gradient.is_sparse:
        where = gradient.reshape(-1).nonzero().squeeze(1)
        return where, gradient.reshape(-1)[where]
    where, values = gradient.indices().squeeze(0), gradient.values()
    informs = values != 0
    return where[informs], values[informs]


def _moved(
    gradient: Tensor,
    raw: Tensor,
    seen: Tensor,
    mean: Tensor,
    rms: Tensor,
    *,
    max_step: float,
    decay: float,
    least: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ρ, the number of windows, and m and √s, after a hypergradient."""
    seen, mean = seen + 1, mean + (1 - decay) * (gradient - mean)
    # √(γ s + (1−γ) h²) without the square, which a float32 does not hold below 1e-19.
    rms = torch.hypot(decay**0.5 * rms, (1 - decay) ** 0.5 * gradient)
    total = 1 - decay**seen
    t = _t_statistic(mean, rms, total, decay)
    if least is not None:  # (error / m̂)² is 1 / t² and what there is at the least
        least = torch.as_tensor(least, dtype=mean.dtype, device=mean.device)
        t = t.sign() / torch.hypot(1 / t, least * total / mean)
    step = max_step / 2 * torch.nn.functional.softshrink(t, 1.0).clamp(-2, 2)
    return raw - step, seen, mean, rms


def _t_statistic(mean: Tensor, rms: Tensor, total: Tensor, decay: float) -> Tensor:
    """Return m̂ / √((ŝ − m̂²) / n), hats dividing by the weights' sum, `total` = Σ w = 1 − γ^k.

    n = (Σ w)² / Σ w² = (1 + γ) / (1 − γ) · total / (2 − total).
    """
    ratio = mean / (rms * total.sqrt())  # m̂ / √ŝ
    n = (1 + decay) / (1 - decay) * total / (2 - total)
    return torch.nan_to_num(ratio * (n / (1 - ratio * ratio).clamp(min=0)).sqrt(), nan=0.0)
