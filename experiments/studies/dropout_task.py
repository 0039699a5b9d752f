"""The task of `self_tuning` and `black_box`: few images, and a perceptron regularised four ways.

Dropout of pixels and of hidden units, weight decay λ, and random shifts of the training images.
All methods train as long and keep the weights that did best on validation data.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import hypertorch
from experiments.evaluation import evaluate
from experiments.loaders import TensorLoader, endless
from experiments.optimizers import close, cost_of, training_step
from experiments.self_tuning import TRAIN_STEPS, ResponseLinear, SelfTuning
from experiments.studies.schema import DropoutTaskConfig
from experiments.tasks import Task

Row = dict[str, Any]
Noise = Callable[[Tensor, Any], Tensor]
CONSTRAINTS = {
    "input_dropout": hypertorch.unit_interval,
    "hidden_dropout": hypertorch.unit_interval,
    "shift": hypertorch.interval(0.0, 8.0),
    "weight_decay": hypertorch.positive,
}
BOUNDS = {
    "input_dropout": (1e-3, 0.95),
    "hidden_dropout": (1e-3, 0.95),
    "shift": (0.01, 7.9),
    "weight_decay": (1e-7, 1.0),
}


def dropped(x: Tensor, rate: Tensor | float) -> Tensor:
    """Dropout: x m / (1 − p) with m ~ Bernoulli(1 − p). It has no derivative in p.

    Args:
        x: `(n, units)`.
        rate: p, one for all or one for each of the n examples.
    """
    rate = torch.as_tensor(rate).detach().reshape(-1, 1)
    return x * (torch.rand_like(x) >= rate) / (1 - rate)


def blurred(x: Tensor, rate: Tensor | float) -> Tensor:
    """Gaussian dropout: x (1 + √(p / (1 − p)) ε), ε ~ N(0, 1): dropout's mean and variance.

    Srivastava et al. 2014, section 10. It is differentiable in p, exactly.
    """
    rate = torch.as_tensor(rate).reshape(-1, 1)
    return x * (1 + (rate / (1 - rate)).sqrt() * torch.randn_like(x))


def shifted(x: Tensor, size: Tensor | float) -> Tensor:
    """Images moved by whole pixels, round(σ ε) down and across, ε ~ N(0, 1); borders repeat.

    Args:
        x: `(n, 1, height, width)`.
        size: σ in pixels, one for all or one per image. There is no derivative in it.
    """
    n, _, height, width = x.shape
    by = (torch.as_tensor(size).detach() * torch.randn(2, n)).round().long()
    rows = (torch.arange(height) - by[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width) - by[1, :, None]).clamp(0, width - 1)
    return x[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None]].unsqueeze(1)


class Perceptron(nn.Module):
    """Two hidden layers of ReLU; with rates, its pixels and hidden units are dropped.

    Args:
        layer: `(inputs, outputs) -> Module`.
        widths: pixels, hidden units twice, classes.
        noise: `dropped` or `blurred`.
    """

    def __init__(
        self,
        layer: Callable[[int, int], nn.Module],
        widths: Sequence[int],
        noise: Noise = dropped,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(*pair) for pair in itertools.pairwise(widths))
        self.noise = noise

    def forward(
        self, x: Tensor, code: Tensor | None = None, rates: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Logits; `code` is what `ResponseLinear` layers are given besides."""
        more = () if code is None else (code,)
        x = x.flatten(1)
        for k, layer in enumerate(self.layers):
            if k > 0:
                x = relu(x)
            if rates is not None:
                x = self.noise(x, rates["hidden_dropout" if k else "input_dropout"])
            x = layer(x, *more)
        return x


class Training:
    """One run by plain SGD, with fixed hyperparameters or some learned by an engine.

    Args:
        task: the data.
        settings: of the study.
        seed: of weights, batches and noise.
        start: of all hyperparameters, by name.
        learn: names of those that are learned.
        engine: how; `None`: nothing is learned.
        noise: `dropped` or `blurred`.
        rhythm: steps of a window, and from one outer update to the next.
    """

    def __init__(
        self,
        task: Task,
        settings: DropoutTaskConfig,
        seed: int,
        start: Mapping[str, float],
        learn: Sequence[str] = (),
        engine: hypertorch.Engine | None = None,
        noise: Noise = dropped,
        rhythm: tuple[int, int] = (5, 20),
    ) -> None:
        self.task, self.settings, self.start = task, settings, dict(start)
        torch.manual_seed(seed)
        self.batches = endless(TensorLoader(task.train, settings.batch_size, True, seed))
        validation = TensorLoader(task.validation, settings.validation_batch_size, True, seed)
        self.model = Perceptron(nn.Linear, widths(task, settings), noise)
        self.learned = hyperparameters(start, [n for n in learn if n != "weight_decay"])
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=0.9,
            weight_decay=start["weight_decay"],
        )
        self.needs_closure = engine is not None and engine.needs == "closure"
        if engine is not None:
            self.optimizer = hypertorch.HyperOptimizer(
                self.optimizer,
                self.model,
                outer_loss=hypertorch.ValidationLoss(self.model, cross_entropy, validation),
                learn={n: self.learned.get(n, "shared") for n in learn},
                engine=engine,
                window=rhythm[0],
                update_every=rhythm[1],
            )
            self.learned = self.optimizer.hyperparameters

    def step(self) -> None:
        """One training step, and an outer update when it is due."""
        loss_fn = functools.partial(self._loss, *next(self.batches))
        if isinstance(self.optimizer, hypertorch.HyperOptimizer):
            self.optimizer.step(loss_fn if self.needs_closure else loss_fn())
        else:
            training_step(self.optimizer, loss_fn())

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        rates = self.start | {name: h() for name, h in self.learned.items()}
        return cross_entropy(self.model(shifted(x, rates["shift"]), rates=rates), y)

    def weights(self) -> dict[str, Tensor]:
        """The present weights, of a `Perceptron` with `nn.Linear` layers."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def values(self) -> dict[str, float]:
        """All hyperparameters as they are now."""
        return self.start | {name: h().item() for name, h in self.learned.items()}

    def close(self) -> None:
        """Let the model hold ordinary parameters."""
        close(self.optimizer)

    def cost(self, steps: int) -> float:
        """What the run cost, in plain training steps."""
        return cost_of(self.optimizer, steps)


class SelfTuned:
    """One run of a self-tuning network on the same task.

    Args:
        task: the data.
        settings: of the study.
        seed: of weights, batches and noise.
        start: of all hyperparameters, by name.
        learn: names of those that are learned.
    """

    def __init__(
        self,
        task: Task,
        settings: DropoutTaskConfig,
        seed: int,
        start: Mapping[str, float],
        learn: Sequence[str],
    ) -> None:
        self.task, self.start = task, dict(start)
        torch.manual_seed(seed)
        self.batches = endless(TensorLoader(task.train, settings.batch_size, True, seed))
        held_out = TensorLoader(task.validation, settings.validation_batch_size, True, seed)
        self.held_out = endless(held_out)
        layer = functools.partial(ResponseLinear, numbers=len(learn))
        self.model = Perceptron(layer, widths(task, settings))
        self.layers = [part for part in self.model.layers if isinstance(part, ResponseLinear)]
        self.learned = hyperparameters(start, learn)
        sgd = torch.optim.SGD(self.model.parameters(), lr=settings.lr, momentum=0.9)
        self.tuner = SelfTuning(
            sgd,
            self.learned,
            self._inner_loss,
            self._outer_loss,
            rate=settings.response_rate,
            warm_up=settings.warm_up,
        )

    def step(self) -> None:
        """One training step of ŵ, and a step of λ when it is due."""
        self.tuner.step()

    def _inner_loss(self, tuner: SelfTuning) -> Tensor:
        x, y = next(self.batches)
        code, values = tuner.perturbed(len(y))
        rates: dict[str, Any] = {**self.start, **values}
        fit = cross_entropy(self.model(shifted(x, rates["shift"]), code, rates), y)
        squares = torch.stack([layer.squared_norm(code) for layer in self.layers]).sum(0)
        return fit + (rates["weight_decay"] / 2 * squares).mean()

    def _outer_loss(self, tuner: SelfTuning) -> Tensor:
        x, y = next(self.held_out)
        code, _ = tuner.perturbed(len(y))
        return cross_entropy(self.model(x, code), y)

    def weights(self) -> dict[str, Tensor]:
        """ŵ at the present λ, of a `Perceptron` with `nn.Linear` layers."""
        return {
            f"layers.{k}.{name}": value
            for k, layer in enumerate(self.layers)
            for name, value in layer.predicted(self.tuner.code()).items()
        }

    def values(self) -> dict[str, float]:
        """All hyperparameters as they are now."""
        return self.start | {name: h().item() for name, h in self.learned.items()}

    def close(self) -> None:
        """Nothing is open."""

    def cost(self, steps: int) -> float:
        """2 for each step on φ, which has twice the weights, and for each step on λ."""
        return 2.0 * (steps + max(0, steps - self.tuner.warm_up) / TRAIN_STEPS)


def widths(task: Task, settings: DropoutTaskConfig) -> list[int]:
    """Pixels, hidden units twice, classes."""
    return [task.train.x[0].numel(), settings.hidden, settings.hidden, task.classes]


def hyperparameters(
    start: Mapping[str, float], learn: Sequence[str]
) -> dict[str, hypertorch.Hyperparameter]:
    """A `Hyperparameter` for each name in `learn`."""
    return {
        name: hypertorch.Hyperparameter(
            start[name], CONSTRAINTS[name], name=name, bounds=BOUNDS[name]
        )
        for name in learn
    }


def trained(run: Training | SelfTuned, settings: DropoutTaskConfig) -> tuple[Row, list[Row]]:
    """Train; keep the weights with the least validation loss, and try them on test data.

    Args:
        run: a new one.
        settings: of the study.

    Returns:
        Scores of the weights that were kept, with the last hyperparameters and the cost; and
        hyperparameters with the validation loss while it trained.
    """
    started = time.perf_counter()
    network = Perceptron(nn.Linear, widths(run.task, settings))
    best, kept, at, trace = math.inf, run.weights(), 0, []
    for step in range(settings.steps + 1):
        if step % settings.evaluate_every == 0:
            network.load_state_dict(run.weights())
            loss, _ = evaluate(network, run.task.validation)
            trace.append({"step": step, "validation_loss": loss, **run.values()})
            if loss < best:
                best, kept, at = loss, run.weights(), step
        if step < settings.steps:
            run.step()
    run.close()
    network.load_state_dict(kept)
    test_loss, test_accuracy = evaluate(network, run.task.test)
    row: Row = {"validation_loss": best, "test_loss": test_loss, "test_accuracy": test_accuracy}
    row |= {"best_step": at, "cost": run.cost(settings.steps), **run.values()}
    return row | {"seconds": time.perf_counter() - started}, trace
