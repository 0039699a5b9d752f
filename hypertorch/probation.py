"""A run looked at: whether it keeps what its trials promised, and what it has learned since.

A user's own `loss.backward()` shows the optimizer no loss. Validation examples and training batches
that are kept do, after the first steps, and again where E at an outer update is far above its best.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import Relapsed

#: By what share of itself the training loss may rise above that at the initial weights, and by what
#: share of itself a loss must fall for that to be a gain.
HARMED, GAIN = 0.2, 0.1
#: The share of a gain that must be kept; and that of η from which on a schedule is no warm-up.
KEPT, WARM = 0.5, 0.5


class Probation:
    """Looks at a run that may lose what it has learned.

    It relapses where E is above E₀ − ½ (E₀ − min E), after a gain of a tenth, and the training loss
    above L₀ − ½ max(L₀ − min L, L₀ / 10), or where that is a fifth above L₀. One that memorises
    wrong labels loses E's gain alone.

    Args:
        losses: of training, and E, for the model as it is.
        before: these at the initial weights.
        steps: after how many steps to look, from the start or from a rollback.
        cost: of a look, in training steps.

    Attributes:
        least: the least of both since there is a state to return to.
        promise: after how many steps E must have gained half of what it would have if it were this,
            as after trials with half as many; `None` if nothing is expected.
        least_at_update: the least E that an outer update found since then.
        is_warm: whether a schedule has let η come to half of itself; nobody looks before.
    """

    def __init__(
        self,
        losses: tuple[Callable[[], Tensor], Callable[[], Tensor]],
        before: tuple[float, float],
        steps: tuple[int, ...],
        cost: float,
    ) -> None:
        self.losses, self.before, self.steps, self.cost = losses, before, steps, cost
        self.least, self.least_at_update = before, before[1]
        self.promise: tuple[int, float] | None = None
        self.is_warm = False

    def price(self, schedule: float) -> float:
        """Return what a look costs, where η_t = η · schedule(t); 0 while it warms up."""
        self.is_warm = self.is_warm or schedule >= WARM
        return self.cost if self.is_warm else 0.0

    def look(self, steps: int) -> None:
        """Look at the run after so many steps, when it is due."""
        self.check(steps)

    def check(self, steps: int) -> tuple[float, float]:
        """Look whether anything is learned, and left of it, after so many steps; return the losses.

        Raises:
            Relapsed: hardly anything is, or training does harm.
        """
        with torch.no_grad():
            inner, outer = (loss().item() for loss in self.losses)
        (first, first_outer), (least, least_outer) = self.before, self.least
        if self.promise and steps >= self.promise[0]:
            least_outer = min(least_outer, self.promise[1])
        scale, gain = abs(first), first_outer - least_outer
        if scale and not inner <= first + HARMED * scale:
            raise Relapsed(f"after {steps} steps a training loss of {first:.3g} is {inner:.3g}")
        has_lost_outer = gain > GAIN * abs(first_outer) and not outer <= first_outer - KEPT * gain
        if has_lost_outer and inner > first - KEPT * max(first - least, GAIN * scale):
            raise Relapsed(
                f"after {steps} steps the validation loss is {outer:.3g}, which was as low as "
                f"{least_outer:.3g}, and {first_outer:.3g} at first"
            )
        self.least = min(least, inner), min(least_outer, outer)
        return inner, outer

    def hear(self, outer_loss: float) -> tuple[bool, bool]:
        """Return whether an update's E is the least so far, and whether it asks for a look."""
        least, first = self.least_at_update, self.before[1]
        self.least_at_update = min(least, outer_loss)
        return outer_loss < least, outer_loss > first - KEPT * (first - least)

    def forget(self) -> None:
        """Begin anew: there is no state any more with what was gained."""
        self.least, self.least_at_update = self.before, self.before[1]
        self.promise = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the present run started from, and what it has gained."""
        return {
            "before": self.before,
            "least": self.least,
            "least_at_update": self.least_at_update,
            "promise": self.promise,
            "is_warm": self.is_warm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that over."""
        self.before, self.least = state["before"], state["least"]
        self.least_at_update, self.promise = state["least_at_update"], state["promise"]
        self.is_warm = self.is_warm or state["is_warm"]
