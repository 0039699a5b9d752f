"""Runs with fixed η and λ in one go, where the model is a perceptron; else one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.band.problems import Problem
from experiments.band.rows import Row, Run
from experiments.band.stacked import StackedMLP, stacked_optimizer
from experiments.band.trainee import start_of
from experiments.band.training import train
from experiments.loaders import Examples
from experiments.models import MLP

EXAMPLES = 500  # evaluated together


def train_many(problem: Problem, runs: Sequence[Run]) -> list[Row]:
    """Train runs of the method "fixed" that share task, seed and base.

    Args:
        problem: task and seed.
        runs: the keys.

    Returns:
        A row for each run, as `train` would return it but for its times: the stack's by run.
    """
    model = problem.model()
    if not isinstance(model, MLP) or runs[0].method != "fixed":
        return [train(problem, run) for run in runs]
    return Stack(problem, model, runs).run()


class Stack:
    """Fixed runs that train together.

    Args:
        problem: task and seed.
        model: a perceptron with the initial weights.
        runs: the keys.
    """

    def __init__(self, problem: Problem, model: MLP, runs: Sequence[Run]) -> None:
        self.problem, self.runs = problem, runs
        self.model = StackedMLP(model, len(runs))
        starts = [start_of(run) for run in runs]
        lr, weight_decay = zip(*starts, strict=True)
        self.optimizer = stacked_optimizer(runs[0].base, self.model, lr, weight_decay)
        count = len(runs)
        self.best: list[tuple[float, float]] = [(-1.0, -math.inf)] * count
        self.best_step, self.lowest = [0] * count, [math.inf] * count
        self.by_accuracy = [p.clone() for p in self.model.params]
        self.by_loss = [p.clone() for p in self.model.params]
        self.last: tuple[list[float], list[float]] = ([], [])
        self.diverged = [False] * count

    def run(self) -> list[Row]:
        """Train to the end, and try the weights on test data."""
        with torch.no_grad():
            started = time.perf_counter()
            self._train()
            return self._rows((time.perf_counter() - started) / len(self.runs))

    def _train(self) -> None:
        self._evaluate(0)
        step, schedules = 0, [run.schedule for run in self.runs]
        loader = self.problem.loader()
        while step < self.problem.steps:
            for batch in loader:
                factors = [self.problem.factor(schedule, step) for schedule in schedules]
                self.model.backward(batch.x, batch.y)
                self.optimizer.step(torch.tensor(factors, dtype=batch.x.dtype))
                step += 1
                if step in self.problem.evaluation_steps:
                    self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        losses, accuracies = self.last = self._measure(self.problem.task.validation)
        better, lower = [], []
        for i, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
            self.diverged[i] |= not math.isfinite(loss)
            if self.diverged[i]:
                continue
            if (accuracy, -loss) > self.best[i]:
                self.best[i], self.best_step[i] = (accuracy, -loss), step
                better.append(i)
            if loss < self.lowest[i]:
                self.lowest[i] = loss
                lower.append(i)
        for kept, chosen in ((self.by_accuracy, better), (self.by_loss, lower)):
            for copy, p in zip(kept, self.model.params, strict=True):
                copy[chosen] = p[chosen]

    def _measure(self, examples: Examples) -> tuple[list[float], list[float]]:
        """Mean loss and accuracy of each copy."""
        loss = correct = torch.zeros(len(self.runs))
        for x, y in zip(*(tensor.split(EXAMPLES) for tensor in examples), strict=True):
            logits = self.model.forward(x)[-1]
            loss = loss + _losses(logits, y)
            correct = correct + (logits.argmax(2) == y).sum(1)
        n = len(examples.y)
        return [value / n for value in loss.tolist()], [count / n for count in correct.tolist()]

    def _tested(self, weights: list[Tensor]) -> tuple[list[float], list[float]]:
        for p, kept in zip(self.model.params, weights, strict=True):
            p.copy_(kept)
        return self._measure(self.problem.task.test)

    def _rows(self, seconds: float) -> list[Row]:
        last = self._measure(self.problem.task.test)
        best, lowest = self._tested(self.by_accuracy), self._tested(self.by_loss)
        rows = []
        for i, run in enumerate(self.runs):
            tested = {
                "test_loss": best[0][i],
                "test_accuracy": best[1][i],
                "test_loss_by_loss": lowest[0][i],
                "test_accuracy_by_loss": lowest[1][i],
                "last_test_accuracy": last[1][i],
            }
            rows.append(self._row(i, run, tested, seconds))
        return rows

    def _row(self, i: int, run: Run, tested: dict[str, Any], seconds: float) -> Row:
        steps = self.problem.steps
        last_loss, diverged = self.last[0][i], self.diverged[i]
        if diverged:
            names = ("test_accuracy", "test_accuracy_by_loss", "last_test_accuracy")
            tested |= dict.fromkeys(names, self.problem.chance)
        lr, weight_decay = start_of(run)
        return Row(
            run,
            **tested,
            validation_accuracy=self.best[i][0],
            validation_loss=-self.best[i][1],
            best_step=self.best_step[i],
            lowest_validation_loss=self.lowest[i],
            last_validation_accuracy=self.last[1][i],
            last_validation_loss=math.inf if diverged else last_loss,
            final_lr=lr,
            final_weight_decay=weight_decay,
            steps=steps,
            cost_steps=steps,
            seconds=seconds,
            plain_seconds=seconds,
            diverged=diverged,
        )


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """The summed cross-entropy of each copy, `(R,)`."""
    copies = len(logits)
    losses = cross_entropy(logits.reshape(-1, logits.shape[2]), y.repeat(copies), reduction="none")
    return losses.view(copies, -1).sum(1)
