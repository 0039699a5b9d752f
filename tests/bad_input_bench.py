"""What a bad input is tried on, and one row of the table of bad inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from support import batches, everything, learned, mse, network
from torch import nn

import hypertorch
from hypertorch import HyperOptimizer, ValidationLoss


class Bench:
    """A warm model and optimizer that a bad input must leave alone, and another pair beside it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.other = network(dropout=0.2), network()
        self.data = batches(8)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01
        )
        mse(self.model(self.data[0][0]), self.data[0][1]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wrapper: HyperOptimizer | None = None

    def wrap(self, optimizer: Any = None, **options: Any) -> HyperOptimizer:
        chosen = {"outer_loss": self.validation(), "window": 3, "update_every": 5} | options
        model = chosen.pop("model", self.model)
        self.wrapper = HyperOptimizer(optimizer or self.optimizer, model, **chosen)
        return self.wrapper

    def validation(self, loader: Any = None) -> ValidationLoss:
        return ValidationLoss(self.model, mse, self.data if loader is None else loader)

    def loss(self, step: int = 1, model: nn.Module | None = None) -> torch.Tensor:
        x, y = self.data[step]
        return mse((model or self.model)(x), y)

    def in_plain_steps(self, **options: Any) -> HyperOptimizer:
        """Return a wrapper whose next step belongs to no window."""
        wrapper = self.wrap(**options)
        for i in range(3):
            wrapper.step(self.loss(i))
        return wrapper

    def in_window(self, **options: Any) -> HyperOptimizer:
        """Return a wrapper with one step of its window made."""
        wrapper = self.wrap(**options)
        wrapper.step(self.loss())
        return wrapper

    def everything(self) -> dict[str, Any]:
        found = everything(self.model, self.optimizer)
        return found | ({} if self.wrapper is None else learned(self.wrapper))


def nothing(bench: Bench) -> None:
    """Prepare nothing."""


@dataclass
class Case:
    """One bad input, and the whole of what is said about it."""

    reads: str
    act: Callable[[Bench, Any], Any]
    error: type[Exception]
    builtin: type[Exception]
    message: str
    prepare: Callable[[Bench], Any] = field(default=nothing)


def wrap(**options: Any) -> Callable[[Bench, Any], Any]:
    """Wrap the bench's optimizer with these options."""
    return lambda bench, _: bench.wrap(**options)


def type_error(reads: str, act: Any, message: str, prepare: Any = nothing) -> Case:
    return Case(reads, act, hypertorch.ArgumentTypeError, TypeError, message, prepare)


def value_error(reads: str, act: Any, message: str, prepare: Any = nothing) -> Case:
    return Case(reads, act, hypertorch.ArgumentError, ValueError, message, prepare)


def unsupported(reads: str, act: Any, message: str, prepare: Any = nothing) -> Case:
    return Case(reads, act, hypertorch.UnsupportedError, NotImplementedError, message, prepare)


def window_error(reads: str, act: Any, message: str, prepare: Any = nothing) -> Case:
    return Case(reads, act, hypertorch.WindowError, RuntimeError, message, prepare)


def rejected(reads: str, act: Any, message: str, prepare: Any = Bench.in_window) -> Case:
    return Case(reads, act, hypertorch.CheckpointError, ValueError, message, prepare)
