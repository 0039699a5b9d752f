"""One training step as a function, s_t = Φ_t(s_{t-1}, λ), and its derivatives as products.

A_t = ∂Φ_t/∂s_{t-1} and B_t = ∂Φ_t/∂λ are never formed: only A z + B e, αᵀA and αᵀB are. The inner
loss's gradient is part of Φ_t, so that each product contains one Hessian-vector product.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from .double_backward import seed
from .dynamics import Dynamics, read_setting
from .errors import WindowError
from .hyperparameters import Hyperparameter, all_at, number_of
from .loss_graph import LossGraph
from .settings import Setting, where_learned
from .state import Parts, State, base_rate, by_place

#: Learned settings by name, each a list over the param groups; a number where it is not learned.
Overrides = dict[str, list[Tensor | list[Tensor] | float]]
Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Transition:
    """Φ_t of one step, for given gradients: s_t = Φ(s_{t-1}, g_t, λ).

    Attributes:
        dynamics: Φ of one tensor.
        groups: the param groups as they were at step t.
        settings: what is learned of them; their values are asked for at each call.
        schedule: η_t / η of each group.
    """

    dynamics: Dynamics
    groups: list[dict[str, Any]]
    settings: Mapping[str, Setting]
    schedule: list[float]

    def frozen(self) -> list[bool]:
        """Return for each parameter whether its group's η is 0, beside another whose is not."""
        is_learned = where_learned(self.settings, "lr", len(self.groups))
        rates = [number_of(base_rate(group)) for group in self.groups]
        both = zip(is_learned, rates, strict=True)
        moves = [own or bool(cast(Tensor, rate).any()) for own, rate in both]
        pairs = zip(moves, self.groups, strict=True)
        return [any(moves) and not own for own, group in pairs for _ in group["params"]]

    def overrides(self) -> Overrides:
        """Return what Φ uses in place of the groups' numbers: η_t and the other learned λ."""
        return {name: self._by_group(name, setting) for name, setting in self.settings.items()}

    def _by_group(self, name: str, setting: Setting) -> list[Tensor | list[Tensor] | float]:
        factors = self.schedule if name == "lr" else [1.0] * len(self.groups)
        return [
            _scaled(setting.of_group(g), factor)
            if setting.learned_in[g]
            else read_setting(group, name)
            for g, (group, factor) in enumerate(zip(self.groups, factors, strict=True))
        ]

    def _places(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield, for each parameter, its group with what is learned, and its number there."""
        overrides = self.overrides()
        for g, live in enumerate(self.groups):
            group = {**live, **{name: by_group[g] for name, by_group in overrides.items()}}
            yield from ((group, i) for i in range(len(group["params"])))

    def parameter_settings(self) -> list[dict[str, Any]]:
        """Return the settings that Φ has for each parameter, the learned ones as tensors."""
        return [self.dynamics.settings(group, i) for group, i in self._places()]

    def __call__(self, state: State, grads: Gradients) -> State:
        """Return s_t; a parameter without a gradient stays as it is."""
        params, buffers = list(state.params), list(state.buffers)
        for index, (group, i) in enumerate(self._places()):
            grad = grads[index]
            if grad is not None:
                params[index], buffers[index] = self.dynamics.step(
                    params[index], grad, buffers[index], group, i
                )
        return State(params, buffers)


def _scaled(lr: Tensor | list[Tensor], factor: float) -> Tensor | list[Tensor]:
    if factor == 1.0:
        return lr
    return [part * factor for part in lr] if isinstance(lr, list) else lr * factor


class Linearised:
    """Φ_t at one state, ready to be multiplied by its derivatives, any number of times.

    Args:
        transition: Φ_t.
        state: s_{t-1}; `loss` was computed at its weights.
        loss: the inner loss, with its graph.
        hyperparameters: λ, by name, those in the loss included.

    Attributes:
        grads: ∇L at s_{t-1}, with its graph.

    Raises:
        WindowError: the loss does not depend on the weights.
        UnsupportedError: it cannot be differentiated twice.

    Cost: one gradient with its graph; a `vjp` or `jvp` is about two gradients.
    """

    def __init__(
        self,
        transition: Transition,
        state: State,
        loss: Tensor,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> None:
        self.transition, self.state, self.hyperparameters = transition, state, hyperparameters
        self._values = {name: h.value for name, h in hyperparameters.items()}
        in_loss = {n: h.value for n, h in hyperparameters.items() if not isinstance(h, Setting)}
        self._joint = [*trainable(state.params), *in_loss.values()]
        self._in_loss = list(in_loss)
        self._loss_graph = LossGraph(loss, state.params)
        self._loss_graph.check_references()
        self._loss_graph.check_second_derivatives()
        self._gradient = torch.autograd.grad(
            loss, self._joint, seed(loss), create_graph=True, allow_unused=True
        )
        self.grads = per_parameter(self._gradient, state.params)
        check_dependence(self.grads)

    def leaves(self) -> set[int]:
        """Return the ids of the leaves that the inner loss is differentiable in."""
        return self._loss_graph.leaves()

    def settled_grads(self) -> list[Tensor | None]:
        """Return ∇L without its graph: numbers to step along."""
        return [None if g is None else g.detach() for g in self.grads]

    def next_state(self) -> State:
        """Return s_t, in the graph of s_{t-1} and λ."""
        return self.transition(self.state, self.grads)

    def with_buffers(self, buffers: list[dict[str, Any]]) -> "Linearised":
        """Return Φ_t at the same weights and gradients, from other buffers."""
        other = copy(self)
        other.state = State(self.state.params, buffers)
        other.__dict__.pop("_push", None)
        return other

    def vjp(self, following: State, adjoint: Parts) -> tuple[Parts, dict[str, Tensor]]:
        """Return α_{t-1} = A_tᵀ α_t and B_tᵀ α_t.

        Args:
            following: s_t, what `next_state` returned, whose graph is kept.
            adjoint: α_t, over the parts of s_t; a missing one is zero.
        """
        return vjp(self.state, self._values, following, adjoint)

    def jvp(self, tangent: Parts, direction: Mapping[str, Tensor]) -> Parts:
        """Return A_t z + B_t e, over the parts of s_t.

        The gradient's own tangent, H z + ∂_λ∇L e, is a gradient of ∇L again, since the Hessian of L
        in (w, λ) is symmetric: no forward mode of the model is needed.

        Args:
            tangent: z, over the parts of s_{t-1}; a missing one is zero.
            direction: e, by hyperparameter; a missing one is zero.
        """
        return self._push(tangent, self._tangent_of_gradient(tangent, direction), direction)

    @cached_property
    def _push(self) -> "PushForward":
        return PushForward(self.transition, self.state, self.grads, self.hyperparameters)

    def _tangent_of_gradient(
        self, tangent: Parts, direction: Mapping[str, Tensor]
    ) -> list[Tensor | None]:
        """Return H z + ∂_λ∇L e, one entry per parameter."""
        places = [(i, "param") for i, p in enumerate(self.state.params) if p.requires_grad]
        along = [tangent.get(place) for place in places]
        along += [direction.get(name) for name in self._in_loss]
        pairs = [
            (g, z)
            for g, z in zip(self._gradient, along, strict=True)
            if g is not None and z is not None and g.requires_grad
        ]
        if not pairs:
            return [None] * len(self.state.params)
        gradients, vectors = zip(*pairs, strict=True)
        targets = self._joint[: len(places)]
        found = torch.autograd.grad(
            gradients, targets, vectors, allow_unused=True, retain_graph=True
        )
        return per_parameter(found, self.state.params)


def vjp(
    state: State,
    values: Mapping[str, Tensor],
    following: State,
    adjoint: Parts,
    keeps_graph: bool = True,
) -> tuple[Parts, dict[str, Tensor]]:
    """Return α_{t-1} = A_tᵀ α_t and B_tᵀ α_t; what does not depend on α_t is missing.

    Args:
        state: s_{t-1}.
        values: λ, by name.
        following: s_t, in the graph of both.
        adjoint: α_t, over the parts of s_t; a missing one is zero.
        keeps_graph: whether the graph can be gone through again.
    """
    outputs = {k: p for k, p in following.parts().items() if k in adjoint and p.requires_grad}
    earlier = {k: p for k, p in state.parts().items() if p.requires_grad}
    found = torch.autograd.grad(
        list(outputs.values()),
        [*earlier.values(), *values.values()],
        [adjoint[k] for k in outputs],
        allow_unused=True,
        retain_graph=keeps_graph,
    )
    parts = dict(zip(earlier, found, strict=False))
    by_name = zip(values, found[len(earlier) :], strict=True)
    return (
        {k: part for k, part in parts.items() if part is not None},
        {name: part for name, part in by_name if part is not None},
    )


class PushForward:
    """Φ alone at one state and gradient, ready to carry tangents forward, any number of times.

    Reverse mode gives u ↦ (∂Φ)ᵀ u, which is linear in u; reverse mode through that, its transpose,
    is z ↦ ∂Φ z. Φ is linearised once for every z, and is asked for no forward mode, in which torch
    spends far longer on an operation one of whose arguments has no tangent.

    Args:
        transition: Φ_t.
        state: s_{t-1}.
        grads: g_t, per parameter.
        hyperparameters: λ, by name.

    Cost: about four steps of Φ, and two more for each call; no gradient.
    """

    def __init__(
        self,
        transition: Transition,
        state: State,
        grads: Gradients,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> None:
        parts = {place: leaf(part) for place, part in state.parts().items()}
        gradients = [None if g is None else leaf(g) for g in grads]
        values = {name: leaf(h.value) for name, h in hyperparameters.items()}
        inputs: dict[Any, Tensor] = {**parts, **by_place(gradients, "gradient"), **values}
        with torch.enable_grad(), all_at(hyperparameters, values):
            after = transition(state.replaced(parts), gradients).parts()
            following = {place: part for place, part in after.items() if part.requires_grad}
            probes = {
                k: torch.zeros_like(part, requires_grad=True) for k, part in following.items()
            }
            transposed = torch.autograd.grad(
                list(following.values()),
                list(inputs.values()),
                list(probes.values()),
                create_graph=True,
                allow_unused=True,
            )
        self._probes = probes  # u
        pairs = zip(inputs, transposed, strict=True)
        self._transposed = {k: t for k, t in pairs if t is not None and t.requires_grad}

    def __call__(
        self, tangent: Parts, of_grads: Gradients, direction: Mapping[str, Tensor]
    ) -> Parts:
        """Return the tangent of s_t = Φ(s_{t-1}, g_t, λ).

        Args:
            tangent: of s_{t-1}; a missing part is zero.
            of_grads: of g_t, per parameter; `None` is zero.
            direction: of λ, by name; a missing one is zero.
        """
        along: dict[Any, Tensor] = {**tangent, **by_place(of_grads, "gradient"), **direction}
        pairs = [(self._transposed[k], z) for k, z in along.items() if k in self._transposed]
        if not pairs:
            return {}
        found = torch.autograd.grad(
            [t for t, _ in pairs],
            list(self._probes.values()),
            [z.to(t) for t, z in pairs],
            allow_unused=True,
            retain_graph=True,
        )
        return {k: z for k, z in zip(self._probes, found, strict=True) if z is not None}


def leaf(tensor: Tensor) -> Tensor:
    """Return a tensor cut from its graph, to be differentiated in."""
    return tensor.detach().requires_grad_()


def trainable(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that require a gradient."""
    return [p for p in params if p.requires_grad]


def per_parameter(found: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return one entry per parameter, of those found for the `trainable` ones in order."""
    own = iter(found)
    return [next(own) if p.requires_grad else None for p in params]


def gradients(
    loss: Tensor, params: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """Return ∇loss, one entry per parameter: `None` where there is none.

    Raises:
        WindowError: the loss depends on none of them.
    """
    start = seed(loss) if create_graph else None
    found = torch.autograd.grad(
        loss, trainable(params), start, create_graph=create_graph, allow_unused=True
    )
    grads = per_parameter(found, params)
    check_dependence(grads)
    return grads


def check_dependence(grads: Gradients) -> None:
    """Raise if no weight has a gradient: the loss was computed from other weights."""
    if all(grad is None for grad in grads):
        raise WindowError(
            "The loss does not depend on the model's present weights. Compute it from "
            "`model` after the previous step, and call `step(loss)` once per loss."
        )
