"""w̄_t = w̄_{t-1} + a_t (w_t − w̄_{t-1}), a_t = (1 − β) / (1 − βᵗ): weights without their noise."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..double_backward import TwiceDifferentiable
from ..errors import check_number
from ..slots import Slots
from ..transition import Transition
from .engine import Carried, LiveWindow, OuterLoss, Training, outer_gradient


def check_average(average: float | None, owner: str) -> None:
    """Refuse a β out of its range.

    Raises:
        ArgumentError: says what β was.
    """
    if average is not None:
        expected = "at least 0 and below 1 (0.95 remembers about twenty steps), or None"
        check_number(f"`average` of {owner}", average, expected, lambda b: 0 <= b < 1)


class Average:
    """The exponential average w̄ of weights, which remembers about 1 / (1 − β) steps.

    Args:
        decay: β.
        params: the weights, whose values do not count yet.
        carried: the average to go on from, or a mapping without one.

    Attributes:
        count: t, of the weights taken in.
        rate: a_t.
    """

    def __init__(
        self, decay: float, params: Sequence[Tensor], carried: Mapping[str, Any] | None
    ) -> None:
        self.decay, self.count, self.rate = decay, 0, 0.0
        self._latest: Transition | None = None
        self.params = [p.detach().to(wide(p), copy=True) for p in params]
        if carried is not None and "average" in carried:
            self.count = carried["count"]
            self.params = [
                w.to(p.device, copy=True) for w, p in zip(carried["average"], params, strict=True)
            ]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], made: Transition) -> float:
        """Take in w_t, which the step `made` led to, once for all who ask; return a_t."""
        if made is not self._latest:
            self._latest, self.count = made, self.count + 1
            self.rate = (1 - self.decay) / (1 - self.decay**self.count)
            pairs = zip(params, self.params, strict=True)
            torch._foreach_lerp_(self.params, [p.to(w.dtype) for p, w in pairs], self.rate)
        return self.rate

    @contextmanager
    def in_place_of(self, params: Sequence[Tensor], slots: Slots) -> Iterator[Sequence[Tensor]]:
        """Yield w̄ as leaves, which the model holds meanwhile; frozen weights stay themselves."""
        pairs = zip(self.params, params, strict=True)
        leaves = [
            w.to(p.dtype, copy=True).requires_grad_() if p.requires_grad else p for w, p in pairs
        ]
        with TwiceDifferentiable(slots.model).held():  # compiled for its own Parameters alone
            try:
                yield slots.fill(leaves)
            finally:
                slots.empty()

    def carried(self) -> Carried:
        """Return what the next window needs."""
        return {"average": self.params, "count": self.count}


def average_of(
    decay: float | None, training: Training, carried: Mapping[str, Any] | None
) -> Average | None:
    """Return w̄ of a window that begins, or `None` where β is `None`.

    Windows of the same steps share theirs.
    """
    if decay is None:
        return None
    shared = {} if training.averages is None else training.averages
    if decay not in shared:
        shared[decay] = Average(decay, training.slots.params, carried)
    return shared[decay]


def weights_at(
    average: Average | None, params: Sequence[Tensor], slots: Slots
) -> AbstractContextManager[Sequence[Tensor]]:
    """Return the weights that E is taken at, w̄ or the last ones, which the model holds within."""
    return nullcontext(params) if average is None else average.in_place_of(params, slots)


def carried_on(average: Average | None, training: Training) -> Carried | None:
    """Return w̄ and t, where the next window begins at the weights at which this one ends."""
    return average.carried() if average is not None and training.is_contiguous else None


class AveragingWindow(LiveWindow):
    """Live steps, at whose last or averaged weights E is taken.

    Args:
        training: what is trained and learned.
        decay: β of the averages, or `None`.
        carried: what the window before returned.
    """

    def __init__(self, training: Training, decay: float | None, carried: Carried | None) -> None:
        super().__init__(training)
        self._average = average_of(decay, training, carried)

    def _outer_gradient(
        self, outer_loss: OuterLoss
    ) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
        """Return E, ∂_w E and ∂_λ E at these weights.

        Raises:
            WindowError: E does not depend on the weights.
        """
        average, values = self._average, self.training.values()
        decay = None if average is None else average.decay
        with weights_at(average, self.params, self.training.slots) as params:
            return outer_gradient(outer_loss, params, values, decay)

    def close(self) -> Carried | None:
        """Return what the average goes on from."""
        return carried_on(self._average, self.training)


def wide(param: Tensor) -> torch.dtype:
    """Return the dtype in which small changes of a weight are kept: float32 at the least."""
    return torch.promote_types(param.dtype, torch.float32)
