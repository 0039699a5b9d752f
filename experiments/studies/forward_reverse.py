"""Forward and reverse hypergradients of gradient descent with momentum: one number, two prices.

    v_t = μ v_{t-1} + ∇L(w_{t-1}),  w_t = w_{t-1} − η v_t,  t = 1 … T;   dE(w_T)/d(η, μ)

Each is compared with the stored graph's and with central differences, timed, and its memory counted
as `experiments.overhead` does, against T and against m, how many numbers are learned.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypertorch
from experiments.optimizers import build
from experiments.overhead_engines import peak_bytes
from experiments.overhead_setups import repeated, timings
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.forward_reverse_figure import forward_reverse_figure
from experiments.studies.schema import ForwardReverseConfig
from experiments.studies.study import check_at_most, rows_of, save_numbers, settings_of, spread
from experiments.tasks import Task

Row = dict[str, Any]
REFERENCE = "Unroll"
ENGINES: dict[str, hypertorch.Engine] = {
    REFERENCE: hypertorch.Unroll(),
    "Replay": hypertorch.Replay(),
    "Replay √T": hypertorch.Replay(spacing=None),
    "Forward": hypertorch.Forward(),
}
UNITS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "ReLU": nn.ReLU}
CPU = torch.device("cpu")


class Descent:
    """Gradient descent with momentum on all training images at once, in float64.

    Args:
        config: of the run.
        settings: of the study.
        seed: of the split and the weights.
        learn: what E is differentiated in: settings and how many there are of each, or a number of
            groups of training images, each with one weight in the loss.
        units: of the hidden layer.
    """

    def __init__(
        self,
        config: Config,
        settings: ForwardReverseConfig,
        seed: int,
        learn: Mapping[str, str] | int,
        units: str = "tanh",
    ) -> None:
        task: Task = build(OmegaConf.merge(config.task, {"split_seed": seed}))
        self.train, self.validation = (
            part._replace(x=part.x.double()) for part in (task.train, task.validation)
        )
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(task.image_shape), settings.hidden),
            UNITS[units](),
            nn.Linear(settings.hidden, task.classes),
        ).double()
        self.bare = torch.optim.SGD(
            self.model.parameters(), lr=settings.rate, momentum=settings.momentum
        )
        self.weights: hypertorch.Hyperparameter | None = None
        if isinstance(learn, int):
            ones = torch.ones(learn, dtype=torch.float64)
            self.weights = hypertorch.Hyperparameter(ones, hypertorch.positive, name="weights")
            self.groups = torch.arange(len(self.train.y)) % learn
        learned: Any = learn if self.weights is None else (self.weights,)
        self.optimizer = hypertorch.HyperOptimizer(self.bare, self.model, outer=None, learn=learned)

    def inner_loss(self) -> Tensor:
        """L."""
        losses = cross_entropy(self.model(self.train.x), self.train.y, reduction="none")
        if self.weights is not None:
            losses = losses * self.weights()[self.groups]
        return losses.mean()

    def outer_loss(self) -> Tensor:
        """E."""
        return cross_entropy(self.model(self.validation.x), self.validation.y)

    def hypergradient(self, engine: hypertorch.Engine, steps: int) -> Tensor:
        """dE/dλ of so many steps from the start, as one vector."""
        found = hypertorch.hypergradient(
            self.optimizer, [self.inner_loss] * steps, self.outer_loss, engine
        )
        return torch.cat([part.flatten() for part in found.values()])

    def plain_step(self) -> None:
        """One step without the library; the weights go on."""
        loss = self.inner_loss()
        self.bare.zero_grad()
        loss.backward()
        self.bare.step()

    def state_bytes(self) -> int:
        """Weights and velocities."""
        return 2 * sum(p.numel() * p.element_size() for p in self.model.parameters())


def disagreements(descent: Descent, steps: int) -> dict[str, float]:
    """How far each engine, and central differences, are from the reference: ‖Δ‖ / ‖dE/dλ‖."""
    others = {name: how for name, how in ENGINES.items() if name != REFERENCE}
    others["central differences"] = hypertorch.FiniteDifferences()
    exact = descent.hypergradient(ENGINES[REFERENCE], steps)
    return {
        name: ((descent.hypergradient(how, steps) - exact).norm() / exact.norm()).item()
        for name, how in others.items()
    }


def costs(descent: Descent, steps: int, rounds: int, limit: int, count: int) -> Iterator[Row]:
    """Time and memory of each engine, in plain steps and in states.

    Args:
        descent: what is differentiated.
        steps: T.
        rounds: how often each is timed, in turns.
        limit: the most numbers Forward is asked for.
        count: how many there are.
    """
    actions: dict[str, Any] = {
        name: functools.partial(descent.hypergradient, how, steps)
        for name, how in ENGINES.items()
        if name != "Forward" or count <= limit
    }
    memory = {name: peak_bytes(action, CPU) for name, action in actions.items()}  # and warms up
    times = timings({"plain": repeated(descent.plain_step, steps), **actions}, rounds, CPU)
    for name, milliseconds in times.items():
        if name == "plain":
            continue
        pairs = zip(milliseconds, times["plain"], strict=True)
        yield {
            "engine": name,
            "milliseconds": statistics.median(milliseconds),
            "ratio": statistics.median(ours / plain for ours, plain in pairs),
            "states": memory[name] / descent.state_bytes(),
        }


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Compare, time and count against T, with λ = (η, μ), then against m.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, ForwardReverseConfig)
    check_at_most("horizons", min(settings.horizons), "compare_up_to", settings.compare_up_to)
    rows = list(tqdm(_measured(config, settings), desc="forward and reverse", disable=not progress))
    save_numbers(folder, rows)
    forward_reverse_figure(rows, folder.figure_file)
    return _findings(rows)


def _measured(config: Config, settings: ForwardReverseConfig) -> Iterator[Row]:
    two = {"lr": "shared", "momentum": "shared"}
    for steps in settings.horizons:
        for seed, units in itertools.product(settings.seeds, UNITS):
            if steps <= settings.compare_up_to:
                found = disagreements(Descent(config, settings, seed, two, units), steps)
                own = {"what": "agreement", "seed": seed, "steps": steps, "units": units}
                yield from ({**own, "engine": n, "error": error} for n, error in found.items())
        descent = Descent(config, settings, settings.seeds[0], two)
        for row in costs(descent, steps, settings.rounds, settings.limit, 2):
            yield {"what": "horizon", "steps": steps, "count": 2, **row}
    for count in settings.counts:
        descent = Descent(config, settings, settings.seeds[0], count)
        for row in costs(descent, settings.count_steps, settings.rounds, settings.limit, count):
            yield {"what": "count", "steps": settings.count_steps, "count": count, **row}


def _findings(rows: Sequence[Row]) -> dict[str, Any]:
    compared = rows_of(rows, "agreement")
    cases = dict.fromkeys((row["units"], row["engine"]) for row in compared)
    agreement: dict[str, Any] = {}
    for units, engine in cases:
        own = [r["error"] for r in rows_of(compared, units=units, engine=engine)]
        agreement.setdefault(units, {})[engine] = {**spread(own), "largest": max(own)}
    found: dict[str, Any] = {"agreement": agreement, "costs": {}}
    for what, axis in (("horizon", "steps"), ("count", "count")):
        for row in rows_of(rows, what):
            by_engine = found["costs"].setdefault(f"{axis} {row[axis]}", {})
            by_engine[row["engine"]] = {k: row[k] for k in ("milliseconds", "ratio", "states")}
    return {**found, "says": _sentences(found)}


def _sentences(found: dict[str, Any]) -> list[str]:
    sentences = [
        f"{units} units: forward mode equals the stored graph's reverse mode within "
        f"{by_engine['Forward']['largest']:.1g}, replayed reverse mode within "
        f"{by_engine['Replay']['largest']:.1g}, central differences within "
        f"{by_engine['central differences']['largest']:.1g}."
        for units, by_engine in found["agreement"].items()
    ]
    for point, by_engine in found["costs"].items():
        prices = (f"{n} {e['ratio']:.1f} and {e['states']:.0f}" for n, e in by_engine.items())
        sentences.append(f"{point} (times plain training, states): {', '.join(prices)}.")
    return sentences
