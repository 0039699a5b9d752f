"""A loop that writes `lr` into the param groups by itself, as some do in place of a scheduler.

What it writes in terms of the `lr` that is there (`group["lr"] *= 0.1`) multiplies what is learned.
What it writes in terms of a number of its own replaces it.
"""

import math
from collections.abc import Sequence

#: A rate is hardly a multiple of the one that stood there above this factor, or below its inverse
#: (the first steps of a warm-up are).
FAR = 20.0

#: By less, in nats, an outer update says nothing of what the loop went on from.
LEAST = 1e-3


class WrittenRates:
    """Tells, once, that rates were written in place of what is learned.

    A number of the loop's own is far from what stood there; or it goes on from the rate before an
    outer update as if there had been none.

    Args:
        rates: of each group, as they are; 0 for one that does not count.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self._rates = self._before = list(rates)
        self._factors = [1.0] * len(self._rates)  # by which each was last written
        self._has_told = False

    def moved(self, rates: Sequence[float]) -> None:
        """Take in what an outer update has made of the rates."""
        self._before, self._rates = self._rates, list(rates)

    def replaced(self, rates: Sequence[float]) -> int | None:
        """Return the first group where the loop wrote a number of its own since the last call."""
        if self._has_told:
            return None
        pairs = list(zip(rates, self._rates, strict=True))
        found = [g for g, (rate, stood) in enumerate(pairs) if self._is_own(g, rate, stood)]
        if self._before is self._rates:  # else what the loop did is not told from the update
            self._factors = [rate / stood if rate and stood else 1.0 for rate, stood in pairs]
        self._rates = self._before = list(rates)
        self._has_told = bool(found)
        return found[0] if found else None

    def _is_own(self, group: int, rate: float, stood: float) -> bool:
        before = self._before[group]
        if rate == stood or min(rate, stood, before) <= 0:
            return False
        move, usual = math.log(stood / before), math.log(self._factors[group])
        away = math.log(rate / stood) - usual
        is_far = not 1 / FAR <= rate / stood <= FAR
        return is_far or (abs(move) > LEAST and abs(away + move) < abs(move) / 10)
