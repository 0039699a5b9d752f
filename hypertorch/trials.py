"""Where η starts: at what a few training steps say.

A hypergradient says which way η should move, not how far; and a window at a far too large η ruins
the weights before λ can follow. From any starting value, short trials settle η.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .arguments import check_outer_loss, whole
from .errors import ArgumentError, warn
from .functional import as_it_was, check_wrapped, closures
from .hypergradients import OuterLoss
from .inner_loss import checked, one_batch
from .optimizer import HyperOptimizer
from .param_groups import LearnedGroups
from .settings import Setting
from .state import set_gradients, sign_of
from .surroundings import leaving_no_trace
from .transition import gradients

#: The share of its loss that the first step of the first trial would take away, about.
MODEST = 0.01
#: The share of E that a trial must take away to say something of η, and to say it clearly.
TELLING, CLEAR = 0.01, 0.2
#: A trial ends where its loss is so many times the largest one of a better trial.
RUINED = 3.0
#: Where no trial says anything: by what share E may rise in one that does no harm, the share of its
#: first gradient that each matrix must keep, and how far above the first η to go, by half decades.
HARMLESS, REACHED, HIGHEST = 0.05, 0.01, 8


def search_lr(
    optimizer: HyperOptimizer,
    inner_losses: Sequence[Callable[[], Tensor]],
    outer_loss: OuterLoss | None = None,
    *,
    at_first: int | None = None,
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

    Where the best trial takes away less than a fifth of E, its steps were too few to tell η from
    η: a transformer may have done nothing by then but move its biases. With `at_first` trials begin
    with so many steps, and are then made again with twice as many, up to K. Where it takes away
    less than a hundredth even then, as on the plateau of a deep network, η starts half a decade
    below the largest, up to four decades above the first, that does not raise E by a twentieth, and
    after which the gradient of each matrix is still a hundredth of its first.

    Args:
        optimizer: learns `lr`.
        inner_losses: K closures, one per training step, as in `hypergradient`: about ten, or, with
            `at_first`, up to eighty.
        outer_loss: E of the trials; default: the optimizer's own.
        at_first: how many of the closures the first trials take; default: all.
        outer_batches: how many batches of training's size E takes, for `optimizer.cost`.

    Returns:
        E by the η tried (of several groups the largest) with the last number of steps, infinite
        where the inner loss came to thrice the largest one of another trial. The learned η is now
        the best of them, or with a warning a guess, where none lowers E by a hundredth.

    Raises:
        ArgumentError: `lr` is not learned, there is no closure, or `at_first` is no whole number of
            them.
        ArgumentTypeError: `optimizer` is not wrapped, or something else is no closure.

    Cost: per trial, of which there are about four with each number of steps, these training steps,
    and a third of a step for each batch of E. It is counted in `optimizer.cost`.

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
    found, _ = searched(optimizer, inner_losses, outer_loss, at_first, outer_batches)
    return found


def searched(
    optimizer: HyperOptimizer,
    inner_losses: Sequence[Callable[[], Tensor]],
    outer_loss: OuterLoss | None,
    at_first: int | None,
    outer_batches: int,
) -> tuple[dict[float, float], int]:
    """Do what `search_lr` does; return what it returns, and the steps of the last trials."""
    check_wrapped(optimizer, "outer_loss")
    lr, loop = optimizer.hyperparameters.get("lr"), optimizer._loop
    if not isinstance(lr, Setting) or loop is None:
        raise ArgumentError("`search_lr` moves a learned `lr`. Name it in `learn`.")
    inner = [checked(loss, "An inner loss") for loss in closures(inner_losses)]
    outer_loss = loop.outer_loss if outer_loss is None else outer_loss
    check_outer_loss(outer_loss)
    lengths = [len(inner) if at_first is None else min(whole("at_first", at_first), len(inner))]
    while 2 * lengths[-1] <= len(inner):
        lengths.append(2 * lengths[-1])
    loop.cut()
    outer = checked(outer_loss, "The outer loss", has_graph=False)
    search = _Search(optimizer, lr, inner, outer, outer_batches / 3)
    with one_batch(outer_loss):
        best = search.run(lengths)
    lr.set(search.ratios * best)
    lr.clamp_()
    loop.settings_were_set(search.cost)
    found = {search.rate(tried): loss for tried, loss in sorted(search.found.items())}
    return found, search.length


def fallen(before: float, after: float) -> float:
    """Return by what share of it E has fallen."""
    return (before - after) / abs(before) if before else 0.0


def matrix_norms(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[float]:
    """Return the norm of the gradient in each matrix, NaN where it has none."""
    matrices = [grad for p, grad in zip(params, grads, strict=True) if p.dim() > 1]
    dense = [grad for grad in matrices if grad is not None and not grad.is_sparse]
    norms = torch._foreach_norm(dense) if dense else []
    known = iter(torch.stack([n.to(norms[0]) for n in norms]).tolist() if norms else [])
    return [math.nan if g is None or g.is_sparse else next(known) for g in matrices]


def are_reached(norms: Sequence[float], first: Sequence[float]) -> bool:
    """Return whether a gradient reaches every matrix, by its norms now and at first."""
    return not any(now < REACHED * then for now, then in zip(norms, first, strict=False))


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
        self.first, self.length, self.cost = self.start, len(inner), 0.0
        self.gradient = list[float]()  # its norm in every matrix, in the first step
        self.found: dict[int, float] = {}  # E, by half decades from the first η
        self.is_reached: dict[int, bool] = {}  # whether a gradient still reaches every matrix
        self.usual = math.inf  # the largest loss of the trial where that was least

    def run(self, lengths: Sequence[int]) -> float:
        """Return the best η, by trials of the first of these lengths that tells one from others."""
        before = self._outer_loss()
        self.first = self._modest()
        for self.length in lengths:
            self.found, self.usual = {}, math.inf
            self._explore(before)
            if self._share(before) >= CLEAR:
                break
        boldest = self._boldest(before) if self._share(before) < TELLING else 0
        share = self._share(before)
        if share >= TELLING:
            return self.rate(min(self.found, key=lambda tried: self.found[tried]))
        rate = self.rate(boldest)
        warn(
            f"{self.length} training steps lower the outer loss by {max(0.0, share):.1%} at "
            f"most, which says little of η; {rate:g} is a guess. Normalise the inputs, or look "
            "for an η with more steps or validation data."
        )
        return rate

    def _share(self, before: float) -> float:
        """Return by what share the best trial lowers E."""
        return fallen(before, min(self.found.values()))

    def _explore(self, before: float) -> None:
        """Make trials, going up or down from the first η to where E is least."""
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

    def _boldest(self, before: float) -> int:
        """Return half a decade below the largest η that leaves E, and the gradient, as they are.

        On a plateau no few steps lower E, and an η that is too large leaves it too: units die.
        """

        def is_harmless(tried: int) -> bool:
            is_usual = self._trial(tried) <= before + HARMLESS * abs(before) < math.inf
            return is_usual and self.is_reached[tried]

        largest = max(filter(is_harmless, list(self.found)), default=None)
        if largest is None:
            return 0
        while largest < HIGHEST and is_harmless(largest + 2):
            largest += 2
        return largest + is_harmless(largest + 1) - 1

    def rate(self, half_decades: int) -> float:
        """Return the η so far above the first."""
        return self.first * 10 ** (half_decades / 2)

    def _modest(self) -> float:
        """Return the decade of η at which the first step lowers its loss by `MODEST`, about."""
        params = self.optimizer._params()
        before = [p.detach().clone() for p in params]
        with self._trained(1.0, self.inner[:1]) as (loss,):
            self.gradient = matrix_norms(params, [p.grad for p in params])
            moved = torch._foreach_sub(before, [p.detach() for p in params])
            pairs = [(p.grad, d) for p, d in zip(params, moved, strict=True) if p.grad is not None]
            gain = sum((g * d).sum(dtype=torch.float64).item() for g, d in pairs)
        share = abs(gain / loss) if loss else 0.0
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
            steps, params = self.inner[: self.length], self.optimizer._params()
            with self._trained(self.rate(half_decades), steps) as losses:
                largest = max(map(abs, losses))
                self.usual = min(self.usual, largest)
                is_ruined = not math.isfinite(largest)
                self.found[half_decades] = math.inf if is_ruined else self._outer_loss()
                norms = matrix_norms(params, [p.grad for p in params])
                self.is_reached[half_decades] = are_reached(norms, self.gradient)
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
            sign = sign_of(self.optimizer.optimizer)
            for inner_loss in inner:
                loss = inner_loss()
                losses.append(sign * loss.item())
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
