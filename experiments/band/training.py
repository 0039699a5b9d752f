"""One run of one method: the same loop, evaluations and choice of weights for all of them."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

from experiments.band.evaluating import Checkpoints
from experiments.band.methods import METHODS
from experiments.band.problems import Problem
from experiments.band.rows import Row, Run
from experiments.band.trainee import PlainClock, Trainee
from experiments.config_errors import ConfigError
from experiments.evaluation import or_infinite
from experiments.loaders import endless


def train(problem: Problem, run: Run) -> Row:
    """Train from the run's start to the end, or until the validation loss is not finite.

    An exception of the method is a divergence with a message, not the end of the comparison.

    Args:
        problem: task and seed.
        run: the key.

    Returns:
        The finished row.

    Raises:
        ConfigError: if the method's package is missing.
    """
    loop = Loop(problem, run)
    error = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loop.build()
            loop.run()
        except ConfigError:
            raise
        except Exception as failure:  # whatever a method raises ends its run alone
            error = f"{type(failure).__name__}: {failure}"
        loop.trainee.close()
    return loop.row(error)


class Loop:
    """The loop of one run.

    Args:
        problem: task and seed.
        run: the key.
    """

    def __init__(self, problem: Problem, run: Run) -> None:
        self.problem, self.key = problem, run
        self.seconds, self.step, self.is_finite = 0.0, 0, True
        self.checkpoints = Checkpoints(problem.task.validation)
        self.clock = PlainClock(problem, run.base)
        self.trainee: Trainee = self.clock.trainee  # untrained, until the method is built

    def build(self) -> None:
        """Build the method; some train before the first step."""
        model = self.problem.model().train()
        started = time.perf_counter()
        self.trainee = METHODS[self.key.method].build(model, self.problem, self.key)
        self.seconds = time.perf_counter() - started

    def run(self) -> None:
        """Train and evaluate."""
        self._evaluate()
        batches, evaluated = endless(self.problem.loader()), 0
        started = time.perf_counter()
        while self.step < self.problem.steps and self.is_finite:
            batch = next(batches)
            self.trainee.step(batch)
            self.step += 1
            if self.step in self.problem.evaluation_steps:
                self.seconds += time.perf_counter() - started
                self.clock.run(batch, self.step - evaluated)
                self._evaluate()
                evaluated, started = self.step, time.perf_counter()

    def _evaluate(self) -> None:
        with self.trainee.evaluated() as model:
            self.is_finite = self.checkpoints.offer(model, self.step, *self.trainee.values())

    def row(self, error: str) -> Row:
        """What there is to know about the run: of one that was never built, the initial weights."""
        if not self.checkpoints.history:
            self.checkpoints.offer(self.trainee.model, 0, math.nan, math.nan)
        with self.trainee.evaluated() as model:
            tested: dict[str, Any] = self.checkpoints.test(model, self.problem.task.test)
        diverged = bool(error) or not self.is_finite
        if diverged:
            tested |= dict.fromkeys(
                ("test_accuracy", "test_accuracy_by_loss", "last_test_accuracy"),
                self.problem.chance,
            )
        _, last_loss, last_accuracy, lr, weight_decay = self.checkpoints.history[-1]
        return Row(
            self.key,
            **tested,
            validation_accuracy=self.checkpoints.best[0],
            validation_loss=-self.checkpoints.best[1],
            best_step=self.checkpoints.best_step,
            lowest_validation_loss=self.checkpoints.lowest,
            last_validation_accuracy=last_accuracy,
            last_validation_loss=or_infinite(last_loss),
            final_lr=lr,
            final_weight_decay=weight_decay,
            steps=self.problem.steps,
            cost_steps=self.trainee.cost,
            seconds=self.seconds,
            plain_seconds=self.clock.estimate(self.step),
            diverged=diverged,
            rollbacks=self.trainee.rollbacks,
            error=error,
            history=self.checkpoints.history,
        )
