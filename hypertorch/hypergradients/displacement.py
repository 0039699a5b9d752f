"""dE/dη = ∂_w E · (w_K − u_K) / η: where a window has led is, to first order, what η has done.

Each step is −η_t d_t, with η_t = η · schedule(t). Where the directions d_t count as constants,
η ∂w_t/∂η grows by what the step moves, w_t − w_{t-1}, and shrinks with the weights by their decay:
it is w_t − u_t, where u starts at w_0 and is drawn to w by that decay alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dynamics import shrinking
from ..errors import UnsupportedError
from ..hyperparameters import Hyperparameter
from ..settings import Setting
from ..transition import Gradients, Transition
from .averages import Average, AveragingWindow, check_average, wide
from .engine import Carried, Engine, OuterLoss, Training, TrainingStep, added


class Displacement(Engine):
    """Estimate of η's hypergradient from where the window has led. Its steps cost next to nothing.

        dE/dη = ∂_w E(w_K) · (w_K − u_K) / η + ∂_η E,
        u_t = u_{t-1} + c_t (w_{t-1} − u_{t-1}),   u_0 = w_0,   c_t = η̂_t λ

    An optimizer moves the weights by η_t times a direction, which its gradients and buffers say:
    with the directions held constant, all that a window has moved is η's doing, but for what the
    weight decay has taken back. c_t is what a step shrinks the weights by, η_t λ, and with SGD's
    momentum μ and dampening d (1 − d) / (1 − μ) times that; 0 where the decay passes through a
    second moment (Adam, RMSprop, Adagrad). It is `FirstOrder` for η alone: the same number where
    there is no decay or a decoupled one, for SGD without momentum, and for a window of one step,
    where both are exact. With SGD's momentum and a decay it takes the former for settled.

    It learns from `.grad`, so that a training loop stays as it is. With `average` = β it asks at
    averaged weights, as `FirstOrder` does: at w̄_K, against w̄_K − ū_K, both averaged alike. Where
    windows follow each other they begin at the w̄ that the one before has left, so that what w̄
    still owes to earlier steps, which count as constants, is in ū too.

    Args:
        average: β, at least 0 and below 1; `None` takes E at the last weights.

    Raises:
        ArgumentError: `average` is out of its range.

    Cost: one outer gradient per window and a scalar product; per step a vector operation where
    there is a decay, and two for averages. Memory: u, and w̄ and ū.

    Example:
        >>> from hypertorch import HyperOptimizer, Unroll, hypergradient
        >>> model, x, y = torch.nn.Linear(3, 1), torch.ones(4, 3), torch.ones(4, 1)
        >>> def loss():
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> optimizer = HyperOptimizer(sgd, model, outer=None, learn={"lr": "tensor"})
        >>> found = [
        ...     hypergradient(optimizer, [loss] * 5, loss, engine)["lr"]
        ...     for engine in (Displacement(), Unroll())
        ... ]
        >>> bool(torch.cosine_similarity(*found, dim=0) > 0.99)
        True

    References:
        ⟨∇E, w_K − w_0⟩ is what D-Adaptation (Defazio and Mishchenko 2023) and Prodigy estimate a
        step size from, for the training loss; one step of it is Baydin et al. 2018.
    """

    needs = "gradients"
    differentiates_twice = False

    def __init__(self, average: float | None = None) -> None:
        check_average(average, "Displacement")
        self.average = average

    def check(self, training: Training) -> None:
        """Refuse everything but η, and a Φ whose step is not proportional to it.

        Raises:
            UnsupportedError: names it, and engines that can.
        """
        for name in training.hyperparameters:
            if name != "lr" or name in training.in_loss:
                raise UnsupportedError(
                    f"`Displacement` cannot learn `{name}`: what it did is not told apart from "
                    "what the learning rate did. Use `FirstOrder` or `Unroll`."
                )
        for group in training.optimizer.param_groups:
            if not _is_proportional(training, group):
                raise UnsupportedError(
                    f"`Displacement` cannot learn the learning rate of "
                    f"{type(training.optimizer).__name__}: twice the rate is not twice the step. "
                    "Use `FirstOrder` or `Unroll`."
                )

    def open(self, training: Training, carried: Carried | None = None) -> "DisplacementWindow":
        """Start from the present weights."""
        return DisplacementWindow(training, self.average, carried)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1: the outer gradient is all that is added."""
        return horizon + 1

    def __repr__(self) -> str:
        return f"Displacement(average={self.average})"


@torch.no_grad()
def _is_proportional(training: Training, group: Mapping[str, Any]) -> bool:
    """Whether twice η makes twice the step, and the same buffers, from a warm state of Φ."""
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    start, buffers = gradient.flip(0), dict[str, Any]()
    moves, states = [], []
    for _ in range(2):
        weights, buffers = training.dynamics.step(start, gradient, buffers, dict(group), 0)
    for factor in (1.0, 2.0):
        scaled = {**group, "lr": factor * 0.125}
        weights, after = training.dynamics.step(start, -gradient, buffers, scaled, 0)
        moves.append((weights - start) / factor)
        states.append([b for b in after.values() if isinstance(b, Tensor)])
    alike = zip([moves[0], *states[0]], [moves[1], *states[1]], strict=True)
    return all(torch.allclose(one, two, rtol=1e-6, atol=0.0) for one, two in alike)


class DisplacementWindow(AveragingWindow):
    """Live steps, and u: the weights they started from, as far as the decay has not replaced them.

    Args:
        training: what is trained and learned.
        decay: β of the averages, or `None`.
        carried: what the window before returned.
    """

    def __init__(self, training: Training, decay: float | None, carried: Carried | None) -> None:
        super().__init__(training, decay, carried)
        self._past = [w.detach().to(wide(w), copy=True) for w in self.params]  # u
        self._average_past: Average | None = None  # ū, from w̄_0 on
        if (average := self._average) is not None:
            self._average_past = Average(average.decay, self._past, average.carried())
        self._means = training.settings["lr"].group_means().tolist()

    def step(self, step: TrainingStep) -> None:
        """Carry u through the step's decay, then make the step."""
        self._shrink(step.transition)
        step.make(None)
        if self._average is not None and self._average_past is not None:
            self._average.update(self.params, step.transition)
            self._average_past.update(self._past, step.transition)

    @torch.no_grad()
    def _shrink(self, transition: Transition) -> None:
        """u ← u + c (w − u), for the weights that the step will move and a decay will shrink."""
        pairs = iter(zip(self.params, self._past, strict=True))
        for g, group in enumerate(transition.groups):
            own = [next(pairs) for _ in group["params"]]
            moving = [i for i, (w, _) in enumerate(own) if w.grad is not None]
            decay = transition.schedule[g] * _decay(transition, group)
            if not (moving and decay and self._means[g]):
                continue
            past = [own[i][1] for i in moving]
            weights = [own[i][0].to(u) for i, u in zip(moving, past, strict=True)]
            if self.training.settings["lr"].is_scalar:
                torch._foreach_lerp_(past, weights, min(1.0, decay * self._means[g]))
            else:
                rates = self.training.settings["lr"].of_group(g)
                for i, u, w in zip(moving, past, weights, strict=True):
                    u.lerp_(w, (decay * rates[i]).clamp(max=1.0).to(u))

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E, at the last weights or at the averaged ones, and the estimate of dE/dη.

        Raises:
            WindowError: E does not depend on the weights.
        """
        loss, gradient, direct = self._outer_gradient(outer_loss)
        with torch.no_grad():
            present = self.params if self._average is None else self._average.params
            past = self._past if self._average_past is None else self._average_past.params
            moved = torch._foreach_sub(list(present), list(past))
        through = _share(self.training.settings["lr"], gradient, moved)
        return loss, added(direct, {"lr": through})


def _decay(transition: Transition, group: Mapping[str, Any]) -> float:
    """Return c / η: what a step shrinks the weights of a param group by."""
    factor = shrinking(transition.dynamics, group)
    if factor is None:
        return 0.0
    held = group["weight_decay"]
    return factor * float(held() if isinstance(held, Hyperparameter) else held)


def _share(setting: Setting, gradient: Gradients, moved: Sequence[Tensor]) -> Tensor:
    """Return α · (w_K − u_K) / η over the weights that each η moves, of η's shape."""
    rates, of_rates = list[Tensor](), list[Tensor]()
    pairs = iter(zip(gradient, moved, strict=True))
    for g, shapes in enumerate(setting.shapes):
        is_learned = setting.learned_in[g]
        own = setting.of_group(g) if is_learned else []
        for number, _ in enumerate(shapes):
            adjoint, z = next(pairs)
            if adjoint is not None and is_learned:
                rate = own[number] if isinstance(own, list) else own
                along = (adjoint.to(z) * z).sum_to_size(rate.shape)
                rates.append(rate)
                of_rates.append(along.to(rate) / rate.detach())
    (found,) = torch.autograd.grad(rates, setting.value, of_rates)
    return found
