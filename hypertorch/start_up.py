"""Where learning starts: `search_lr` for η, and `start_weight_decay` for λ.

A hypergradient says which way η should move, not how far; and a window at a far too large η ruins
the weights before λ can follow. From any starting value, short trials settle η. What a weight decay
does within a run depends on η and on how often the run comes by each example.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .arguments import check_outer_loss, whole
from .dynamics import dynamics_of, shrinking
from .errors import ArgumentError, HypertorchWarning, UnsupportedError
from .functional import as_it_was, check_wrapped, closures
from .hypergradients import OuterLoss
from .hypergradients.linear_system import length
from .inner_loss import checked, one_batch
from .optimizer import HyperOptimizer
from .param_groups import LearnedGroups
from .settings import Setting
from .state import base_rate, set_gradients
from .surroundings import leaving_no_trace
from .transition import gradients

#: The share of its loss that the first step of the first trial would take away, about.
MODEST = 0.01
#: The share of E that a trial must take away to say something of η.
TELLING = 0.01
#: A trial ends where its loss is so many times the largest one of a better trial.
RUINED = 3.0
#: Epochs over which a weight is to be an average of its updates.
TIMESCALE = 10
#: How many times their initial size Adam's weights may reach against the first λ.
ROOM = 10


def search_lr(
    optimizer: HyperOptimizer,
    inner_losses: Sequence[Callable[[], Tensor]],
    outer_loss: OuterLoss | None = None,
    *,
    outer_batches: int = 1,
) -> dict[float, float]:
    """Let the learned η start where a few training steps lower the outer loss most.

    Each trial makes the same K training steps from the present weights and buffers, at another η,
    and takes them back. The first is at the decade of

        η = 0.01 |L| / (∇L · Δw),

    where a first step with the direction Δw of the optimizer would lower the inner loss L by a
    hundredth (of Polyak's η, were L's least value 0): where η stands decides nothing. From there
    they go up by decades while E falls, or else down while that lowers E or E is above what it was
    before any step, and end half a decade from the best, towards the better of its neighbours. All
    groups' η move by the same factor. E is taken on one validation batch for all trials, so that a
    large one (some 500 examples) is worth its price.

    Args:
        optimizer: learns `lr`.
        inner_losses: K closures, one per training step, as in `hypergradient`: about ten.
        outer_loss: E of the trials; default: the optimizer's own.
        outer_batches: how many batches of training's size E takes, for `optimizer.cost`.

    Returns:
        E by the η tried (of several groups the largest), infinite where the inner loss came to
        thrice the largest one of another trial. The learned η is now the best of them, or with a
        warning the first, where none lowers E.

    Raises:
        ArgumentError: `lr` is not learned, or there is no closure.
        ArgumentTypeError: `optimizer` is not wrapped, or something else is no closure.

    Cost: per trial, of which there are about four, K training steps, and a third of a step for
    each batch of E. It is counted in `optimizer.cost`.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.ones(4, 3), torch.ones(4, 1)
        >>> def loss(x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1e-6)
        >>> optimizer = HyperOptimizer(sgd, model, partial(loss, x, y), learn="lr")
        >>> _ = search_lr(optimizer, [partial(loss, x, y)] * 5)
        >>> 0.01 < optimizer.hyperparameters["lr"]().item() < 1.0
        True
    """
    check_wrapped(optimizer, "outer_loss")
    lr, loop = optimizer.hyperparameters.get("lr"), optimizer._loop
    if not isinstance(lr, Setting) or loop is None:
        raise ArgumentError("`search_lr` moves a learned `lr`. Name it in `learn`.")
    inner = [checked(loss, "An inner loss") for loss in closures(inner_losses)]
    outer_loss = loop.outer_loss if outer_loss is None else outer_loss
    check_outer_loss(outer_loss)
    loop.cut()
    outer = checked(outer_loss, "The outer loss", has_graph=False)
    search = _Search(optimizer, lr, inner, outer, outer_batches / 3)
    with one_batch(outer_loss):
        best = search.run()
    lr.set(search.ratios * best)
    lr.clamp_()
    loop.settings_were_set(search.cost)
    return {search.rate(tried): loss for tried, loss in sorted(search.found.items())}


def start_weight_decay(
    optimizer: HyperOptimizer, steps: int, steps_per_epoch: int | None = None
) -> float:
    """Let the learned λ start where weights forget what they learned ten epochs ago.

    A step shrinks the weights by η̂ λ, with η̂ = η (1 − d) / (1 − μ) for SGD with momentum μ and
    dampening d, and η̂ = η where the decay is decoupled: they are an average of past updates over

        τ = 1 / (η̂ λ)

    steps. The best τ, in epochs, hardly depends on model and data. λ starts at τ = 10 epochs, or at
    the run's T steps if it has fewer, whatever it was. A decay with a τ far above T has no effect
    within the run, and with one far below nothing else has: from now on λ stays within
    T / τ = 0.1 … 300; where groups have several η, between the least and the most of their λ.

    A step of Adam is about η at most, so that a decoupled decay holds weights below 1 / λ. There λ
    starts at 1 / (10 rms(w)) at most, by the group's matrices as they are: a network that learns
    more slowly than its weights forget would be decayed to nothing.

    Each group has the λ of its own η, so call it after `search_lr`; one λ that they share is that
    of the first.

    Args:
        optimizer: learns `weight_decay`.
        steps: T, of the whole run.
        steps_per_epoch: `len(train_loader)`; `None` where no example comes twice.

    Returns:
        λ of the first group.

    Raises:
        ArgumentError: `weight_decay` is not learned, or one of the numbers is not positive.
        ArgumentTypeError: `optimizer` is not wrapped.
        UnsupportedError: the decay passes through a second moment (Adam, RMSprop, Adagrad, …), and
            shrinks the weights by what cannot be known.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5.0)
        >>> optimizer = HyperOptimizer(sgd, model, lambda: model(torch.ones(1, 3)).sum())
        >>> lambda_0 = start_weight_decay(optimizer, steps=1000, steps_per_epoch=50)
        >>> round(lambda_0, 6)  # (1 − 0.9) / (0.1 · 10 · 50)
        0.002

    References:
        Wang and Aitchison 2024, for AdamW: τ in epochs, between one and all of the run's.
    """
    check_wrapped(optimizer, "outer_loss")
    decay, loop = optimizer.hyperparameters.get("weight_decay"), optimizer._loop
    if not isinstance(decay, Setting) or loop is None:
        raise ArgumentError("`start_weight_decay` moves a learned `weight_decay`. Name it.")
    whole("steps", steps)
    if steps_per_epoch is not None and not steps_per_epoch > 0:
        raise ArgumentError(f"`steps_per_epoch` must be at least 1. Got {steps_per_epoch!r}.")
    loop.cut()
    weakest, strongest = 0.1, 300.0  # T / τ
    ones = [1 / (rate * steps) for rate in _rates_of_decay(optimizer)]  # λ at T / τ = 1
    epochs = steps / (steps_per_epoch or steps)
    start = min(max(epochs / TIMESCALE, 1.0), strongest)
    own = [one for one, is_learned in zip(ones, decay.learned_in, strict=True) if is_learned]
    decay.bound((weakest * min(own), strongest * max(own)))
    found = [min(one * start, most) for one, most in zip(ones, _most(optimizer), strict=True)]
    decay.start_at(found)
    loop.settings_were_set()
    return found[decay.learned_in.index(True)]


def _most(optimizer: HyperOptimizer) -> list[float]:
    """Return for each group the λ that leaves weights `ROOM` times their present size."""
    found = list[float]()
    for group in optimizer.param_groups:
        matrices = [p.detach() for p in group["params"] if p.dim() > 1]
        size = length(matrices) if group.get("decoupled_weight_decay") else 0.0
        entries = sum(p.numel() for p in matrices)
        found.append(math.sqrt(entries) / (ROOM * size) if size else math.inf)
    return found


def _rates_of_decay(optimizer: HyperOptimizer) -> list[float]:
    """Return η̂ of each group: a step shrinks its weights by η̂ λ."""
    groups, lr = optimizer.param_groups, optimizer.hyperparameters.get("lr")
    rates = [float(base_rate(group)) for group in groups]
    if isinstance(lr, Setting):
        rates = lr.group_means().tolist()
    found = [shrinking(dynamics_of(optimizer.optimizer), group) for group in groups]
    factors = [factor for factor in found if factor is not None]
    if len(factors) < len(groups):
        raise UnsupportedError(
            "`start_weight_decay` cannot tell what the decay of "
            f"{type(optimizer.optimizer).__name__} does to a weight: it passes through the second "
            "moment. Use AdamW, or SGD."
        )
    rates = [rate if rate > 1e-6 * max(rates) else max(rates) for rate in rates]  # at η = 0 all do
    return [rate * factor for rate, factor in zip(rates, factors, strict=True)]


class _Search:
    """Trials by the largest η of the param groups; the others keep their ratios to it."""

    def __init__(
        self,
        optimizer: HyperOptimizer,
        lr: Setting,
        inner: list[Callable[[], Tensor]],
        outer: OuterLoss,
        outer_cost: float,
    ) -> None:
        self.optimizer, self.lr, self.inner = optimizer, lr, inner
        self.outer, self.outer_cost = outer, outer_cost
        present = lr.value.detach()
        self.start = present.max().item()
        self.ratios = present / present.max()
        self.found: dict[int, float] = {}  # E, by half decades from the first η
        self.first = self.start
        self.usual = math.inf  # the largest loss of the trial where that was least
        self.cost = 0.0

    def run(self) -> float:
        """Return the best η."""
        before = self._outer_loss()
        self.first = self._modest()
        rounding, best = 1e-5 * abs(before), 0  # a tiny η changes E by less
        if self._trial(0) <= before + rounding:
            while self._is_allowed(best + 2) and (
                self._trial(best + 2) <= self._trial(best) + rounding
            ):
                best += 2
        while best <= 0 and self._is_allowed(best - 2):
            is_harmful = self._trial(best) > before + rounding
            if not (is_harmful or self._trial(best - 2) < self._trial(best) - rounding):
                break
            best -= 2
        lower, higher = (self.found.get(side, math.inf) for side in (best - 2, best + 2))
        self._trial(best - 1 if lower < higher else best + 1)
        best = min(self.found, key=lambda tried: self.found[tried])
        share = (before - self.found[best]) / abs(before) if before else 0.0
        if share >= TELLING:
            return self.rate(best)
        rate = self.rate(best) if share > 0 else self.first
        warnings.warn(
            f"{len(self.inner)} training steps lower the outer loss by {max(0.0, share):.1%} at "
            f"most, which says little of η; {rate:g} is a guess. Normalise the inputs, or look "
            "for an η with more steps or validation data.",
            HypertorchWarning,
            stacklevel=3,
        )
        return rate

    def rate(self, half_decades: int) -> float:
        """Return the η so far above the first."""
        return self.first * 10 ** (half_decades / 2)

    def _modest(self) -> float:
        """Return the decade of η at which the first step lowers its loss by `MODEST`, about."""
        params = self.optimizer._params()
        before = [p.detach().clone() for p in params]
        with self._trained(1.0, self.inner[:1]) as (loss,):
            moved = torch._foreach_sub(before, [p.detach() for p in params])
            pairs = [(p.grad, d) for p, d in zip(params, moved, strict=True) if p.grad is not None]
            gain = sum((g * d).sum(dtype=torch.float64).item() for g, d in pairs)
        share = gain / abs(loss) if loss else 0.0
        if not (math.isfinite(share) and share > 0):
            return self.start
        rate = 10.0 ** round(math.log10(MODEST / share))
        return rate if self._is_within(rate) else self.start

    def _is_within(self, rate: float) -> bool:
        lower, upper = self.lr.bounds or (0.0, math.inf)
        return lower <= rate <= upper

    def _is_allowed(self, half_decades: int) -> bool:
        return self._is_within(self.rate(half_decades))

    def _trial(self, half_decades: int) -> float:
        """Return E after the training steps at this η, infinite where it may not go."""
        if not self._is_allowed(half_decades):
            return math.inf
        if half_decades not in self.found:
            with self._trained(self.rate(half_decades), self.inner) as losses:
                largest = max(map(abs, losses))
                self.usual = min(self.usual, largest)
                is_ruined = not math.isfinite(largest)
                self.found[half_decades] = math.inf if is_ruined else self._outer_loss()
        return self.found[half_decades]

    @contextmanager
    def _trained(self, rate: float, inner: Sequence[Callable[[], Tensor]]) -> Iterator[list[float]]:
        """Within, the steps are made at η = `rate`; yield their losses, the last ∞ if ruined."""
        with as_it_was(self.optimizer), self.lr.at(self.ratios * rate):
            for group in self.optimizer.param_groups:
                group.pop("initial_lr", None)  # a schedule, such as a warm-up, does not count
            groups = LearnedGroups(self.optimizer.optimizer, self.optimizer.hyperparameters)
            groups.start()
            params, losses = self.optimizer._params(), list[float]()
            for inner_loss in inner:
                loss = inner_loss()
                losses.append(loss.item())
                if not losses[-1] <= RUINED * self.usual:
                    losses[-1] = math.inf
                    self.cost += 1 / 3
                    break
                set_gradients(params, gradients(loss, params))
                groups.step(self.optimizer._wrapped_step)
                self.cost += 1
            yield losses

    def _outer_loss(self) -> float:
        with leaving_no_trace(self.optimizer.model), torch.no_grad():
            loss = self.outer().item()
        self.cost += self.outer_cost
        return loss if math.isfinite(loss) else math.inf
