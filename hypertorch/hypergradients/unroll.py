"""Reverse mode on the stored graph: α_K = ∂_s E, α_{t-1} = A_tᵀ α_t, dE/dλ = Σ_t B_tᵀ α_t + ∂_λ E.

`higher` runs the unroll of our Φ; one backward pass of autograd from E is the recursion. Where a
loss uses other leaves (an input that requires a gradient), the graph is cut after its step: who
differentiates a later loss in them is to see the weights, and not how they came about.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..double_backward import seed
from ..dynamics import unrolled
from ..entries import settled, sparse_gradients
from ..errors import WindowError
from ..loss_graph import LossGraph
from ..state import CONSTANT, State, by_place, set_state
from ..transition import check_dependence, vjp
from .engine import (
    Carried,
    Engine,
    OuterLoss,
    Training,
    TrainingStep,
    Window,
    added,
    completed,
    independent_outer_loss,
)


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

    needs = "loss"

    def prepare(self, training: Training) -> None:
        """Let a λ of many numbers in the loss be differentiated where it is indexed alone."""
        training.expect_rows()

    def open(self, training: Training, carried: Carried | None = None) -> "UnrolledWindow":
        """Start at the present weights and buffers."""
        return UnrolledWindow(training)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1 + 2 (K − 1), or K + 1 + 2 K with a hyperparameter in the loss."""
        return horizon + 1 + 2 * (horizon if training.in_loss else horizon - 1)

    def __repr__(self) -> str:
        return "Unroll()"


class UnrolledWindow(Window):
    """A window whose steps are one growing graph, its fast weights in the model's own slots."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._unrolled = unrolled(training.optimizer)
        self._own = {id(t) for t in (*self.params, *training.values().values())}
        self._gradient_is_constant = not training.in_loss
        self._start = CONSTANT  # of the present graph: leaves
        self._cut_off: list[tuple[State, State]] = []  # graphs before it: from where to where
        self._leaves = {id(p) for p in self.params}  # where the present graph begins, by their ids
        self._former: set[int] = set()  # those where one of the others does

    def step(self, step: TrainingStep) -> None:
        """Extend the graph by s_t = Φ_t(s_{t-1}, λ)."""

        def checked(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            check_dependence(grads)
            step.check(grads)
            self._unrolled._track_higher_grads = True  # the step itself always belongs to the graph
            return grads

        # The first step starts from constants, so its gradient is one, unless the loss has a
        # hyperparameter of its own: no second derivative of that loss is ever asked for.
        is_constant, self._gradient_is_constant = self._gradient_is_constant, False
        self._unrolled._track_higher_grads = not is_constant
        self._follow_groups(step.transition.groups)
        loss = step.with_graph()
        graph = LossGraph(loss, self.params)
        if not is_constant:
            graph.check_references(self._former)
            graph.check_second_derivatives()
        params = self._unrolled.step(
            loss * seed(loss),  # `higher` begins backward with a 1 of its own
            params=self.params,
            override=step.transition.overrides(),
            grad_callback=checked,
        )
        self.params = self.training.slots.fill(params)
        if not is_constant and not graph.leaves() <= self._own:
            self._cut()

    def _present(self) -> State:
        return State(self.params, [states.get(i, {}) for states, i in self._places()])

    def _places(self) -> Iterator[tuple[dict[int, dict[str, Any]], int]]:
        """Yield, for each parameter, its group's buffers in `higher`, and its number there."""
        for states, group in zip(self._unrolled.state, self._unrolled.param_groups, strict=True):
            yield from ((states, i) for i in range(len(group["params"])))

    def _cut(self) -> None:
        """Keep the graph so far, and go on from leaves in its place."""
        end = self._present()
        self._cut_off.append((self._start, end))
        leaves = end.map(_leaf)
        self._former |= self._leaves
        self._leaves = {
            id(new) for new, old in zip(leaves.params, end.params, strict=True) if new is not old
        }
        self.params = self.training.slots.fill(leaves.params)
        self._start = State(self.params, leaves.buffers)
        for (states, i), buffers in zip(self._places(), leaves.buffers, strict=True):
            states[i] = buffers

    def _follow_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over what a scheduler wrote to the param groups since the last step."""
        for group, live in zip(self._unrolled.param_groups, groups, strict=True):
            group.update({k: v for k, v in live.items() if k != "params"})

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ; one that E does not depend on is exactly zero.

        Raises:
            WindowError: the graph was written to or freed meanwhile, or E is another model's.
        """
        values, loss = self.training.values(), outer_loss()
        graph = LossGraph(loss, self.params)
        graph.check_references(self._former)
        if not (graph.reaches_weights() or graph.leaves() & (self._former | self._leaves)):
            raise independent_outer_loss()  # not even of earlier weights of the window
        try:
            with sparse_gradients():
                one = by_place([torch.ones_like(loss)])
                adjoint, total = vjp(
                    self._start, values, State([loss], [{}]), one, keeps_graph=bool(self._cut_off)
                )
                while self._cut_off:
                    start, end = self._cut_off.pop()
                    adjoint, found = vjp(start, values, end, adjoint)
                    total = added(total, found)
        except RuntimeError as error:
            if any(symptom in str(error) for symptom in _GRAPH_IS_BROKEN):
                raise _broken_graph() from error
            raise
        return loss.detach(), settled(completed(total, values))

    def close(self) -> Carried | None:
        """Write the fast weights and buffers to the live parameters and optimizer."""
        self.training.slots.hand_back(self.params)
        set_state(self.training.optimizer, self._present().buffers)
        return None


def _leaf(part: Tensor) -> Tensor:
    """Return a part of s_t cut from its graph, if it has one."""
    return part if part.is_leaf else part.detach().requires_grad_()


#: How torch says that a tensor of the graph was written to, or its graph freed.
_GRAPH_IS_BROKEN = ("modified by an inplace operation", "backward through the graph a second time")


def _broken_graph() -> WindowError:
    return WindowError(
        "The window cannot be differentiated: something wrote to a tensor in its graph, or ran "
        "backward through it. If you write to the weights, as in clipping, take them from "
        "`model.parameters()` each time, not from a list made before the window. Where its losses "
        "use weights that another optimizer trains, wrap that one too, with the same `window` and "
        "`update_every`, and detach what a loss does not train. Where the backward of an autograd "
        "function runs the model again (adjoint solvers), use `Replay()`, whose weights are those "
        "of the step."
    )
