"""How dE/dλ is computed: the interface every method of the literature has here.

An engine is told of a window's steps one by one and asked for dE/dλ at its end. How ρ then moves is
not its business.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..dynamics import Dynamics
from ..errors import WindowError
from ..hyperparameters import Hyperparameter, held_as
from ..loss_graph import LossGraph
from ..settings import Setting
from ..slots import Slots
from ..state import State, versions
from ..transition import Gradients, Transition, per_parameter, trainable

if TYPE_CHECKING:
    from .averages import Average

OuterLoss = Callable[[], Tensor]

#: What one window hands to the next, and to a checkpoint: plain containers of tensors and numbers.
Carried = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What is trained and what is learned: the live objects an engine works on.

    Attributes:
        optimizer: the bare optimizer.
        slots: the model, and where it keeps the parameters.
        dynamics: Φ.
        hyperparameters: λ, by name.
        is_contiguous: whether each window begins where the one before it ended, so that an engine
            sees every training step.
        start: copies of the state that a window about to open starts from, to be read alone;
            `None` where nobody keeps any.
        averages: w̄ by β, of windows that see the same steps; `None` for a window by itself.
    """

    optimizer: torch.optim.Optimizer
    slots: Slots
    dynamics: Dynamics
    hyperparameters: Mapping[str, Hyperparameter]
    is_contiguous: bool = True
    start: State | None = None
    averages: dict[float, "Average"] | None = None

    @property
    def settings(self) -> dict[str, Setting]:
        """The hyperparameters of the optimizer."""
        return {n: h for n, h in self.hyperparameters.items() if isinstance(h, Setting)}

    @property
    def in_loss(self) -> dict[str, Hyperparameter]:
        """The others, which the user's losses call; or Φ itself, if a param group holds them."""
        return {n: h for n, h in self.hyperparameters.items() if not isinstance(h, Setting)}

    @property
    def called(self) -> set[str]:
        """The names of those that losses alone use, as a whole: they must call them."""
        whole = {n for n, h in self.in_loss.items() if not (h.is_indexed and h.value.dim())}
        return whole - self.in_dynamics.keys()

    @property
    def in_dynamics(self) -> dict[str, set[str]]:
        """What each hyperparameter that Φ uses is called: its name, and its keys in a group."""
        groups = self.optimizer.param_groups
        keys = {n: held_as(h, groups) for n, h in self.in_loss.items()}
        held = {n: {n, *own} for n, own in keys.items() if own}
        return {n: {n} for n in self.settings} | held

    def expect_rows(self) -> None:
        """Let a λ of many numbers in the loss be differentiated where it is indexed alone."""
        for h in self.in_loss.values():
            h.expect_rows()

    def values(self) -> dict[str, Tensor]:
        """Return λ by name: leaves."""
        return {name: h.value for name, h in self.hyperparameters.items()}

    def count(self) -> int:
        """Return how many numbers are learned."""
        return sum(h.value.numel() for h in self.hyperparameters.values())


@dataclass
class TrainingStep:
    """One training step that belongs to a window, as the engine is given it.

    Attributes:
        transition: Φ_t.
        maker: makes the step on the live weights, from its loss and its gradients.
        loss: the inner loss, with its graph where the engine asked for one; `None` while unknown.
        closure: computes the inner loss at the weights the model holds, as often as it is called;
            `None` where the engine asked for none.
        watch: is shown loss and gradients before they are used; raises where they must not be.
    """

    transition: Transition
    maker: Callable[[Tensor | None, Gradients | None], None]
    loss: Tensor | None = None
    closure: Callable[[], Tensor] | None = None
    watch: Callable[[Tensor | None, Gradients], None] = lambda loss, grads: None

    def make(self, grads: Gradients | None) -> None:
        """Make the step on the live weights, by torch's own optimizer where it can.

        Args:
            grads: to step along; `None` for those in `.grad`.
        """
        self.maker(self.loss, grads)

    def check(self, grads: Gradients) -> None:
        """Raise if the step must not be made along these gradients."""
        self.watch(self.loss, grads)

    def with_graph(self) -> Tensor:
        """Return the inner loss; an engine that needs one has been given one."""
        assert self.loss is not None
        return self.loss

    def evaluate(self) -> Tensor:
        """Call the closure at the weights the model holds, and set `loss`."""
        assert self.closure is not None
        self.loss = self.closure()
        return self.loss


class Window(ABC):
    """An open window: training steps that are being differentiated together.

    Attributes:
        params: the weights as the model holds them now.
        unforeseen: what its hypergradient cost beyond what `Engine.cost` says, in plain training
            steps; negative where it cost less.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.unforeseen = 0.0
        self.params: list[Tensor] = list(training.slots.params)
        self._versions: list[int] = []
        self.follow()

    def follow(self) -> None:
        """Take the weights' present values as this window's own doing."""
        self._versions = versions(self.params)

    @property
    def was_written_to(self) -> bool:
        """Whether someone else changed a weight in place: the window no longer describes it."""
        return self._versions != versions(self.params)

    @abstractmethod
    def step(self, step: TrainingStep) -> None:
        """Make one training step s_t = Φ_t(s_{t-1}, λ) and take it into the window."""

    @abstractmethod
    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ for each hyperparameter, in its own units and shape; it may be sparse.

        Args:
            outer_loss: computes E at the weights the model holds; the model is left in whatever
                mode it had, but module buffers and random numbers may have moved.
        """

    @abstractmethod
    def close(self) -> Carried | None:
        """Leave the live model and optimizer as training made them; return what goes on."""


class LiveWindow(Window):
    """A window whose steps are made on the live weights, by the optimizer itself."""

    def follow(self) -> None:
        """Take the weights' present values, and which of them train, as they should be."""
        super().follow()
        self._trained = self._trains()

    @property
    def was_written_to(self) -> bool:
        """Whether someone else changed a weight in place, froze one or released one."""
        return super().was_written_to or self._trained != self._trains()

    def _trains(self) -> list[bool]:
        return [p.requires_grad for p in self.params]

    def close(self) -> Carried | None:
        """Nothing is to be handed back."""
        return None


class Engine(ABC):
    """A method of computing hypergradients.

    Attributes:
        needs: what it must be given of each step in a window: the `"gradients"` in `.grad` (it can
            then learn from an unchanged `loss.backward(); optimizer.step()`), the `"loss"` with its
            graph, or a `"closure"` that computes the same loss again.
        differentiates_twice: whether torch must be told so before the forward passes of training.
        differentiates_outer_loss: whether E must have a graph; else it may be any number, such as
            an error rate.
    """

    needs: Literal["gradients", "loss", "closure"]
    differentiates_twice: bool = True
    differentiates_outer_loss: ClassVar[bool] = True

    def check(self, training: Training) -> None:
        """Raise if a hyperparameter, Φ or model cannot be differentiated by this method.

        Nothing is changed.

        Raises:
            UnsupportedError: names it, and an engine that can.
        """
        return None

    def prepare(self, training: Training) -> None:
        """Tell what is learned what windows will ask of it, before the losses that use it.

        `Hyperparameter.expect_rows` is all there is; the functional form takes it back.
        """
        return None

    @abstractmethod
    def open(self, training: Training, carried: Carried | None = None) -> Window:
        """Open a window at the present state of a live model and optimizer.

        Args:
            training: what is trained and learned.
            carried: what the window before this one returned when it was closed.
        """

    @abstractmethod
    def cost(self, horizon: int, training: Training) -> float:
        """Return what a window of `horizon` steps costs, in plain training steps.

        It is known beforehand, and a function of its arguments alone; what only the window can
        know is its `unforeseen`.

        Args:
            horizon: K, the number of steps in the window.
            training: what is trained and learned.
        """


def outer_gradient(
    outer_loss: OuterLoss,
    params: Sequence[Tensor],
    values: Mapping[str, Tensor],
    average: float | None = None,
) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
    """Return E, ∂_s E at the weights and ∂_λ E; `None` or missing where E does not depend on one.

    Args:
        outer_loss: E.
        params: the weights, which the model holds.
        values: λ, by name.
        average: β, where the weights are the window's average.

    Raises:
        WindowError: E depends on none of the weights, or on one as it was when the window opened.
    """
    if isinstance(outer_loss, TakenOnce):
        return outer_loss.gradient(params, values, average)
    loss, own = outer_loss(), trainable(params)
    LossGraph(loss, params).check_references()
    found = torch.autograd.grad(loss, [*own, *values.values()], allow_unused=True)
    gradients = per_parameter(found, params)
    if all(gradient is None for gradient in gradients):
        raise independent_outer_loss()
    direct = zip(values, found[len(own) :], strict=True)
    return loss.detach(), gradients, {name: part for name, part in direct if part is not None}


def added(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of two parts of dE/dλ; a missing one is zero, and a sparse one stays so."""
    both = first.keys() & second.keys()
    sums = {n: _sum(first[n], second[n]) for n in both}
    return {**first, **second, **sums}


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return b + a if a.is_sparse else a + b


def completed(found: dict[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return dE/dλ of every λ: exactly zero where it is missing."""
    return {n: found[n] if n in found else torch.zeros_like(v) for n, v in values.items()}


class TakenOnce:
    """E whose gradient several windows of the same steps want: it is computed once.

    Args:
        outer_loss: E.
        values: λ of all of them.

    Attributes:
        spared: how often it was wanted again.
    """

    def __init__(self, outer_loss: OuterLoss, values: Mapping[str, Tensor]) -> None:
        self._outer_loss, self._values = outer_loss, values
        self._found: dict[float | None, tuple[Tensor, list[Tensor | None], dict[str, Tensor]]] = {}
        self.spared = 0

    def __call__(self) -> Tensor:
        """Return E at the weights the model holds."""
        return self._outer_loss()

    def gradient(
        self, params: Sequence[Tensor], values: Mapping[str, Tensor], average: float | None
    ) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
        """Return what `outer_gradient` does at the last weights, or at those of an average."""
        if average in self._found:
            self.spared += 1
        else:
            self._found[average] = outer_gradient(self._outer_loss, params, self._values)
        loss, at_weights, direct = self._found[average]
        return loss, at_weights, {name: direct[name] for name in values if name in direct}


def independent_outer_loss() -> WindowError:
    """Return the error for an E that does not depend on the weights."""
    return WindowError(
        "The outer loss does not depend on the weights that train. Compute it from the "
        "`model` that was wrapped, not from a copy or an average of it."
    )
