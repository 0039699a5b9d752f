"""dE/dλ_j by a method of its own for each λ_j, of the same training steps and the same E.

What is right for one hyperparameter may be blind to another: η moves the weights at once, weight
decay by where training would come to rest.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError, listed
from ..transition import Gradients
from .engine import (
    Carried,
    Engine,
    LiveWindow,
    OuterLoss,
    TakenOnce,
    Training,
    TrainingStep,
    Window,
)


class PerHyperparameter(Engine):
    """Several engines side by side, each of which computes some of the hypergradients.

    The steps are made once, on the live weights, so that each engine must be content with the
    gradients in `.grad`: `FirstOrder`, `Displacement`, and `Implicit` with an `inner_loss`. A
    training loop stays as it is.

    Args:
        engines: by the name of what is learned; the same object under several names is one engine.

    Raises:
        ArgumentTypeError, ArgumentError: there is none, or one of them needs the loss.

    Cost: what each engine adds to the training steps; the gradient of E at the last weights, once.

    Example:
        >>> import torch
        >>> from hypertorch import FirstOrder, HyperOptimizer, Implicit, Lanczos
        >>> model, x, y = torch.nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
        >>> def loss():
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> implicit = Implicit(Lanczos(), inner_loss=loss)
        >>> optimizer = HyperOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3),
        ...     model,
        ...     outer_loss=loss,
        ...     engine=PerHyperparameter({"lr": FirstOrder(), "weight_decay": implicit}),
        ... )
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss().backward()
        ...     _ = optimizer.step()
        >>> sorted(optimizer.hypergradients)
        ['lr', 'weight_decay']
    """

    needs = "gradients"

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        if not isinstance(engines, Mapping):
            raise ArgumentTypeError(
                "`engines` must map names to engines. "
                f'Got {type(engines).__name__}. Pass {{"lr": FirstOrder(), …}}.'
            )
        if not engines:
            raise ArgumentError("`engines` is empty. Give each learned name an engine.")
        for name, engine in engines.items():
            if not isinstance(engine, Engine):
                raise ArgumentTypeError(
                    f"The engine of `{name}` must be one such as FirstOrder(). "
                    f"Got {type(engine).__name__}."
                )
            if engine.needs != "gradients":
                raise ArgumentError(
                    f"`PerHyperparameter` cannot give `{name}` to {engine!r}, which makes the "
                    "steps itself. Use `FirstOrder()`, `Displacement()`, or `Implicit()` with an "
                    "`inner_loss`."
                )
        self.engines = dict(engines)
        self.differentiates_twice = any(e.differentiates_twice for e in engines.values())

    def check(self, training: Training) -> None:
        """Refuse a hyperparameter without an engine, and what its engine refuses.

        Raises:
            ArgumentError: names what has no engine, or is not learned.
            UnsupportedError: from the engine; or of a setting per tensor or element.
        """
        learned, given = set(training.hyperparameters), set(self.engines)
        if learned != given:
            raise ArgumentError(
                "`PerHyperparameter` needs an engine for each learned name, and for no other. "
                f"Learned: {listed(learned)}; engines: {listed(given)}."
            )
        shares = self._shares(training)
        for engine, own in shares:
            engine.check(own)
        for name, setting in training.settings.items():
            if len(shares) > 1 and not setting.is_scalar:
                raise UnsupportedError(
                    f"`PerHyperparameter` cannot learn `{name}` per {setting.granularity}: the "
                    'other engines see one number per group. Learn it per "group", or "shared".'
                )

    def prepare(self, training: Training) -> None:
        """Let each engine set up what it learns."""
        for engine, own in self._shares(training):
            engine.prepare(own)

    def _shares(self, training: Training) -> list[tuple[Engine, Training]]:
        """Return each engine once, with what it learns."""
        found = []
        for engine in {id(e): e for e in self.engines.values()}.values():
            names = [name for name in training.hyperparameters if self.engines[name] is engine]
            own = {name: training.hyperparameters[name] for name in names}
            found.append((engine, replace(training, hyperparameters=own)))
        return found

    def open(self, training: Training, carried: Carried | None = None) -> "SharedWindow":
        """Open a window of each engine at the present state."""
        parts = (carried or {}).get("parts", {})
        training = replace(training, averages={})
        windows = {
            (names := _names(own)): engine.open(own, parts.get(names))
            for engine, own in self._shares(training)
        }
        return SharedWindow(training, windows)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + Σ (what each engine adds), as if each took E's gradient for itself."""
        added = [engine.cost(horizon, own) - horizon for engine, own in self._shares(training)]
        return horizon + sum(added)

    def __repr__(self) -> str:
        return f"PerHyperparameter({self.engines!r})"


class SharedWindow(LiveWindow):
    """Live steps that several windows see.

    Args:
        training: what is trained and learned.
        windows: one per engine, at the same state, by the names of what it learns.
    """

    def __init__(self, training: Training, windows: Mapping[str, Window]) -> None:
        super().__init__(training)
        self._windows = dict(windows)

    def step(self, step: TrainingStep) -> None:
        """Let each window see the step before it is made, and again after, by nesting them."""
        self._nested(step, list(self._windows.values()))

    def _nested(self, step: TrainingStep, windows: list[Window]) -> None:
        if not windows:
            step.make(None)
            return

        def make(_: Tensor | None, __: Gradients | None) -> None:
            self._nested(step, windows[1:])

        windows[0].step(TrainingStep(step.transition, make, step.loss))

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E, and dE/dλ from each engine.

        Raises:
            HypertorchError: what one of the engines raises.
        """
        once = TakenOnce(outer_loss, self.training.values())
        found: dict[str, Tensor] = {}
        for window in self._windows.values():
            loss, own = window.hypergradient(once)
            found.update(own)
        self.unforeseen = sum(window.unforeseen for window in self._windows.values()) - once.spared
        return loss, {name: found[name] for name in self.training.hyperparameters}

    def close(self) -> Carried | None:
        """Close each window; return what goes on, by the names of what its engine learns."""
        closed = {names: window.close() for names, window in self._windows.items()}
        parts = {names: part for names, part in closed.items() if part is not None}
        return {"parts": parts} if parts else None


def _names(training: Training) -> str:
    """Return what is learned, in an order that arguments have no part in."""
    return listed(training.hyperparameters)
