"""Learning-rate-free methods from their authors' packages, each used as its README says."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from experiments.band.packages import package
from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.band.trainee import MOMENTUM, Trainee, start_of
from experiments.loaders import Examples

BATCHES_FOR_STATISTICS = 50  # BatchNorm is shown as many before a schedule-free evaluation
START_WITH_BATCH_NORM = 1e-4  # DoG's own advice; else its default

Rates = Callable[[torch.optim.Optimizer], float]


class Rival(Trainee):
    """A package's optimizer; `rate` reads the learning rate that it has found."""

    rate: Rates | None = None

    def values(self) -> tuple[float, float]:
        """η as the method sees it, and the fixed λ."""
        lr, weight_decay = super().values()
        return (self.rate(self.optimizer) if self.rate else lr), weight_decay


def prodigy(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """Prodigy (Mishchenko and Defazio 2023) at its default lr of 1.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: λ₀, decoupled, and the schedule.

    Returns:
        What the loop trains.
    """
    kind = package("prodigyopt").Prodigy
    optimizer = _silently(kind, model.parameters(), weight_decay=run.weight_decay)
    return _rival(model, optimizer, problem, run, lambda o: o.param_groups[0]["d"])


def d_adaptation(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """D-Adaptation (Defazio and Mishchenko 2023) of SGD with momentum or of AdamW, at lr 1.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: base, λ₀ and the schedule.

    Returns:
        What the loop trains.
    """
    module, decay = package("dadaptation"), run.weight_decay
    optimizer = (
        module.DAdaptSGD(model.parameters(), momentum=MOMENTUM, weight_decay=decay)
        if run.base == "sgd"
        else _silently(module.DAdaptAdam, model.parameters(), weight_decay=decay, decouple=True)
    )
    return _rival(model, optimizer, problem, run, lambda o: o.param_groups[0]["d"])


def mechanic(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """Mechanic (Cutkosky, Defazio and Mehta 2023) around the base optimizer at η₀.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: base, η₀, λ₀ and the schedule.

    Returns:
        What the loop trains.
    """
    mechanize, (lr, decay) = package("mechanic_pytorch").mechanize, start_of(run)
    optimizer = (
        mechanize(torch.optim.SGD)(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=decay)
        if run.base == "sgd"
        else mechanize(torch.optim.AdamW)(model.parameters(), lr=lr, weight_decay=decay)
    )
    return _rival(model, optimizer, problem, run, lambda o: lr * _scale(o))


def _scale(optimizer: torch.optim.Optimizer) -> float:
    """Mechanic's s, the sum over its learners."""
    state: Any = optimizer.state.get("_mechanic")  # type: ignore[call-overload]
    return 0.0 if state is None else float(state["s"].sum())


class ScheduleFree(Rival):
    """Evaluated at the average x, trained at y; BatchNorm's statistics are taken anew at x."""

    def step(self, batch: Examples) -> None:
        """One training step at y."""
        self.optimizer.train()  # type: ignore[attr-defined]
        super().step(batch)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model at x."""
        self.optimizer.eval()  # type: ignore[attr-defined]
        if any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules()):
            self._take_statistics()
        yield self.model

    @torch.no_grad()
    def _take_statistics(self) -> None:
        for batch in itertools.islice(self.problem.loader(), BATCHES_FOR_STATISTICS):
            self.model(batch.x)


def schedule_free(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """Schedule-free SGD or AdamW (Defazio et al. 2024) at the fixed η₀.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: base, η₀ and λ₀.

    Returns:
        What the loop trains.
    """
    module, (lr, decay) = package("schedulefree"), start_of(run)
    kind = module.SGDScheduleFree if run.base == "sgd" else module.AdamWScheduleFree
    optimizer = kind(model.parameters(), lr=lr, weight_decay=decay)
    optimizer.train()
    return ScheduleFree(model, optimizer, problem, run.schedule)


class Averaged(Rival):
    """DoG with its polynomial average of the weights, which is what is evaluated."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem, schedule: str
    ) -> None:
        super().__init__(model, optimizer, problem, schedule)
        self.average = package("dog").PolynomialDecayAverager(model)

    def step(self, batch: Examples) -> None:
        """One training step, and one of the average."""
        super().step(batch)
        self.average.step()

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The average."""
        yield self.average.averaged_model


def dog(model: nn.Module, problem: Problem, run: Run) -> Trainee:
    """DoG or L-DoG (Ivgi, Hinder and Carmon 2023), which know no learning rate.

    Args:
        model: with its initial weights.
        problem: task and seed.
        run: the method's name, "dog" or "l-dog", and λ₀.

    Returns:
        What the loop trains.
    """
    module = package("dog")
    kind = module.DoG if run.method == "dog" else module.LDoG
    has_norm = any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    given = {"reps_rel": START_WITH_BATCH_NORM} if has_norm else {}
    optimizer = kind(model.parameters(), weight_decay=run.weight_decay, **given)
    trainee = Averaged(model, optimizer, problem, run.schedule)
    trainee.rate = _mean_eta
    return trainee


def _mean_eta(optimizer: torch.optim.Optimizer) -> float:
    etas = optimizer.param_groups[0].get("eta", [0.0])
    return sum(float(eta) for eta in etas) / len(etas)


def _rival(
    model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem, run: Run, rate: Rates
) -> Trainee:
    trainee = Rival(model, optimizer, problem, run.schedule)
    trainee.rate = rate
    return trainee


def _silently(kind: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Two of the packages print when they are built."""
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(*args, **settings)
