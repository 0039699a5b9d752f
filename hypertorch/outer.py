"""How ρ moves: ρ_{k+1} = ρ_k − step_k, from one noisy hypergradient h_k = dE/dρ per window.

The default rule needs no tuning; any `torch.optim` optimizer over the ρ can take its place.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError

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

    Args:
        params: the raw ρ.
        max_step: κ, in ρ's units: for a positive λ, nats (0.2 is 22 % at most per update). Or one
            for each hyperparameter, in the order in which they are learned.
        decay: γ in [0, 1).

    Cost: two vectors of ρ's size; no host synchronisation.

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

    def __init__(
        self,
        params: Iterable[Tensor],
        max_step: float | Sequence[float] = 0.2,
        decay: float = 0.8,
    ) -> None:
        params = list(params)
        if not isinstance(max_step, (int, float)) and len(max_step) != len(params):
            raise ArgumentError(
                "`max_step` of GatedSign must be a number, or one for each hyperparameter. "
                f"Got {len(max_step)} for {len(params)}."
            )
        super().__init__(params, {"max_step": max_step, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every ρ that has a gradient."""
        for group in self.param_groups:
            most, params = group["max_step"], group["params"]
            steps = [most] * len(params) if isinstance(most, (int, float)) else most
            together: dict[Any, list[Tensor]] = {}
            for raw, max_step in zip(params, steps, strict=True):
                if raw.grad is None:
                    continue
                if raw.numel() >= _MANY and raw.device.type == "cpu":
                    self._move_some_of(raw, raw.grad, max_step, group["decay"])
                else:
                    together.setdefault((max_step, raw.dtype, raw.device), []).append(raw)
            for (max_step, *_), raws in together.items():
                self._move(raws, max_step, group["decay"])

    def _move(self, raws: list[Tensor], max_step: float, decay: float) -> None:
        """Move several ρ as one vector."""
        parts = list(zip(*[(raw, *self._averages(raw)) for raw in raws], strict=True))
        gradient, *before = (
            torch.cat([tensor.reshape(-1) for tensor in part])
            for part in ([raw.grad for raw in raws], *parts)
        )
        after = _moved(gradient, *before, max_step=max_step, decay=decay)
        informs, sizes = gradient != 0, [raw.numel() for raw in raws]
        for part, old, new in zip(parts, before, after, strict=True):
            pieces = torch.where(informs, new, old).split(sizes)
            shaped = [x.view(raw.shape) for x, raw in zip(pieces, raws, strict=True)]
            torch._foreach_copy_(part, shaped)

    def _move_some_of(self, raw: Tensor, gradient: Tensor, max_step: float, decay: float) -> None:
        """Move the entries of a ρ that have a hypergradient: a batch's, of a weight per example."""
        parts = [raw, *self._averages(raw)]
        where = gradient.reshape(-1).nonzero().squeeze(1)
        few = [part.reshape(-1)[where] for part in (gradient, *parts)]
        moved = _moved(*few, max_step=max_step, decay=decay)
        for part, new in zip(parts, moved, strict=True):
            part.view(-1)[where] = new

    def _averages(self, raw: Tensor) -> list[Tensor]:
        """Return how many windows there were, m and √s."""
        state, names = self.state[raw], ("seen", "mean", "rms")
        if not state:
            state.update({name: torch.zeros_like(raw) for name in names})
        return [state[name] for name in names]


#: From here on, on a CPU, it pays to look for the ρ that have a hypergradient at all.
_MANY = 2**14


def _moved(
    gradient: Tensor,
    raw: Tensor,
    seen: Tensor,
    mean: Tensor,
    rms: Tensor,
    *,
    max_step: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ρ, the number of windows, and m and √s, after a hypergradient."""
    seen, mean = seen + 1, mean + (1 - decay) * (gradient - mean)
    # √(γ s + (1−γ) h²) without the square, which a float32 does not hold below 1e-19.
    rms = torch.hypot(decay**0.5 * rms, (1 - decay) ** 0.5 * gradient)
    t = _t_statistic(mean, rms, 1 - decay**seen, decay)
    step = max_step * (torch.nn.functional.softshrink(t, 1.0) / 2).clamp(-1, 1)
    return raw - step, seen, mean, rms


def _t_statistic(mean: Tensor, rms: Tensor, total: Tensor, decay: float) -> Tensor:
    """Return m̂ / √((ŝ − m̂²) / n), hats dividing by the weights' sum, `total` = Σ w = 1 − γ^k.

    n = (Σ w)² / Σ w² = (1 + γ) / (1 − γ) · total / (2 − total).
    """
    ratio = mean / (rms * total.sqrt())  # m̂ / √ŝ
    n = (1 + decay) / (1 - decay) * total / (2 - total)
    return torch.nan_to_num(ratio * (n / (1 - ratio * ratio).clamp(min=0)).sqrt(), nan=0.0)
