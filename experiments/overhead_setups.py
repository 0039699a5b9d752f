"""What is timed: one training set-up with the bare optimizer, the wrapper and `higher` by hand.

Everything is measured in one process, in turns, so that a slow moment hits all alike.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.devices import synchronize
from experiments.models import MLP, SmallCNN

IMAGE, CLASSES, BATCH = (1, 28, 28), 10, 128
NEVER = 10**9  # an `update_every` beyond any run: after the first window there is no other
SETTINGS: dict[str, float] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
Action = Callable[[], None]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: MLP(IMAGE, CLASSES, [256]),
    "CNN": lambda: SmallCNN(IMAGE, CLASSES, [8, 16]),
}


class Bench:
    """One training set-up, timed on a single batch that stays on the device.

    Each image is there twice, with labels of its own, so that the loss cannot fall to zero: its
    gradients would become subnormal numbers, with which a CPU takes several times as long.

    Args:
        make_model: builds the model.
        device: where it runs.
        batch: examples in it.
    """

    def __init__(
        self, make_model: Callable[[], nn.Module], device: torch.device, batch: int = BATCH
    ) -> None:
        torch.manual_seed(0)
        self.make_model, self.device, self.batch = make_model, device, batch
        self.x = torch.randn(batch // 2, *IMAGE, device=device).repeat(2, 1, 1, 1)
        self.y = torch.randint(CLASSES, (batch,), device=device)

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.SGD]:
        """A fresh model, and SGD with a warm momentum buffer."""
        torch.manual_seed(1)
        model = self.make_model().to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)  # type: ignore[arg-type]
        self.loss(model).backward()
        optimizer.step()
        return model, optimizer

    def loss(self, model: nn.Module) -> Tensor:
        """Inner and outer loss alike: the cost is the same."""
        return cross_entropy(model(self.x), self.y)

    def plain_step(self) -> Action:
        """One step with the bare optimizer."""
        model, optimizer = self.model_and_optimizer()

        def step() -> None:
            loss = self.loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def wrapped_step(self) -> Action:
        """One step with a learning `HyperOptimizer`, outside windows."""
        model, optimizer = self.model_and_optimizer()
        outer_loss = hypertorch.ValidationLoss(model, cross_entropy, [(self.x, self.y)])
        learning = hypertorch.HyperOptimizer(
            optimizer, model, outer_loss, window=1, update_every=NEVER
        )
        learning.step(self.loss(model))  # the only window
        return lambda: learning.step(self.loss(model))

    def engine_window(self, engine: hypertorch.Engine, horizon: int, count: int = 2) -> Action:
        """`horizon` steps and their hypergradients by `engine`, in one window after another.

        Args:
            engine: how.
            horizon: steps in a window.
            count: how many numbers are learned: 2 are lr and weight decay, any other number are
                weights of the training examples.
        """
        model, optimizer = self.model_and_optimizer()
        weights = hypertorch.Hyperparameter(torch.ones(count), hypertorch.positive, name="weights")
        rows = torch.randint(count, (self.batch,), device=self.device)

        def loss() -> Tensor:
            if count == 2:
                return self.loss(model)
            each = cross_entropy(model(self.x), self.y, reduction="none")
            return (weights()[rows] * each).mean()

        learning = hypertorch.HyperOptimizer(
            optimizer,
            model,
            hypertorch.ValidationLoss(model, cross_entropy, [(self.x, self.y)]),
            learn=("lr", "weight_decay") if count == 2 else (weights,),
            window=horizon,
            update_every=horizon,
            engine=engine,
        )

        def window() -> None:
            for _ in range(horizon):
                learning.step(loss if engine.needs == "closure" else loss())

        return window

    def sparse_updates(
        self, engine: hypertorch.Engine, update_every: int, validation_batch: int
    ) -> Action:
        """`update_every` steps, the first of which is a window by itself.

        Args:
            engine: how hypergradients are computed.
            update_every: steps from one outer update to the next.
            validation_batch: examples that the outer loss is computed on.
        """
        model, optimizer = self.model_and_optimizer()
        held_out = self.x[:validation_batch], self.y[:validation_batch]
        outer_loss = hypertorch.ValidationLoss(model, cross_entropy, [held_out])
        learning = hypertorch.HyperOptimizer(
            optimizer, model, outer_loss, window=1, update_every=update_every, engine=engine
        )

        def period() -> None:
            for _ in range(update_every):
                learning.step(self.loss(model))

        return period

    def window_by_torchopt(self, horizon: int) -> Action:
        """The same steps by torchopt's `MetaSGD`, which differentiates in lr alone.

        Raises:
            ImportError: torchopt is not installed; it is no dependency.
        """
        torchopt: Any = importlib.import_module("torchopt")
        model, _ = self.model_and_optimizer()
        lr = torch.tensor(SETTINGS["lr"], device=self.device, requires_grad=True)
        fixed = {name: SETTINGS[name] for name in ("momentum", "weight_decay")}
        optimizer = torchopt.MetaSGD(model, lr=lr, **fixed)

        def window() -> None:
            start = torchopt.extract_state_dict(model), torchopt.extract_state_dict(optimizer)
            for _ in range(horizon):
                optimizer.step(self.loss(model))
            model.eval()
            torch.autograd.grad(self.loss(model), [lr])
            model.train()
            torchopt.recover_state_dict(model, start[0])
            torchopt.recover_state_dict(optimizer, start[1])

        return window

    def window_by_hand(self, horizon: int) -> Action:
        """The same steps and hypergradients by `higher` alone, with its own SGD."""
        model, optimizer = self.model_and_optimizer()
        learned = [
            torch.tensor(SETTINGS[name], device=self.device, requires_grad=True)
            for name in ("lr", "weight_decay")
        ]
        override = {"lr": [learned[0]], "weight_decay": [learned[1]]}

        def window() -> None:
            # `higher.innerloop_ctx`, spelt out: that would pick the Φ that hypertorch registers.
            fast = higher.monkeypatch(model, self.device)
            unrolled = higher.optim.DifferentiableSGD(
                optimizer, model.parameters(), fmodel=fast, override=override
            )
            for _ in range(horizon):
                unrolled.step(self.loss(fast))
            fast.eval()
            torch.autograd.grad(self.loss(fast), learned)
            fast.train()

        return window


def timings(
    actions: Mapping[Any, Action], rounds: int, device: torch.device
) -> dict[Any, list[float]]:
    """The times of each action in milliseconds, all taken in turns.

    Args:
        actions: by name.
        rounds: how often each is timed.
        device: waited for before the clock is read.

    Returns:
        `rounds` times in milliseconds by name; equal places were measured next to each other.
    """
    times: dict[Any, list[float]] = {name: [] for name in actions}
    for name in _turns(list(actions), rounds):
        times[name].append(1e3 * _time(actions[name], device))
    return times


def _turns(names: list[Any], rounds: int) -> list[Any]:
    """Every name once per round, in an order that is turned by one place each time."""
    return [
        name for i in range(rounds) for name in names[i % len(names) :] + names[: i % len(names)]
    ]


def _time(action: Action, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def repeated(action: Action, times: int) -> Action:
    """The action so many times in a row."""

    def run() -> None:
        for _ in range(times):
            action()

    return run
