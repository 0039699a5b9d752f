"""The window without its Hessian terms: z_t = ∂Φ/∂s · z_{t-1} + ∂Φ/∂λ, dE/dλ = ∂_w E · z_K + ∂_λ E.

The gradients g_t of the inner loss count as constants; everything else of Φ is differentiated.
"""

import torch
from torch import Tensor

from ..dual_numbers import NoRule, dual
from ..errors import UnsupportedError
from ..state import State
from .averages import AveragingWindow, check_average
from .engine import Carried, Engine, OuterLoss, Training, TrainingStep, added
from .linear_tangents import LinearTangents, is_linear
from .pointwise import PointwiseTangents
from .shelf import Spare


class FirstOrder(Engine):
    """Estimate of a window's hypergradient without second derivatives, from `.grad` alone.

        z_t = ∂Φ/∂s · z_{t-1} + ∂Φ/∂λ,   z_0 = 0,   dE/dλ = ∂_w E(w_K) · z_K + ∂_λ E

    with the gradients g_t of the inner loss taken as constants: what is dropped is ∂g_t/∂w · z, the
    Hessian's part. It learns from `.grad`, so that a training loop stays as it is,
    `zero_grad(); loss.backward(); optimizer.step()`, and gradient accumulation, clipping, scaled
    gradients, compiled models and trainers that own the loop work as they are.

    Exact for a window of one step, and where the inner loss is linear in the weights. Elsewhere an
    estimate: a factor 1 − η H is missing from each step that follows, so that the error grows like
    η ‖H‖ K while that is small, and momentum μ counts for 1 / (1 − μ) times as much. On digits (a
    ReLU network; one η and one λ per tensor) its cosine with the exact hypergradient is above 0.999
    up to K = 20 while η stays clear of the edge of stability. At the edge, where η ‖H‖ nears
    2 (1 + μ), that of λ stays there, but that of η falls, and its sign turns from K = 5 or 20 on:
    what an oscillation overshoots by, it takes for progress. The example shows how to look.

    **Averaged weights.** With `average` = β the outer loss is taken at exponentially averaged
    weights, against their own tangent, averaged alike:

        w̄_t = w̄_{t-1} + a_t (w_t − w̄_{t-1}),   a_t = (1 − β) / (1 − βᵗ),   dE/dλ = ∂_w E(w̄_K) · z̄_K

    w̄ remembers about 1 / (1 − β) steps. Where windows follow each other (`window` equals
    `update_every`) w̄ and t go on from one to the next; z̄ starts at zero in each, as z does, since
    the weights and averages that a window starts from count as constants. Elsewhere an engine does
    not see the steps in between, and the average is over the window's own weights. It starts afresh
    after a rollback; weights that somebody loads between two windows count as a step. Module
    buffers (BatchNorm's statistics) stay those of the last weights.

    Args:
        average: β, at least 0 and below 1; `None` takes E at the last weights.

    Raises:
        ArgumentError: `average` is out of its range.

    Cost: one outer gradient per window; its steps cost no gradient. With SGD (Φ is linear) and no
    setting per element, a step costs a copy of its gradient, however many settings there are.
    Elsewhere it costs, for each setting, vector operations as for one or two steps of the
    optimizer, be it one number or one for each weight: they weigh where weights are many and
    batches small, and a short window is cheap there. Memory, however long the window: with SGD the
    weights, buffers and gradients, up to 24 vectors, or 256 MB (at least two vectors for each
    setting and six more); elsewhere, for each setting a tangent of the weights and of each buffer
    that it acts on. Averages add w̄, and z̄ for each setting.

    Example:
        >>> from functools import partial
        >>> from hypertorch import HyperOptimizer, Unroll, hypergradient
        >>> model, x, y = torch.nn.Linear(3, 1), torch.ones(4, 3), torch.ones(4, 1)
        >>> def loss():
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
        >>> optimizer = HyperOptimizer(sgd, model, outer=None, learn={"lr": "tensor"})
        >>> found = [
        ...     hypergradient(optimizer, [loss] * 5, loss, engine)["lr"]
        ...     for engine in (FirstOrder(), Unroll())
        ... ]
        >>> bool(torch.cosine_similarity(*found, dim=0) > 0.99)
        True

    References:
        Sharifnassab et al. 2024 (MetaOptimize) drop the Hessian in the same way, for the step size
        and the training loss, in a trace that decays; with K = 1 and that loss it is Baydin et al.
        2018. For averaged weights see Polyak and Juditsky 1992.
    """

    needs = "gradients"
    differentiates_twice = False

    def __init__(self, average: float | None = None) -> None:
        check_average(average, "FirstOrder")
        self.average = average
        self._spare = Spare()

    def check(self, training: Training) -> None:
        """Refuse hyperparameters of the loss or in a param group, and a Φ that mixes weights.

        Raises:
            UnsupportedError: names it, and engines that can.
        """
        held = training.in_dynamics
        for name in training.in_loss:
            why = "it is in the loss, and acts on the weights through a second derivative"
            if name in held:
                why = "a param group holds it, and tangents are of what is a number there"
            raise UnsupportedError(
                f"`FirstOrder` cannot learn `{name}`: {why}. Use `OneStep`, `Unroll` or `Replay`."
            )
        try:
            _check_pointwise(training)
        except NoRule as operation:
            raise UnsupportedError(
                f"`FirstOrder` cannot differentiate {type(training.optimizer).__name__}: "
                f"its Φ uses `{operation}`, for which it has no rule. Use `OneStep`, `Unroll` or "
                "`Replay`."
            ) from operation

    def open(self, training: Training, carried: Carried | None = None) -> "FirstOrderWindow":
        """Start at z = 0."""
        return FirstOrderWindow(training, _tangents(training, self._spare), self.average, carried)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1: the outer gradient is all that is added."""
        return horizon + 1

    def __repr__(self) -> str:
        return f"FirstOrder(average={self.average})"


def _tangents(training: Training, spare: Spare) -> PointwiseTangents | LinearTangents:
    """Return z = 0, not to be formed where Φ allows it."""
    settings, groups = training.settings, training.optimizer.param_groups
    has_few = all(h.granularity != "element" for h in settings.values())
    if has_few and all(is_linear(training.dynamics, group) for group in groups):
        return LinearTangents(settings, spare, training.start)
    return PointwiseTangents(settings)


def _check_pointwise(training: Training) -> None:
    """Carry tangents through two steps of Φ for two weights, in each param group."""
    with torch.no_grad():
        for live in training.optimizer.param_groups:
            values = {name: h.value.detach().mean().cpu() for name, h in training.settings.items()}
            group = {**live, **{name: dual(value, {name: 1.0}) for name, value in values.items()}}
            weights, buffers = torch.tensor([0.5, 1.0]), dict[str, Tensor]()
            for _ in range(2):
                gradient = torch.tensor([1.0, -2.0])
                weights, buffers = training.dynamics.step(weights, gradient, buffers, group, 0)


class FirstOrderWindow(AveragingWindow):
    """Live steps, and z at the last of them.

    Args:
        training: what is trained and learned.
        tangents: z = 0.
        decay: β of the averages, or `None`.
        carried: what the window before returned.
    """

    def __init__(
        self,
        training: Training,
        tangents: PointwiseTangents | LinearTangents,
        decay: float | None,
        carried: Carried | None,
    ) -> None:
        super().__init__(training, decay, carried)
        self._tangents = tangents

    def step(self, step: TrainingStep) -> None:
        """Carry z through Φ_t, then make the step."""
        state = State.of(self.training.optimizer)
        self._tangents.push(step.transition, state, [p.grad for p in state.params])
        step.make(None)
        if self._average is not None:
            self._tangents.average(self._average.update(state.params, step.transition))

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E, at the last weights or at the averaged ones, and the estimate of dE/dλ.

        Raises:
            WindowError: E does not depend on the weights.
        """
        loss, gradient, direct = self._outer_gradient(outer_loss)
        along = self._tangents.along(gradient, "param" if self._average is None else "average")
        return loss, added(along, direct)

    def close(self) -> Carried | None:
        """Let go of z; return what the average goes on from."""
        self._tangents.close()
        return super().close()
