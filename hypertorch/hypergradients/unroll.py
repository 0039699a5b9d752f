"""Reverse mode on the stored graph: α_K = ∂_s E, α_{t-1} = A_tᵀ α_t, dE/dλ = Σ_t B_tᵀ α_t + ∂_λ E.

`higher` runs the unroll of our Φ; one backward pass of autograd from E is the recursion.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..dynamics import unrolled
from ..errors import WindowError
from ..hyperparameters import Hyperparameter
from ..state import Slots, set_buffers
from .engine import Engine, GradientCheck, Overrides, Window


class Unroll(Engine):
    """Exact hypergradient of a window of K steps, by reverse mode on the stored graph.

    Exact for everything that Φ and the losses are differentiable in, with the weights at the
    window's start taken as constants; it does not see how earlier steps depended on λ (the bias of
    every truncated window). The window's steps are the training steps themselves: the model holds
    the fast weights meanwhile, and nothing is trained twice.

    Cost: K training steps, one outer gradient, and one Hessian-vector product (about two gradients)
    per step, save for the first step when only settings of the optimizer are learned: its gradient
    does not depend on λ. Memory: as many training graphs.

    References:
        Franceschi et al. 2017, eq. (7)-(9); Domke 2012; Maclaurin et al. 2015. The unroll is run by
        Grefenstette et al. 2019 (`higher`), with our Φ in place of theirs.
    """

    needs_loss = True

    def open(
        self, optimizer: torch.optim.Optimizer, slots: Slots, through_loss: bool
    ) -> "UnrolledWindow":
        """Start a graph at the present weights and buffers."""
        return UnrolledWindow(optimizer, slots, through_loss)

    def cost(self, horizon: int, through_loss: bool) -> float:
        """Return K + 1 + 2 (K − 1), or K + 1 + 2 K with a hyperparameter in the loss."""
        return horizon + 1 + 2 * (horizon if through_loss else horizon - 1)

    def __repr__(self) -> str:
        return "Unroll()"


class UnrolledWindow(Window):
    """A window whose steps are one growing graph, its fast weights in the model's own slots."""

    def __init__(self, optimizer: torch.optim.Optimizer, slots: Slots, through_loss: bool) -> None:
        self._optimizer, self._slots = optimizer, slots
        self._gradient_is_constant = not through_loss
        self._unrolled = unrolled(optimizer)
        self.params: list[Tensor] = list(slots.params)
        self._versions = _versions(self.params)

    @property
    def was_written_to(self) -> bool:
        """Whether a weight's version moved on: the graph no longer describes it."""
        return self._versions != _versions(self.params)

    def step(self, loss: Tensor, overrides: Overrides, check: GradientCheck) -> None:
        """Extend the graph by s_t = Φ_t(s_{t-1}, λ)."""

        def checked(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            _check_dependence(grads)
            check(grads)
            self._unrolled._track_higher_grads = True  # the step itself always belongs to the graph
            return grads

        # The first step starts from constants, so its gradient is one, unless the loss has a
        # hyperparameter of its own: no second derivative of that loss is ever asked for.
        self._unrolled._track_higher_grads = not self._gradient_is_constant
        self._gradient_is_constant = False
        self._follow_live_groups()
        params = self._unrolled.step(
            loss, params=self.params, override=overrides, grad_callback=checked
        )
        self.params = self._slots.fill(params)
        self._versions = _versions(self.params)

    def _follow_live_groups(self) -> None:
        """Take over what a scheduler wrote to the live param groups since the last step."""
        groups = zip(self._unrolled.param_groups, self._optimizer.param_groups, strict=True)
        for group, live in groups:
            group.update({k: v for k, v in live.items() if k != "params"})

    def hypergradient(
        self, outer_loss: Tensor, hyperparameters: Mapping[str, Hyperparameter]
    ) -> dict[str, Tensor]:
        """Return dE/dλ; one that E does not depend on is exactly zero.

        Raises:
            WindowError: the graph was written to or freed meanwhile, or E is another model's.
        """
        values = [h.value for h in hyperparameters.values()]
        try:
            gradients = torch.autograd.grad(outer_loss, values, allow_unused=True)
            if all(gradient is None for gradient in gradients):
                self._check_outer_dependence(outer_loss)
        except RuntimeError as error:
            if any(symptom in str(error) for symptom in _GRAPH_IS_BROKEN):
                raise _broken_graph() from error
            raise
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for name, value, gradient in zip(hyperparameters, values, gradients, strict=True)
        }

    def _check_outer_dependence(self, outer_loss: Tensor) -> None:
        trainable = [p for p in self.params if p.requires_grad]
        gradients = torch.autograd.grad(outer_loss, trainable, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise WindowError(
                "The outer loss does not depend on the weights that train. Compute it from the "
                "`model` that was wrapped, not from a copy or an average of it."
            )

    def close(self) -> None:
        """Write the fast weights and buffers to the live parameters and optimizer."""
        self._slots.hand_back(self.params)
        set_buffers(self._optimizer, self._unrolled.state)


def _check_dependence(grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise WindowError(
            "The loss does not depend on the model's present weights. Compute it from "
            "`model` after the previous step, and call `step(loss)` once per loss."
        )


#: How torch says that a tensor of the graph was written to, or its graph freed.
_GRAPH_IS_BROKEN = ("modified by an inplace operation", "backward through the graph a second time")


def _broken_graph() -> WindowError:
    return WindowError(
        "The window cannot be differentiated: something wrote to a tensor in its graph, or ran "
        "backward through it. Where its losses use weights that another optimizer trains, wrap "
        "that one too, with the same `window` and `update_every`, and detach what a loss does "
        "not train."
    )


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    return [t._version for t in tensors]
