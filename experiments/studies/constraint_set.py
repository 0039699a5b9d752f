"""Keeping (η, μ) in a box Λ: by projection, ρ = λ and ρ ← P(ρ − s dE/dρ), or by transform.

By transform λ = a + (b − a) σ(ρ), with ρ free. E is the validation loss after T steps of gradient
descent with momentum; in one box its least value lies inside, in the other on the boundary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypertorch
from experiments.evaluation import or_infinite
from experiments.optimizers import build
from experiments.run_folder import RunFolder
from experiments.scheduled_sgd import ScheduledSGD
from experiments.schema import Config
from experiments.studies.constraint_set_figure import constraint_set_figure
from experiments.studies.schema import ConstraintSetConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread
from experiments.studies.whole_trainings import Visit, visit
from experiments.tasks import Task

Row = dict[str, Any]
Interval = tuple[float, float]
HOWS = ("projection", "projection in units of the box", "transform")
FIRST_STEP = {HOWS[0]: 0.1, HOWS[1]: 0.1, HOWS[2]: 1.0}  # per number, in the units of ρ
STARTS = {"inside": (0.1, 0.1), "on the boundary": (0.1, 0.0)}  # as fractions of the box
NAMES = ("eta", "mu")


@dataclass(frozen=True)
class Box:
    """Λ: where its best point lies, and the intervals of η and μ."""

    name: str
    eta: Interval
    mu: Interval

    def at(self, fractions: Sequence[float]) -> list[float]:
        """The point at these fractions of the two intervals."""
        pairs = zip(fractions, (self.eta, self.mu), strict=True)
        return [low + f * (high - low) for f, (low, high) in pairs]


BOXES = (
    Box("inside", (1e-3, 2.0), (0.0, 0.99)),
    Box("on the boundary", (1e-3, 0.05), (0.0, 0.6)),
)


class Laboratory:
    """One seed's data and network, and E(η, μ), in float64.

    Args:
        config: of the run.
        settings: of the study.
        seed: of the split and the weights.
    """

    def __init__(self, config: Config, settings: ConstraintSetConfig, seed: int) -> None:
        self.settings, self.seed = settings, seed
        task: Task = build(OmegaConf.merge(config.task, {"split_seed": seed}))
        self.train, self.validation = (
            part._replace(x=part.x.double().flatten(1)) for part in (task.train, task.validation)
        )
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(self.train.x.shape[1], settings.hidden),
            nn.Tanh(),
            nn.Linear(settings.hidden, task.classes),
        ).double()
        self._start = [p.detach().clone() for p in self.model.parameters()]

    def inner_loss(self) -> Tensor:
        """L, on all training images."""
        return cross_entropy(self.model(self.train.x), self.train.y)

    def outer_loss(self) -> Tensor:
        """E."""
        return cross_entropy(self.model(self.validation.x), self.validation.y)

    def plain(self, eta: float, mu: float) -> float:
        """E after T steps of torch's own SGD."""
        self._rewind()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=eta, momentum=mu)
        for _ in range(self.settings.steps):
            optimizer.zero_grad()
            self.inner_loss().backward()
            optimizer.step()
        with torch.no_grad():
            return self.outer_loss().item()

    def _rewind(self) -> None:
        with torch.no_grad():
            for param, start in zip(self.model.parameters(), self._start, strict=True):
                param.copy_(start)

    def surface(self, box: Box) -> list[Row]:
        """E on a grid over the box."""
        etas, mus = (np.linspace(*ends, self.settings.points) for ends in (box.eta, box.mu))
        return [
            {"what": "surface", "box": box.name, "eta": eta, "mu": mu, "E": self.plain(eta, mu)}
            for eta in etas.tolist()
            for mu in mus.tolist()
        ]

    def least(self, box: Box, surface: Sequence[Row]) -> Row:
        """The least E in the box: Nelder and Mead's search by scipy, from the best of the grid."""
        best = min(surface, key=lambda row: or_infinite(row["E"]))
        found = minimize(
            lambda point: self.plain(*point),
            [best[name] for name in NAMES],
            method="Nelder-Mead",
            bounds=[box.eta, box.mu],
            options={"xatol": 1e-5, "fatol": 1e-10, "maxfev": self.settings.polish},
        )
        point = dict(zip(NAMES, found.x.tolist(), strict=True))
        return {"what": "least", "box": box.name, **point, "E": float(found.fun)}

    def descend(self, box: Box, how: str, start: str) -> Iterator[Row]:
        """Follow dE/dρ of whole trainings by the library's `Descent` rule; a row per training."""
        self._rewind()
        optimizer = self._optimizer(box, how, start)
        own = {"what": "visit", "box": box.name, "how": how, "start": start}
        losses = [self.inner_loss] * self.settings.steps
        widths = [high - low for low, high in (box.eta, box.mu)]
        descent = _Descent(optimizer, FIRST_STEP[how], widths if "units" in how else [1.0, 1.0])
        for training in range(1, self.settings.updates + 1):
            at = visit(optimizer, losses, self.outer_loss)
            values = {name: at.values[name].item() for name in NAMES}
            yield {**own, "training": training, **values, "E": at.outer_loss}
            if descent.move(at) == 0:
                break

    def _optimizer(self, box: Box, how: str, start: str) -> hypertorch.HyperOptimizer:
        held: list[hypertorch.Hyperparameter] = []
        for name, value in zip(NAMES, box.at(STARTS[start]), strict=True):
            ends = getattr(box, name)
            double = torch.tensor(value, dtype=torch.float64)
            with warnings.catch_warnings():  # on the boundary there is no ρ, and λ starts inside
                warnings.simplefilter("ignore", hypertorch.HypertorchWarning)
                held.append(
                    hypertorch.Hyperparameter(double, name=name, bounds=ends)
                    if how.startswith("projection")
                    else hypertorch.Hyperparameter(double, hypertorch.interval(*ends), name=name)
                )
        bare = ScheduledSGD(self.model.parameters(), held[0], held[1])
        return hypertorch.HyperOptimizer(bare, self.model, outer=None, learn=held)


class _Descent:
    """ρ ← P(ρ − p/L), taken back with L ← 2 L where E is not lower: `hypertorch.bilevel.Descent`.

    Args:
        optimizer: what is learned.
        first_step: the length of the first step, per number of ρ.
        units: of each ρ, in which steps are made and measured.
    """

    def __init__(
        self, optimizer: hypertorch.HyperOptimizer, first_step: float, units: Sequence[float]
    ) -> None:
        self.hyperparameters, self.units = optimizer.hyperparameters, units
        self.rule = hypertorch.bilevel.Descent(first_step)
        self.lipschitz: float | None = None
        self.best: tuple[Visit, list[Tensor], list[Tensor]] | None = None
        self.moved = 0.0

    def move(self, at: Visit) -> float:
        """Judge the step that led here, make the next, and return how far ρ moved from the best."""
        learned = self.hyperparameters
        if self._is_accepted(at):
            raws = [h.raw.detach().clone() for h in learned.values()]
            slope = [
                unit * h.pull_back(at.hypergradients[name])
                for unit, (name, h) in zip(self.units, learned.items(), strict=True)
            ]
            steepness = math.sqrt(sum(p.item() ** 2 for p in slope) / len(slope))
            self.lipschitz = self.rule.lipschitz(self.lipschitz, steepness) or 1.0
            self.best = at, raws, slope
        assert self.best is not None and self.lipschitz is not None
        distance = 0.0
        for unit, h, raw, p in zip(self.units, learned.values(), *self.best[1:], strict=True):
            h.put(raw - unit * p / self.lipschitz)
            distance += ((h.raw.detach() - raw).item() / unit) ** 2
        self.moved = math.sqrt(distance)
        return self.moved

    def _is_accepted(self, at: Visit) -> bool:
        if self.best is None or self.lipschitz is None:
            return True
        factor = 2.0
        if at.is_finite:
            before = self.best[0].outer_loss
            move = hypertorch.bilevel.Move(
                before, at.outer_loss, 0.0, 0.0, self.moved, self.lipschitz, 0.0
            )
            factor = self.rule.judge(move)
        self.lipschitz *= factor
        return factor <= 1


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Descend in both boxes, in both ways, from two starts.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, ConstraintSetConfig)
    rows: list[Row] = []
    jobs = [(seed, box) for seed in settings.seeds for box in BOXES]
    for seed, box in tqdm(jobs, desc="constraint set", disable=not progress):
        laboratory = Laboratory(config, settings, seed)
        own = laboratory.surface(box)
        own.append(laboratory.least(box, own))
        for how in HOWS:
            for start in STARTS:
                own += laboratory.descend(box, how, start)
        least = min(row["E"] for row in own if math.isfinite(row["E"]))
        rows += [{"seed": seed, **row, "excess": row["E"] - least} for row in own]
    save_numbers(folder, rows)
    constraint_set_figure(rows, folder.figure_file)
    return _findings(rows, settings)


def _findings(rows: Sequence[Row], settings: ConstraintSetConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for box in BOXES:
        own = rows_of(rows, box=box.name)
        least = rows_of(own, "least")
        of_box: dict[str, Any] = {
            "least": {n: spread([r[n] for r in least]) for n in (*NAMES, "E")}
        }
        for how in HOWS:
            for start in STARTS:
                runs = _runs(rows_of(own, how=how, start=start))
                reached = [_trainings_to(run, settings.target) for run in runs]
                of_box[f"{how}, start {start}"] = {
                    "excess": spread([min(row["excess"] for row in run) for run in runs]),
                    "trainings_to_target": reached,
                    "runs_that_reach_it": sum(number > 0 for number in reached),
                }
        found[f"best {box.name}"] = of_box
    return {**found, "target": settings.target, "says": _sentences(found, settings)}


def _runs(rows: Sequence[Row]) -> list[list[Row]]:
    return [rows_of(rows, seed=seed) for seed in dict.fromkeys(r["seed"] for r in rows)]


def _trainings_to(run: Sequence[Row], target: float) -> int:
    """The number of the training that was the first within `target` of the least E; 0: none."""
    return next((row["training"] for row in run if row["excess"] <= target), 0)


def _sentences(found: dict[str, Any], settings: ConstraintSetConfig) -> list[str]:
    def said(run: str, own: dict[str, Any]) -> str:
        reached = own["trainings_to_target"]
        trainings = ", ".join(str(number or "–") for number in reached)
        return (
            f"{run}: {own['runs_that_reach_it']} of {len(reached)} come within "
            f"{settings.target:g}, after {trainings} trainings; excess {own['excess']['mean']:.1g}"
        )

    sentences = []
    for name, of_box in found.items():
        least = of_box["least"]
        runs = "; ".join(said(run, own) for run, own in of_box.items() if run != "least")
        sentences.append(
            f"{name.capitalize()}: least E {least['E']['mean']:.4f} at η = "
            f"{least['eta']['mean']:.3g}, μ = {least['mu']['mean']:.3g}. {runs}."
        )
    return sentences
