"""Settings of the optimizer that are learned: one λ for all, per group, per tensor or per element.

A setting is a hyperparameter that the param groups hold as a number, and Φ reads from there.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .constraints import Constraint, bounds_of
from .errors import ArgumentError, did_you_mean, listed
from .hyperparameters import Hyperparameter

GRANULARITIES = ("shared", "group", "tensor", "element")


class Setting(Hyperparameter):
    """A float setting of the optimizer, learned: lr, weight_decay, momentum, beta1, ….

    λ has shape `()`, `(groups,)`, `(tensors,)` or `(elements,)`, by its granularity; tensors and
    elements are counted through the param groups in order. A group has none of it where its number
    is 0, at the edge of its set, and another group's is not: biases without weight decay. It is not
    learned there, and λ has no entry for it.

    Args:
        name: the setting's name.
        values: its present value in each param group.
        shapes: for each group, the shape of each of its parameters.
        constraint: the set it lives in.
        granularity: one of `GRANULARITIES`.
        bounds: as in `Hyperparameter`; widened to include the starting values.
        zero_is_none: whether 0 says that a group has none; default: where another group has some.

    Attributes:
        learned_in: for each param group, whether the setting is learned there.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[float],
        shapes: Sequence[Sequence[torch.Size]],
        constraint: Constraint,
        granularity: str = "group",
        bounds: tuple[float, float] | None = None,
        zero_is_none: bool | None = None,
    ) -> None:
        check_granularity(name, granularity)
        self.granularity, self.constraint = granularity, constraint
        self.shapes = [list(group) for group in shapes]
        self._see_where(values, zero_is_none)
        if granularity == "shared" and len(set(self._learned(values))) > 1:
            raise ArgumentError(
                f"`{name}` cannot be shared: the param groups start at {list(values)}. "
                'Use "group", or give them one value.'
            )
        start = torch.tensor(self._spread(values), dtype=torch.float64)
        super().__init__(start, constraint, name=name, bounds=_widened(bounds, values))

    def _see_where(self, values: Sequence[float], zero_is_none: bool | None = None) -> None:
        """Set in which groups it is learned, from what they hold."""
        self._zero_is_none = any(values) if zero_is_none is None else zero_is_none
        has_none = self._zero_is_none and bounds_of(self.constraint)[0] == 0
        is_empty = [not (self.is_scalar or shapes) for shapes in self.shapes]
        self.learned_in = [
            not (empty or (has_none and value == 0))
            for value, empty in zip(values, is_empty, strict=True)
        ]
        self._see_starts()

    def _see_starts(self) -> None:
        """Set where each group's entries begin in λ, per tensor or per element."""
        self._starts = list(accumulate(self._counts(), initial=0))

    def _learned(self, values: Sequence[float]) -> list[float]:
        return [v for v, is_learned in zip(values, self.learned_in, strict=True) if is_learned]

    def _spread(self, values: Sequence[float]) -> Any:
        own = self._learned(values)
        if self.granularity == "shared" and own:
            return own[0]
        if self.is_scalar:
            return own
        return [v for value, n in zip(values, self._counts(), strict=True) for v in [value] * n]

    def _sizes(self, group: int) -> list[int]:
        """How many entries of λ each tensor of `group` has."""
        shapes, each = self.shapes[group], self.granularity == "element"
        if not self.learned_in[group]:
            return [0] * len(shapes)
        return [math.prod(shape) if each else 1 for shape in shapes]

    def _counts(self) -> list[int]:
        """How many entries of λ each group has, per tensor or per element."""
        return [sum(self._sizes(group)) for group in range(len(self.shapes))]

    @property
    def is_scalar(self) -> bool:
        """Whether one number serves a whole group, as `torch.optim` has it."""
        return self.granularity in ("shared", "group")

    def entry_of_group(self, group: int) -> int:
        """Return where λ of a group stands, with one number for each in which it is learned."""
        return sum(self.learned_in[:group])

    def entries_of_tensors(self) -> list[int]:
        """Return where the entries of each tensor begin in λ, per tensor or per element."""
        sizes = [size for group in range(len(self.shapes)) for size in self._sizes(group)]
        return list(accumulate(sizes, initial=0))

    def of_group(self, group: int) -> Tensor | list[Tensor]:
        """Return λ of one group: a scalar tensor, or a list with one tensor per parameter.

        Raises:
            ArgumentError: it is not learned there.
        """
        if not self.learned_in[group]:
            raise ArgumentError(
                f"`{self.name}` is not learned in param group {group}: its own number, 0, stays."
            )
        if self.granularity == "shared":
            return self.value
        if self.granularity == "group":
            return self.value[self.entry_of_group(group)]
        start, sizes = self._starts[group], self._sizes(group)
        parts = self.value[start : start + sum(sizes)].split(sizes)
        if self.granularity == "tensor":
            return [part.squeeze(0) for part in parts]
        return [part.view(shape) for part, shape in zip(parts, self.shapes[group], strict=True)]

    def group_means(self) -> Tensor:
        """Return the mean of λ over each group, of shape `(groups,)`; 0 where it is not learned."""
        value = self.value.detach()
        if self.is_scalar:
            own = value.expand(sum(self.learned_in))
        else:
            parts = zip(value.split(self._counts()), self.learned_in, strict=True)
            own = torch.stack([part.mean() for part, is_learned in parts if is_learned])
        if all(self.learned_in):
            return own
        where = torch.tensor(self.learned_in, device=own.device)
        return own.new_zeros(len(where)).masked_scatter(where, own)

    def restart(self, values: Sequence[float]) -> None:
        """Learn anew from what the groups hold, where they hold some."""
        self._see_where(values)
        self.start_at(values)

    def start_at(self, values: Sequence[float]) -> None:
        """Let λ be these numbers, one per group, where it is learned; the others do not count."""
        self.set(torch.tensor(self._spread(values), dtype=self.raw.dtype, device=self.raw.device))

    def addition(self, value: float, shapes: Sequence[torch.Size]) -> "Setting":
        """Return the setting of one more param group, which starts at `value`."""
        more = Setting(
            self.name,
            [value],
            [shapes],
            self.constraint,
            self.granularity,
            self.bounds,
            self._zero_is_none,
        )
        is_shared = self.granularity == "shared" and more.learned_in == [True]
        if is_shared and not torch.isclose(more.value.to(self.value), self.value):
            raise ArgumentError(
                f"`{self.name}` is shared at {self.value.item():g}, and the new group brings "
                f'{value:g}. Give it that value, or learn `{self.name}` per "group".'
            )
        return more

    def extend(self, more: "Setting") -> None:
        """Make room for the param groups of `more`, an `addition`."""
        if self.granularity != "shared":
            grown = torch.cat([self.raw.detach(), more.raw.detach().to(self.raw)])
            self.raw = grown.requires_grad_()
            self.refresh()
        if self.bounds is not None and more.bounds is not None:
            lower, upper = zip(self.bounds, more.bounds, strict=True)
            self.bound((min(lower), max(upper)))
        self.shapes += more.shapes
        self.learned_in += more.learned_in
        self._see_starts()


def where_learned(settings: Mapping[str, Setting], name: str, groups: int) -> list[bool]:
    """Return for each of so many param groups whether a setting is learned there."""
    return settings[name].learned_in if name in settings else [False] * groups


def check_granularity(name: str, granularity: object) -> None:
    """Raise unless `granularity` is one of `GRANULARITIES`."""
    if granularity not in GRANULARITIES:
        raise ArgumentError(
            f"`{name}` cannot be learned per {granularity!r}."
            f"{did_you_mean(str(granularity), GRANULARITIES)} Available: {listed(GRANULARITIES)}."
        )


def _widened(
    bounds: tuple[float, float] | None, values: Sequence[float]
) -> tuple[float, float] | None:
    if bounds is None:
        return None
    inside = [value for value in values if value > 0]
    return min([bounds[0], *inside]), max([bounds[1], *inside])
