"""One λ per input: implicit differentiation at convergence, and which inputs it switches off.

min_λ E(w(λ)), w(λ) = argmin_w h(w, λ), λ = exp ρ with one entry per input of a linear model; E is
the loss on held-out rows, of one split or of k folds. scikit-learn's searches have the same rows.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

import hypertorch
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.inputs_figure import inputs_figure
from experiments.studies.inputs_problems import (
    LOADERS,
    Problem,
    Split,
    Table,
    error_and_slope,
    fitted,
    folds,
    freedom,
    hold_out,
    table,
)
from experiments.studies.inputs_rivals import BOUNDS, lasso, one_for_all, relevance
from experiments.studies.inputs_truncated import truncated
from experiments.studies.schema import InputsConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread
from hypertorch.bilevel import Iteration, exact

Row = dict[str, Any]
OFF = 0.1  # an input is switched off where its w_i has less freedom than this
REFERENCE = "one λ, folds"  # what every method is compared with


def learn(problem: Problem, settings: InputsConfig) -> list[Iteration]:
    """HOAG with both of its problems solved to convergence: the accepted iterations.

    Each step that is taken back halves the tolerance, in the end to below what rounding allows the
    inner solver, which is no reason to warn here: every slope is compared with its closed form.
    """
    hoag = hypertorch.HOAG(
        problem.inner_loss,
        problem.outer_loss,
        problem.parameters(),
        problem.decays,
        tolerance=exact(settings.tolerance),
        inner_solver=problem.newton,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inner solver ended", hypertorch.HypertorchWarning)
        return [iteration for iteration in hoag.minimize(settings.steps) if iteration.accepted]


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Learn, search and compare on every table and split.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, InputsConfig)
    rows: list[Row] = []
    jobs = list(itertools.product(LOADERS, settings.seeds))
    for name, seed in tqdm(jobs, desc="one λ per input", disable=not progress):
        found = _study_one(table(name, seed, settings.artificial), settings)
        is_drawn = seed == settings.seeds[0]
        found = [row for row in found if is_drawn or row["what"] != "decay"]  # as many as all else
        rows += [{"table": name, "seed": seed, **row} for row in found]
    save_numbers(folder, rows)
    inputs_figure(rows, folder.figure_file)
    findings = {name: _findings(rows_of(rows, table=name)) for name in LOADERS}
    return {**findings, "says": [_sentence(name, found) for name, found in findings.items()]}


def _study_one(data: Table, settings: InputsConfig) -> list[Row]:
    """Every method on one table and split."""
    none = np.full(len(data.inputs), BOUNDS[0])
    started = time.perf_counter()
    rows = _judged("no penalty", data, fitted(data, none), none, started)
    if not data.is_classification:
        started = time.perf_counter()
        rows += _judged("ARD", data, *relevance(data), started)
    count = len(data.fit.y)
    criteria = {"hold-out": hold_out(count), "folds": folds(count, settings.folds)}
    for criterion, splits in criteria.items():
        started = time.perf_counter()
        weights = lasso(data, splits, settings.points)
        rows += _judged(f"lasso, {criterion}", data, weights, None, started)
        started = time.perf_counter()
        common = one_for_all(data, splits, settings.points)
        values = np.full(len(data.inputs), common)
        rows += _judged(f"one λ, {criterion}", data, fitted(data, values), values, started)
        for kind, lowest in (("λ per input", BOUNDS[0]), ("only raised", common)):
            started = time.perf_counter()
            problem = Problem(data, splits, common, (lowest, BOUNDS[1]))
            path = learn(problem, settings)
            values = problem.decays().detach().numpy().copy()
            method = f"{kind}, {criterion}"
            rows += _judged(method, data, fitted(data, values), values, started)
            rows += [{"method": method, **row} for row in _path(data, splits, path)]
    return rows + truncated(data, settings.truncations, settings.truncated_at)


def _judged(
    method: str, data: Table, weights: np.ndarray, values: np.ndarray | None, started: float
) -> list[Row]:
    """A row for a method, and one for what it makes of each input."""
    seconds = time.perf_counter() - started
    gamma = (weights[:-1] != 0).astype(float) if values is None else freedom(data, values)
    own = {"what": "method", "method": method, "seconds": seconds, **data.score(weights)}
    return [own] + [
        {
            "what": "input",
            "method": method,
            "input": name,
            "artificial": int(i >= len(gamma) - data.artificial),
            "weight": weights[i],
            "freedom": gamma[i],
            "off": int(gamma[i] < OFF),
        }
        for i, name in enumerate(data.inputs)
    ]


def _path(data: Table, splits: list[Split], path: Sequence[Iteration]) -> list[Row]:
    """At each λ of a path: λ itself, E, the test loss, and how wrong E and dE/dρ are.

    Also how many inputs are off, and how many of these have dE/dλ_i < 0: their λ would grow on.
    """
    rows: list[Row] = []
    for k, here in enumerate(path):
        values = here.hyperparameters["decays"].numpy()
        error, slope = error_and_slope(data, splits, values)
        is_off = freedom(data, values) < OFF
        wrong = values * (here.hypergradient["decays"].numpy() - slope)
        rows.append(
            {
                "what": "path",
                "step": k,
                "error": here.outer_loss,
                "error_of_error": abs(here.outer_loss / error - 1),
                "error_of_slope": np.linalg.norm(wrong) / np.linalg.norm(values * slope),
                "off": int(is_off.sum()),
                "off_and_growing": int((is_off & (slope < 0)).sum()),
                **data.score(fitted(data, values)),
            }
        )
        rows += [
            {"what": "decay", "step": k, "input": name, "value": value}
            for name, value in zip(data.inputs, values, strict=True)
        ]
    return rows


def _findings(rows: Sequence[Row]) -> dict[str, Any]:
    methods = list(dict.fromkeys(row["method"] for row in rows_of(rows, "method")))
    paths = rows_of(rows, "path")
    learned = list(dict.fromkeys(row["method"] for row in paths))
    reference = [row["test_loss"] for row in rows_of(rows, "method", method=REFERENCE)]
    cuts = rows_of(rows, "truncated")
    return {
        "methods": {name: _method(rows, name, reference) for name in methods},
        "paths": {name: _ends(rows_of(rows, "path", method=name)) for name in learned},
        "largest_error_of_slope": max(row["error_of_slope"] for row in paths),
        "largest_error_of_error": max(row["error_of_error"] for row in paths),
        "truncated": {
            engine: {
                str(steps): {
                    "median_error": float(np.median([row["error"] for row in own])),
                    "wrong_signs": spread([float(row["wrong_signs"]) for row in own]),
                }
                for steps in dict.fromkeys(row["steps"] for row in cuts)
                for own in [rows_of(cuts, "truncated", engine=engine, steps=steps)]
            }
            for engine in dict.fromkeys(row["engine"] for row in cuts)
        },
    }


def _method(rows: Sequence[Row], name: str, reference: Sequence[float]) -> dict[str, Any]:
    """Its scores on test rows, and its inputs that are off: real ones, artificial ones."""
    own, inputs = rows_of(rows, "method", method=name), rows_of(rows, "input", method=name)
    losses = [row["test_loss"] for row in own]
    found = {
        "test_loss": spread(losses),
        "more_than_one_λ": spread([a - b for a, b in zip(losses, reference, strict=True)]),
        "seconds": spread([row["seconds"] for row in own]),
        "agreement": _agreement([row for row in inputs if not row["artificial"]]),
    }
    if "test_accuracy" in own[0]:
        found["test_accuracy"] = spread([row["test_accuracy"] for row in own])
    for kind, artificial in (("real", 0), ("artificial", 1)):
        found[f"{kind}_off"] = spread(
            [
                float(sum(r["off"] for r in inputs if (r["seed"], r["artificial"]) == key))
                for key in [(row["seed"], artificial) for row in own]
            ]
        )
    names = dict.fromkeys(row["input"] for row in inputs if not row["artificial"])
    shares = {n: float(np.mean([r["off"] for r in rows_of(inputs, input=n)])) for n in names}
    found["off_in_every_split"] = [n for n, share in shares.items() if share == 1]
    found["on_in_every_split"] = [n for n, share in shares.items() if share == 0]
    return found


def _agreement(inputs: Sequence[Row]) -> float:
    """How often two splits agree on whether an input is off, over all inputs and pairs."""
    same = [
        a["off"] == b["off"]
        for name in dict.fromkeys(row["input"] for row in inputs)
        for a, b in itertools.combinations(rows_of(inputs, input=name), 2)
    ]
    return float(np.mean(same)) if same else 1.0


def _ends(path: Sequence[Row]) -> dict[str, Any]:
    """E and test loss where the paths begin and end, and the least test loss on the way."""
    paths = [rows_of(path, seed=s) for s in dict.fromkeys(r["seed"] for r in path)]
    found = {
        f"{name}_{place}": spread([rows[k][name] for rows in paths])
        for name in ("error", "test_loss")
        for place, k in (("first", 0), ("last", -1))
    }
    least = [min(row["test_loss"] for row in rows) for rows in paths]
    return {
        **found,
        "test_loss_least": spread(least),
        "steps": [len(rows) for rows in paths],
        "off": sum(rows[-1]["off"] for rows in paths),
        "off_and_growing": sum(rows[-1]["off_and_growing"] for rows in paths),
    }


def _sentence(name: str, found: dict[str, Any]) -> str:
    parts = []
    for kind in ("λ per input, folds", "only raised, folds"):
        own = found["methods"][kind]
        more, off, artificial = (
            own[key] for key in ("more_than_one_λ", "real_off", "artificial_off")
        )
        parts.append(
            f"{kind}: test loss {more['mean']:+.3f} ± {more['std']:.3f} next to one λ, off are "
            f"{off['mean']:.1f} real and {artificial['mean']:.1f} artificial inputs"
        )
    return f"{name}: {'; '.join(parts)}."
