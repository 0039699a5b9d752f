"""Central differences, dE/dλ_j ≈ (E(λ + ε e_j) − E(λ − ε e_j)) / 2ε: the reference.

Each E is the end of a whole window of training steps made again. Nothing here differentiates Φ.
"""

import math

import torch
from torch import Tensor

from ..constraints import bounds_of, real
from ..errors import UnsupportedError, check_count, check_number
from ..hyperparameters import Hyperparameter
from .engine import Carried, Engine, LiveWindow, OuterLoss, Training, TrainingStep
from .recording import Recording


class FiniteDifferences(Engine):
    """The hypergradient of a window by central differences, in float64.

    The error is O(ε²) where E is smooth in λ, plus rounding of about 1e-16 |E| / ε: with the
    default ε about 1e-10 of E. Across a kink (a ReLU that switches, a sign that flips) it is wrong
    by a finite amount. It needs closures, and float64 weights.

    λ_j is always moved inside its constraint: ε is at most half of its distance from the nearer
    bound, and rounding counts for more there. On a simplex these are 0 and 1, and the others stay:
    their sum is 1 ± ε. In a set without bounds for each number, other than `real`, λ_j keeps its
    sign.

    Args:
        step: ε, in λ's units.
        entries: of each hyperparameter at most so many, spread evenly; the others are NaN. `None`,
            the default: all.

    Cost: 2 K training steps for each number, and K to see that the closures replay.

    References:
        Nocedal and Wright 2006, section 8.1.
    """

    needs = "closure"
    differentiates_twice = False
    differentiates_outer_loss = False

    def __init__(self, step: float = 1e-6, entries: int | None = None) -> None:
        check_number("`step` of FiniteDifferences", step, "positive", lambda e: e > 0)
        if entries is not None:
            check_count("`entries` of FiniteDifferences", entries)
        self.step, self.entries = step, entries

    def check(self, training: Training) -> None:
        """Refuse weights or hyperparameters in less than float64.

        Raises:
            UnsupportedError: central differences would be rounding.
        """
        if any(p.dtype != torch.float64 for p in training.slots.params):
            raise UnsupportedError(
                "`FiniteDifferences` needs float64 weights: in less, a small difference is "
                "rounding. Use `model.double()` and float64 data; or `check_hypergradient`, which "
                "computes in float64 by itself; or `Unroll`."
            )

    def open(self, training: Training, carried: Carried | None = None) -> "DifferencedWindow":
        """Start a recording at the present weights and buffers."""
        return DifferencedWindow(training, self)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K (2 + 2 m) for m learned numbers; evaluations of E are not counted."""
        sizes = [h.value.numel() for h in training.hyperparameters.values()]
        return horizon * (2 + 2 * sum(len(spread(size, self.entries)) for size in sizes))

    def __repr__(self) -> str:
        return f"FiniteDifferences(step={self.step:g})"


class DifferencedWindow(LiveWindow):
    """Steps on the live weights, made again from the window's start with each λ_j moved."""

    def __init__(self, training: Training, engine: FiniteDifferences) -> None:
        super().__init__(training)
        self._recording, self._engine = Recording(training), engine

    def step(self, step: TrainingStep) -> None:
        """Make and record the step."""
        self._recording.make(step)

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ.

        Raises:
            WindowError: a closure is not replayable.
            UnsupportedError: a λ_j is at its bound, to rounding.
        """
        with self._recording.made_again():
            value = outer_loss().detach()
            self._check_replay()
            return value, {name: self._all(name, outer_loss) for name in self.training.values()}

    def _check_replay(self) -> None:
        recording, state, losses = self._recording, self._recording.start.state, []
        recording.start.module_buffers.restore()
        for t in range(len(recording)):
            state, loss = recording.again(t, state)
            losses.append(loss)
        recording.check(losses)

    def _all(self, name: str, outer_loss: OuterLoss) -> Tensor:
        value = self.training.hyperparameters[name].value.detach()
        found = torch.full_like(value, torch.nan)
        for j in spread(value.numel(), self._engine.entries):
            found.view(-1)[j] = central_difference(
                self._recording, name, j, self._engine.step, outer_loss
            )
        return found


def spread(size: int, entries: int | None) -> list[int]:
    """Return the positions, of `size`, that are differenced."""
    if entries is None or entries >= size:
        return list(range(size))
    return [round(i * (size - 1) / max(entries - 1, 1)) for i in range(entries)]


def central_difference(
    recording: Recording, name: str, j: int, step: float, outer_loss: OuterLoss
) -> Tensor:
    """Return (E(λ + ε e_j) − E(λ − ε e_j)) / 2ε; the model is left with other weights.

    Args:
        recording: of the window.
        name: of the hyperparameter.
        j: the position in it, flattened.
        step: ε, at most half of what λ_j is away from a bound.
        outer_loss: computes E.

    Raises:
        UnsupportedError: λ_j is at its bound, to rounding.
    """
    h = recording.training.hyperparameters[name]
    value, ends = h.value.detach(), []
    places = either_side(value.flatten()[j].item(), step, h)
    for place in places:
        moved = value.clone()
        moved.view(-1)[j] = place
        moved.requires_grad_()
        state = recording.rerun({name: moved})
        ends.append(recording.outer_loss_at(state, outer_loss, {name: moved}))
    return (ends[0] - ends[1]) / (places[0] - places[1])


def either_side(number: float, step: float, h: Hyperparameter) -> tuple[float, float]:
    """Return a number above λ_j and one below, both inside its constraint.

    Raises:
        UnsupportedError: there is none.
    """
    epsilon, (lower, upper) = within(number, step, h), bounds_of(h.constraint)
    above, below = number + epsilon, number - epsilon
    if not lower < below < above < upper:
        raise UnsupportedError(
            f"`FiniteDifferences` cannot move `{h.name}` inside its set: {number!r} is at a bound, "
            "to rounding. Start it farther inside, or use `Unroll`."
        )
    return above, below


def within(number: float, step: float, h: Hyperparameter) -> float:
    """Return the ε that is taken: at most half of what λ_j is away from a bound."""
    lower, upper = bounds_of(h.constraint)
    room = min(number - lower, upper - number)
    if math.isinf(room) and not isinstance(h.constraint, type(real)):
        room = abs(number) or math.inf
    return min(step, room / 2)
