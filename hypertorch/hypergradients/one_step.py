"""Horizon 1: dE/dλ = B_Kᵀ ∂_s E + ∂_λ E, the influence of λ through the last step alone."""

from torch import Tensor

from ..loss_graph import LossGraph
from ..state import CONSTANT, State, by_place, set_state
from ..transition import gradients, vjp
from .engine import (
    Carried,
    Engine,
    OuterLoss,
    Training,
    TrainingStep,
    Window,
    added,
    completed,
    outer_gradient,
)


class OneStep(Engine):
    """Hypergradient through the last step of a window alone, with s_{K-1} taken as constant.

        dE/dλ ≈ B_Kᵀ α + ∂_λ E,   α = ∂_s E at s_K

    Exact for a window of one step: `window=1` is the natural choice, and the cheapest, since the
    earlier steps of a longer one only keep graphs that are thrown away. As an estimate of a longer
    window's hypergradient it drops Σ_{t<K} B_tᵀ A_{t+1}ᵀ … A_Kᵀ α. Where gradient descent with rate
    η has converged, along a direction in which the inner loss curves by h, it sees η h of what
    infinitely many steps would show: next to nothing of what λ does in flat directions.

    Settings of the optimizer take no second derivative of the model. A hyperparameter of the loss
    takes one mixed derivative, ∂_λ ⟨∇L, v⟩, whatever its size: a weight for each of a million
    examples costs what a single number does.

    Cost: K training steps and one outer gradient; with a hyperparameter in the loss also one
    product with second derivatives (about two gradients), and gradients that keep their graphs.
    Memory: one state, and the graph of the last step.

    References:
        Baydin et al. 2018, section 2 (hypergradient descent, there for η and the training loss);
        Luketina et al. 2016 (T1-T2, for hyperparameters of the loss and the validation loss).
    """

    needs = "loss"

    def open(self, training: Training, carried: Carried | None = None) -> "OneStepWindow":
        """Start at the present weights and buffers."""
        return OneStepWindow(training)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1, and 2 more with a hyperparameter in the loss."""
        return horizon + 1 + (2 if training.in_loss else 0)

    def __repr__(self) -> str:
        return "OneStep()"


class OneStepWindow(Window):
    """Steps made by Φ, of which the last is kept as a graph from λ to s_K.

    The weights in the model's slots are cut from it, so that the next step's loss does not see it;
    they are new tensors, since a gradient's graph needs the old ones unchanged.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._last = State.of(training.optimizer)
        self._buffers = self._last.buffers

    def step(self, step: TrainingStep) -> None:
        """Make s_t = Φ_t(s_{t-1}, λ), with s_{t-1} constant, and let go of the step before."""
        has_graph = bool(self.training.in_loss)  # of ∇L, where λ is in it
        loss = step.with_graph()
        graph = LossGraph(loss, self.params)
        graph.check_references()
        if has_graph:
            graph.check_second_derivatives()
        grads = gradients(loss, self.params, create_graph=has_graph)
        step.check(grads)
        before = State([p.detach() for p in self.params], self._buffers)
        self._last = step.transition(before, grads)
        after = self._last.map(Tensor.detach)
        self._buffers = after.buffers
        weights = zip(self.params, after.params, grads, strict=True)
        self.params = self.training.slots.fill(
            [old if g is None else new.requires_grad_() for old, new, g in weights]
        )

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ; one that neither the last step nor E depends on is exactly zero.

        Raises:
            WindowError: E does not depend on the weights.
        """
        values = self.training.values()
        loss, at_end, direct = outer_gradient(outer_loss, self.params, values)  # α
        _, through_step = vjp(CONSTANT, values, self._last, by_place(at_end))  # B_Kᵀ α
        return loss, completed(added(direct, through_step), values)

    def close(self) -> Carried | None:
        """Write the weights and buffers to the live parameters and optimizer."""
        self.training.slots.hand_back(self.params)
        set_state(self.training.optimizer, self._buffers)
        return None
