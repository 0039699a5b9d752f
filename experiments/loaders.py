"""Batches of examples that already lie as tensors on the device.

torch's DataLoader collates example by example, which costs more than a small model's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.config_errors import ConfigError


class Examples(NamedTuple):
    """Inputs `(n, ...)` and their class numbers `(n,)`."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Examples:
        """The same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device))


class TensorLoader:
    """An iterable of `(x, y)` batches; each `iter` is an epoch.

    The order of epoch k depends only on `seed` and k. `state_dict` holds the place inside an epoch
    too: the first `iter` after `load_state_dict` goes on with the batch that was due.

    Args:
        examples: all examples, on the device where the batches are wanted.
        batch_size: examples in a batch.
        shuffle: draw a new order for each epoch; a last, smaller batch is then left out.
        seed: of the order.

    Raises:
        ConfigError: for a batch size below 1, or above the number of examples when shuffled.
    """

    def __init__(
        self, examples: Examples, batch_size: int, shuffle: bool = False, seed: int = 0
    ) -> None:
        n = len(examples.y)
        if batch_size < 1 or (shuffle and batch_size > n):
            raise ConfigError(
                f"`batch_size` does not fit the data. Got {batch_size} for {n} examples. "
                f"Choose one from 1 to {n}."
            )
        self.examples, self.batch_size, self.shuffle = examples, batch_size, shuffle
        self.generator = torch.Generator().manual_seed(seed)
        self._epoch_start = self.generator.get_state()
        self._position = 0  # batches of this epoch handed out so far
        self._due = 0  # the batch that the next `iter` starts with

    def __len__(self) -> int:
        n = len(self.examples.y)
        return n // self.batch_size if self.shuffle else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[Examples]:
        first, self._due = self._due, 0
        self._epoch_start = self.generator.get_state()
        order = self._order()
        for batch in range(first, len(self)):
            chosen = order[batch * self.batch_size :][: self.batch_size]
            self._advance(batch + 1)
            yield Examples(self.examples.x[chosen], self.examples.y[chosen])

    def state_dict(self) -> dict[str, Any]:
        """The place: generator state at the epoch's start, and batches handed out since."""
        return {"epoch_start": self._epoch_start, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place that `state_dict` described."""
        self.generator.set_state(state["epoch_start"])
        self._epoch_start = state["epoch_start"]
        self._position = self._due = state["position"]

    def _order(self) -> Tensor:
        n, device = len(self.examples.y), self.examples.y.device
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        return order.to(device)

    def _advance(self, position: int) -> None:
        self._position = position % len(self)
        if self._position == 0:
            self._epoch_start = self.generator.get_state()


def endless(loader: TensorLoader) -> Iterator[Examples]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader
