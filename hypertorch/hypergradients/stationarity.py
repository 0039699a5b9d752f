"""A fixed point s* = Φ(s*, λ): what of s rests there, and the linear system in which it moves.

Two systems have the same dE/dλ: M = I − Aᵀ over weights and buffers, for any Φ; and M = ∂r/∂w over
the weights alone, symmetric, where r(w, λ) = 0 is what torch's own Φ comes to rest at.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..dynamics import Dynamics, adagrad, adam, rmsprop, sgd
from ..dynamics.arithmetic import axpy, is_active, regularised
from ..state import Parts, by_place
from ..transition import Gradients, Linearised

_ADAMS = (adam.adam, adam.nadam, adam.radam)
_TORCH_OWN = (*_ADAMS, sgd.sgd, rmsprop.rmsprop, adagrad.adagrad)

#: What the √v of each Φ is made of: second moments, and the mean whose square a centred one
#: subtracts. At g = 0 these do not matter, and √v has no derivative at 0.
_UNDER_THE_ROOT = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum")
_HELD = ("step", "mu_product", *_UNDER_THE_ROOT)

#: t at which every bias correction 1 − βᵗ is 1: a Φ_t that moves with t has no fixed point.
_END = 1e12


def is_torch_own(dynamics: Dynamics) -> bool:
    """Whether Φ is one of torch's, of which is known where it rests."""
    return dynamics.update in _TORCH_OWN


def is_decoupled(dynamics: Dynamics, settings: Mapping[str, Any]) -> bool:
    """Whether weights shrink apart from the gradient, so that g ≠ 0 where they rest."""
    return _decouples(dynamics, settings) and is_active(settings["weight_decay"])


def _decouples(dynamics: Dynamics, settings: Mapping[str, Any]) -> bool:
    """Whether they would, if there is a decay."""
    return dynamics.update in _ADAMS and bool(settings["decoupled_weight_decay"])


class Stationarity(ABC):
    """The system M v = ∂_s E at a step's Φ, and what v says.

    Args:
        linearised: the step, at an (approximate) fixed point.

    Attributes:
        name: the system, for an error to call it by.
    """

    name: ClassVar[str]

    def __init__(self, linearised: Linearised) -> None:
        self.linearised = linearised

    @abstractmethod
    def rhs(self, gradients: Gradients) -> list[Tensor]:
        """Return ∂_s E over the parts of this system, from ∂_w E of each parameter."""

    @abstractmethod
    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return M v."""

    @abstractmethod
    def transposed(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return Mᵀ v."""

    @abstractmethod
    def pulled_back(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the part of dE/dλ that comes through s*: Bᵀ v."""

    @abstractmethod
    def gap(self, v: Sequence[Tensor]) -> Tensor:
        """Return E(s*) − E(s) to first order: ⟨v, Φ(s) − s⟩."""


class OfState(Stationarity):
    """M = I − Aᵀ over weights and buffers, with A = ∂Φ/∂s: of any Φ, and not symmetric.

    What is held fixed: step counters, at a t where Adam's bias corrections have ended; and the
    √v of torch's adaptive Φ where g = 0 at rest. Where Adam's decay is decoupled, g is
    not: m is then taken at the g where it rests, and v as a function of w, g² where it rests.
    """

    name = "M v = ∂_s E with M = I − Aᵀ"

    def __init__(self, linearised: Linearised) -> None:
        super().__init__(linearised.with_buffers(_buffers_at_rest(linearised)))
        self._following = self.linearised.next_state()
        after, before = self._following.parts(), self.linearised.state.parts()
        frozen = linearised.transition.frozen()
        self._parts = {
            place: part
            for place, part in before.items()
            if part.requires_grad
            and not frozen[place[0]]
            and (place[1] == "param" or part.is_leaf)
            and after.get(place, part) is not part
        }

    def rhs(self, gradients: Gradients) -> list[Tensor]:
        """Return ∂_w E, and zeros for the buffers."""
        of_params = by_place(gradients)
        return [of_params.get(place, torch.zeros_like(p)) for place, p in self._parts.items()]

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return v − Aᵀ v."""
        return self._less(v, self.linearised.vjp(self._following, self._named(v))[0])

    def transposed(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return v − A v, where no buffer is a function of w."""
        return self._less(v, self.linearised.jvp(self._named(v), {}))

    def pulled_back(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return Bᵀ v."""
        return self.linearised.vjp(self._following, self._named(v))[1]

    def gap(self, v: Sequence[Tensor]) -> Tensor:
        """Return ⟨v, Φ(s) − s⟩."""
        after = self._following.parts()
        moves = [after[place] - part for place, part in self._parts.items()]
        return _dot(v, moves)

    def _named(self, v: Sequence[Tensor]) -> Parts:
        return dict(zip(self._parts, v, strict=True))

    def _less(self, v: Sequence[Tensor], products: Parts) -> list[Tensor]:
        return [
            x - products[place] if place in products else x
            for place, x in zip(self._parts, v, strict=True)
        ]


def _buffers_at_rest(linearised: Linearised) -> list[dict[str, Any]]:
    """Return the buffers to differentiate Φ at; those that are part of s are leaves."""
    transition, state = linearised.transition, linearised.state
    with torch.no_grad():  # a buffer there is none of yet is as Φ leaves it
        made = transition(state, linearised.settled_grads()).buffers
    settings = transition.parameter_settings()
    found: list[dict[str, Any]] = []
    for grad, own, buffers, new in zip(
        linearised.grads, settings, state.buffers, made, strict=True
    ):
        if grad is None:
            found.append(buffers)
            continue
        held = _HELD if is_torch_own(transition.dynamics) else ("step",)
        buffers = {k: v if k in held else _leaf(v) for k, v in {**new, **buffers}.items()}
        found.append({**buffers, **_of_adam(transition.dynamics, own, grad, new)})
    return found


def _of_adam(
    dynamics: Dynamics, settings: Mapping[str, Any], grad: Tensor, buffers: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the buffers of Adam and its kin at the end of time, and where they rest."""
    if dynamics.update not in _ADAMS:
        return {}
    ends = {"step": _END, "mu_product": 0.0}
    found = {k: torch.full_like(buffers[k], end) for k, end in ends.items() if k in buffers}
    if is_decoupled(dynamics, settings):
        grad = -grad if settings["maximize"] else grad
        found |= {"exp_avg": _leaf(grad), "exp_avg_sq": grad * grad}
    return found


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


class OfWeights(Stationarity):
    """M = ∂r/∂w over the weights alone, where torch's own Φ rests at r(w, λ) = 0: symmetric.

        r = g,                            g = ±∇L + λ w,  decay in the gradient
        r = (λ w + φ(g)) / φ'(g),         g = ±∇L,        decoupled decay; φ(g) = g / (|g| + ε)
        r = P^½ (P⁻¹ g + λ w),            g = ±∇L,        the same with P = √v̂ + ε held

    In the last, v is sought in the coordinates P^½ w, in which training descends: there M is
    P^-½ H P^-½ + λ.

    Buffers are eliminated: momentum rests at 0, and Adam's m and v at g and g². Φ(s) = s means the
    same, whatever η and the momentum are. φ'(g) = ε / (|g| + ε)² is held fixed: at r = 0 its own
    derivative does not count, and with it M would not be symmetric.
    """

    name = "M v = ∂_w E with M = ∂r/∂w, where r(w, λ) = 0 is where the weights rest"

    def __init__(self, linearised: Linearised, holds_preconditioner: bool) -> None:
        super().__init__(linearised)
        transition, params = linearised.transition, linearised.state.params
        settings, dynamics = transition.parameter_settings(), transition.dynamics
        moves = [not is_frozen for is_frozen in transition.frozen()]
        grads = {i: g for i, g in enumerate(linearised.grads) if g is not None and moves[i]}
        buffers = linearised.state.buffers if holds_preconditioner else [{} for _ in params]
        found = [
            _at_rest(dynamics, params[i], g, settings[i], buffers[i]) for i, g in grads.items()
        ]
        self._places, self._params = list(grads), [params[i] for i in grads]
        self._residuals = [r for r, _ in found]
        self._scales = [scale for _, scale in found]
        self._metric = [
            scale if "exp_avg_sq" in buffers[i] and _decouples(dynamics, settings[i]) else None
            for i, scale in zip(grads, self._scales, strict=True)
        ]

    def rhs(self, gradients: Gradients) -> list[Tensor]:
        """Return ∂_w E, or P^-½ ∂_w E."""
        found = [gradients[i] for i in self._places]
        return _scaled(_or_zeros(found, self._params), self._metric)

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return (∂r/∂w) v, or P^-½ (∂r/∂w) P^-½ v."""
        return _scaled(self._products(v, self._params), self._metric)

    def transposed(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return the same: M is symmetric."""
        return self.product(v)

    def pulled_back(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return −(∂r/∂λ)ᵀ v."""
        values = {name: h.value for name, h in self.linearised.hyperparameters.items()}
        products = self._products(v, list(values.values()))
        return {name: -x for name, x in zip(values, products, strict=True)}

    def gap(self, v: Sequence[Tensor]) -> Tensor:
        """Return −⟨v, r⟩, by Newton's step w* ≈ w − M⁻¹ r."""
        return -_dot(_scaled(v, self._scales), self._residuals)

    def _products(self, v: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return (∂r/∂inputs)ᵀ v."""
        pairs = zip(self._residuals, _scaled(v, self._scales), strict=True)
        in_graph = [(r, x) for r, x in pairs if r.requires_grad]
        if not in_graph:
            return [torch.zeros_like(x) for x in inputs]
        residuals, vectors = zip(*in_graph, strict=True)
        found = torch.autograd.grad(
            residuals, inputs, vectors, retain_graph=True, allow_unused=True
        )
        return _or_zeros(found, inputs)


def _at_rest(
    dynamics: Dynamics,
    param: Tensor,
    grad: Tensor,
    settings: Mapping[str, Any],
    held: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Return r(w, λ) up to a factor, and the factor, 1/φ'(g) or P^-½; `None` where it is 1.

    `held` are the buffers of which v̂ is made, or none of them where v̂ follows g².
    """
    decay, maximize = settings["weight_decay"], settings["maximize"]
    is_held = "exp_avg_sq" in held and _decouples(dynamics, settings)
    if not (is_held or is_decoupled(dynamics, settings)):
        return regularised(param, grad, decay, maximize), None
    grad = -grad if maximize else grad
    if dynamics.update is adam.radam and settings["beta2"] <= 2 / 3:  # it never adapts: φ(g) = g
        return axpy(decay, param, grad), None
    eps = settings["eps"]
    if is_held:
        second = held.get("max_exp_avg_sq", held["exp_avg_sq"])
        p = ((second / (1 - settings["beta2"] ** held["step"])).sqrt() + eps).detach()
        return axpy(decay, param * p, grad), p.rsqrt()
    size = grad.abs() + eps
    return axpy(decay, param, grad / size), (size**2 / eps).detach()


def _scaled(v: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
    return [x if s is None else s * x for x, s in zip(v, scales, strict=True)]


def _or_zeros(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if f is None else f for f, x in zip(found, like, strict=True)]


def _dot(v: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack(
            [(x.double() * y.double()).sum() for x, y in zip(v, w, strict=True)]
        ).sum()
