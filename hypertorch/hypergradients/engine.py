"""How dE/dλ is computed: the interface every method of the literature has here.

An engine is told of a window's steps one by one and asked for dE/dλ at its end. How ρ then moves is
not its business.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..hyperparameters import Hyperparameter
from ..state import Slots

#: What is asked of every step's gradients before they are used.
GradientCheck = Callable[[Sequence[Tensor | None]], None]
#: Learned settings by name, each a list over the param groups.
Overrides = dict[str, list[Tensor | list[Tensor]]]


class Window(ABC):
    """An open window: training steps that are being differentiated together.

    Attributes:
        params: the weights as the model holds them now.
        was_written_to: whether someone changed one of them in place since the last step, so that
            the window no longer describes them.
    """

    params: list[Tensor]

    @property
    @abstractmethod
    def was_written_to(self) -> bool: ...

    @abstractmethod
    def step(self, loss: Tensor, overrides: Overrides, check: GradientCheck) -> None:
        """Make one training step s_t = Φ_t(s_{t-1}, λ) from the loss at the present weights."""

    @abstractmethod
    def hypergradient(
        self, outer_loss: Tensor, hyperparameters: Mapping[str, Hyperparameter]
    ) -> dict[str, Tensor]:
        """Return dE/dλ for each hyperparameter, in its own units and shape."""

    @abstractmethod
    def close(self) -> None:
        """Hand weights and buffers back to the live model and optimizer."""


class Engine(ABC):
    """A method of computing hypergradients.

    Attributes:
        needs_loss: whether it must be given the inner loss with its graph (`step(loss)`). An engine
            that does not can learn from the user's own `loss.backward(); optimizer.step()`.
    """

    needs_loss: bool

    @abstractmethod
    def open(self, optimizer: torch.optim.Optimizer, slots: Slots, through_loss: bool) -> Window:
        """Open a window at the present state of a live model and optimizer.

        Args:
            optimizer: the bare optimizer.
            slots: where the model keeps the parameters.
            through_loss: whether a hyperparameter of the inner loss is learned.
        """

    @abstractmethod
    def cost(self, horizon: int, through_loss: bool) -> float:
        """Return what a window of `horizon` steps costs, in plain training steps.

        Args:
            horizon: K, the number of steps in the window.
            through_loss: whether a hyperparameter of the inner loss is learned.
        """
