"""HOAG on real data: how soon the outer loss is near its least, against search and unrolling.

min_λ E(w(λ), λ), w(λ) = argmin h(w, λ). Every method solves the same inner problem with the same
L-BFGS (unrolling: gradient descent with momentum) and is judged by the exact f(λ) = E(w(λ), λ) of
the λ that it would return if it were stopped.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from tqdm import tqdm

import hypertorch
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.hoag_criterion import FORMULAS, ridge_criterion
from experiments.studies.hoag_figure import hoag_figure
from experiments.studies.hoag_problems import Copy, Problem, Truth, Values, problems
from experiments.studies.schema import HOAGConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread
from hypertorch.bilevel import (
    Costs,
    NestedProblem,
    cubic,
    exact,
    exponential,
    quadratic,
)

SCHEDULES = {
    "HOAG, exact": exact(1e-8),
    "HOAG, exponential": exponential(),
    "HOAG, quadratic": quadratic(),
    "HOAG, cubic": cubic(),
}


@dataclass(frozen=True)
class Visit:
    """What a method would return if it were stopped, and what it has spent by then.

    Attributes:
        seconds: of the processor, on the method's own work.
        gradients: of h and E, a Hessian product counted as two.
        values: λ.
    """

    seconds: float
    gradients: int
    values: Values


def _gradients(costs: Costs) -> int:
    return costs.inner_gradients + costs.outer_gradients + 2 * costs.hessian_products


def hoag(
    problem: Problem, start: Values, schedule: Callable[[int], float], settings: HOAGConfig
) -> list[Visit]:
    """HOAG from `start`: the last λ it accepted."""
    started = time.process_time()
    copy = Copy(problem, start)
    visits: list[Visit] = []

    def watch(iteration: hypertorch.bilevel.Iteration) -> bool:
        seconds = time.process_time() - started
        visits.append(Visit(seconds, _gradients(iteration.costs), copy.values))
        return seconds > settings.limit

    hypertorch.HOAG(**copy.arguments, tolerance=schedule).minimize(settings.steps, watch)
    return visits


Proposals = Generator[Values, float, None]


def grid(problem: Problem, settings: HOAGConfig) -> Proposals:
    """Points equally spaced in the logarithms, from the largest λ down."""
    count = round(settings.evaluations ** (1 / len(problem.box)))
    axes = [np.geomspace(high, low, count) for low, high in problem.box.values()]
    for point in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)):
        yield dict(zip(problem.box, map(float, point), strict=True))


def at_random(problem: Problem, settings: HOAGConfig, seed: int) -> Proposals:
    """Points uniform in the logarithms."""
    generator = np.random.default_rng([seed, 1])
    for _ in range(settings.evaluations):
        yield problem.somewhere(generator)


def tpe(problem: Problem, settings: HOAGConfig, seed: int) -> Proposals:
    """Points of optuna's tree-structured Parzen estimator."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(settings.evaluations):
        trial = study.ask()
        score = yield {
            name: trial.suggest_float(name, low, high, log=True)
            for name, (low, high) in problem.box.items()
        }
        study.tell(trial, score)


def search(problem: Problem, proposals: Proposals, settings: HOAGConfig) -> list[Visit]:
    """Evaluate E(w(λ), λ) where proposed, w from the last one: the λ with the least so far."""
    started = time.process_time()
    values = next(proposals)
    copy = Copy(problem, values)
    nested = NestedProblem(**copy.arguments)
    visits: list[Visit] = []
    best, least = values, math.inf
    while time.process_time() - started < settings.limit:
        copy.set(values)
        score = nested.value(settings.search_tolerance)
        if score < least:
            best, least = values, score
        visits.append(Visit(time.process_time() - started, _gradients(nested.costs), best))
        try:
            values = proposals.send(score)
        except StopIteration:
            break
    return visits


def unrolled(problem: Problem, start: Values, settings: HOAGConfig) -> list[Visit]:
    """Reverse mode through K steps of gradient descent with momentum, then K more: its λ."""
    started = time.process_time()
    copy = Copy(problem, start)
    learned = list(copy.hyperparameters.values())
    optimizer = hypertorch.HyperOptimizer(
        torch.optim.SGD(copy.model.parameters(), lr=1.0, momentum=0.9),
        copy.model,
        copy.outer_loss,
        learn=learned,
        window=settings.window,
        update_every=settings.window,
        outer=functools.partial(torch.optim.Rprop, lr=1.0, etas=(0.5, 1.2), step_sizes=(1e-6, 1.0)),
    )
    visits: list[Visit] = []
    for update in range(1, settings.steps + 1):
        optimizer.param_groups[0]["lr"] = 1 / (problem.curvature + copy.values["decay"])
        for _ in range(settings.window):
            optimizer.step(copy.inner_loss())
        seconds, gradients = time.process_time() - started, update * (3 * settings.window + 1)
        visits.append(Visit(seconds, gradients, copy.values))
        if seconds > settings.limit:
            break
    optimizer.close()
    return visits


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Run every method on every problem and seed.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, HOAGConfig)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    criteria = []
    with tqdm(desc="HOAG", total=4 * len(settings.seeds), disable=not progress) as bar:
        for seed in settings.seeds:
            criteria.append({name: ridge_criterion(name, seed) for name in FORMULAS})
            for name, problem in _problems(seed, settings).items():
                if isinstance(problem, Problem):
                    rows += _race({"problem": name, "seed": seed}, problem, settings)
                else:
                    missing[name] = str(problem)
                bar.update()
    save_numbers(folder, rows)
    hoag_figure(rows, folder.figure_file, settings.target)
    reached = _reached(rows, settings.target)
    findings = {
        "target": settings.target,
        "reached": reached,
        "first": _first(reached),
        "missing": missing,
        "criteria": {
            name: {key: spread([each[name][key] for each in criteria]) for key in first}
            for name, first in criteria[0].items()
        },
    }
    return {**findings, "says": _sentences(findings)}


def _problems(seed: int, settings: HOAGConfig) -> dict[str, Problem | FileNotFoundError]:
    return problems(seed, settings.images, settings.root, settings.archives)


def _race(own: dict[str, Any], problem: Problem, settings: HOAGConfig) -> list[dict[str, Any]]:
    """Every method on one problem: a row for each of its visits."""
    seed = own["seed"]
    start = problem.somewhere(np.random.default_rng(seed))
    runs = {name: hoag(problem, start, schedule, settings) for name, schedule in SCHEDULES.items()}
    proposals = {
        "grid": grid(problem, settings),
        "random": at_random(problem, settings, seed),
        "TPE": tpe(problem, settings, seed),
    }
    runs |= {name: search(problem, points, settings) for name, points in proposals.items()}
    runs["unrolled"] = unrolled(problem, start, settings)
    truth = Truth(problem)
    truth.all_of([visit.values for visits in runs.values() for visit in visits])
    least = truth.least(settings.points)
    return [
        own
        | {"method": name, "visit": k, "seconds": visit.seconds, "gradients": visit.gradients}
        | {**visit.values, "f": truth(visit.values)}
        | {"suboptimality": truth(visit.values) / least - 1}
        for name, visits in runs.items()
        for k, visit in enumerate(visits)
    ]


def _reached(rows: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """By problem, method and unit: when each seed's sub-optimality was at most `target` for good.

    None where it never was.
    """
    found: dict[str, Any] = {}
    for problem in dict.fromkeys(row["problem"] for row in rows):
        of_problem = rows_of(rows, problem=problem)
        for method in dict.fromkeys(row["method"] for row in of_problem):
            mine = rows_of(of_problem, method=method)
            runs = [rows_of(mine, seed=seed) for seed in dict.fromkeys(row["seed"] for row in mine)]
            arrivals = [_arrival(run, target) for run in runs]
            found.setdefault(problem, {})[method] = {
                unit: [None if row is None else row[unit] for row in arrivals]
                for unit in ("seconds", "gradients")
            } | {"final_suboptimality": spread([run[-1]["suboptimality"] for run in runs])}
    return found


def _arrival(run: Sequence[dict[str, Any]], target: float) -> dict[str, Any] | None:
    above = [k for k, row in enumerate(run) if row["suboptimality"] > target]
    first = above[-1] + 1 if above else 0
    return run[first] if first < len(run) else None


def _first(reached: dict[str, Any]) -> dict[str, Any]:
    """By problem and unit: the method that is first in the median over the seeds, and by seed."""
    found: dict[str, Any] = {}
    for problem, methods in reached.items():
        for unit in ("seconds", "gradients"):
            arrivals = {name: method[unit] for name, method in methods.items()}
            medians = {name: _median(values) for name, values in arrivals.items()}
            by_seed = [
                _least(dict(zip(arrivals, values, strict=True)))
                for values in zip(*arrivals.values(), strict=True)
            ]
            name = _least({n: m if math.isfinite(m) else None for n, m in medians.items()})
            best = {"method": name, "median": None if name is None else medians[name]}
            found.setdefault(problem, {})[unit] = best | {"by_seed": by_seed}
    return found


def _least(values: dict[str, float | None]) -> str | None:
    """The name of the least number, or None if there is none."""
    numbers = {name: value for name, value in values.items() if value is not None}
    return min(numbers, key=lambda name: numbers[name]) if numbers else None


def _median(values: Sequence[float | None]) -> float:
    return statistics.median(math.inf if value is None else value for value in values)


def _sentences(findings: dict[str, Any]) -> list[str]:
    lines = []
    for problem, units in findings["first"].items():
        if units["seconds"]["method"] is None:
            lines.append(f"{problem}: no method got to {findings['target']:g} of the least.")
            continue
        winners = [
            f"{units[unit]['method']} after {units[unit]['median']:.3g} {unit}"
            for unit in ("seconds", "gradients")
        ]
        lines.append(
            f"{problem}: first at {findings['target']:g} were {' and '.join(winners)} (median); "
            f"by seed {', '.join(map(str, units['seconds']['by_seed']))}."
        )
    lines += [f"{problem} left out: {why}" for problem, why in findings["missing"].items()]
    for name, found in findings["criteria"].items():
        lines.append(
            f"Ridge by {name}: HOAG's λ is off by at most {max(found['error']['values']):.1e} of "
            f"the closed form's; dE/d log λ there is {found['slope']['mean']:.1g}, and without "
            f"∂E/∂λ it would be {found['slope_without_direct_term']['mean']:.2g}."
        )
    return lines
