"""Ridge and lasso: E(λ), validation error of the fitted regression, and where dE/dλ = 0.

w*(λ) = argmin ‖Xw − y‖²/2n + (λ/2 ‖w‖² or λ‖w‖₁); dE/dλ is the hypergradient of the training that
arrives at w*, and the closed form, the solver of scikit-learn and its cross-validation judge it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Lasso, LassoCV, RidgeCV
from sklearn.model_selection import PredefinedSplit
from torch import nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

import hypertorch
from experiments.proximal_sgd import ProximalSGD
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.ridge_figure import ridge_figure
from experiments.studies.schema import RidgeConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread
from experiments.tables import diabetes
from experiments.tasks import Task


@dataclass(frozen=True)
class Penalty:
    """One of the two: the setting λ of its optimizer, and the range of λ that is drawn."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    setting: str
    lowest: float
    highest: float


RIDGE = Penalty("ridge", torch.optim.SGD, "weight_decay", 1e-2, 10.0)
LASSO = Penalty("lasso", ProximalSGD, "l1", 4e-3, 0.5)  # at 0.55 every weight is zero


@dataclass(frozen=True)
class Visit:
    """One outer update of a run: λ, E there, and the library's dE/dλ."""

    value: float
    error: float
    hypergradient: float


def descend(
    task: Task, penalty: Penalty, start: float, window: int, every: int, settings: RidgeConfig
) -> list[Visit]:
    """Follow the hypergradient from `start`; the weights are warm-started.

    Args:
        task: the data.
        penalty: ridge or lasso.
        start: λ at the beginning.
        window: steps that are differentiated together.
        every: steps from one outer update to the next, of which the window is the first part.
        settings: of the study.

    Returns:
        One entry per outer update.
    """
    (x, y), (held_out_x, held_out_y) = task.train, task.validation
    model = nn.Linear(x.shape[1], 1, bias=False).double()
    nn.init.zeros_(model.weight)
    curvature = torch.linalg.matrix_norm(x, 2).item() ** 2 / len(y)
    kind: Any = penalty.optimizer
    optimizer = hypertorch.HyperOptimizer(
        kind(
            model.parameters(),
            lr=1 / curvature,
            momentum=settings.momentum,
            **{penalty.setting: start},
        ),
        model,
        outer_loss=lambda: mse_loss(model(held_out_x), held_out_y),
        learn=(penalty.setting,),
        window=window,
        update_every=every,
        outer=functools.partial(torch.optim.Rprop, lr=0.6, etas=(0.5, 1.2)),
    )
    visits = []
    for _ in range(settings.updates):
        value = optimizer.hyperparameters[penalty.setting]().item()
        for _ in range(every):
            optimizer.step(0.5 * mse_loss(model(x), y))
        assert optimizer.hypergradients is not None and optimizer.outer_loss_value is not None
        hypergradient = optimizer.hypergradients[penalty.setting].item()
        visits.append(Visit(value, optimizer.outer_loss_value.item(), hypergradient))
    return visits


def solve(task: Task, penalty: Penalty, value: float) -> tuple[np.ndarray, np.ndarray]:
    """w*(λ) and dw*/dλ without our code: the normal equations, or scikit-learn's `Lasso`.

    On the active set A of the lasso, dw*_A/dλ = −H_AA⁻¹ sign(w*_A), with H = XᵀX/n; of ridge,
    dw*/dλ = −(H + λ)⁻¹ w*.
    """
    x, y = (tensor.numpy() for tensor in task.train)
    hessian = x.T @ x / len(y)
    if penalty is RIDGE:
        hessian += value * np.eye(len(hessian))
        weights = np.linalg.solve(hessian, x.T @ y[:, 0] / len(y))
        return weights, -np.linalg.solve(hessian, weights)
    lasso = Lasso(alpha=value, fit_intercept=False, tol=1e-10, max_iter=1_000_000)
    weights = lasso.fit(x, y[:, 0]).coef_
    active = np.flatnonzero(weights)
    tangent = np.zeros_like(weights)
    tangent[active] = -np.linalg.solve(hessian[np.ix_(active, active)], np.sign(weights[active]))
    return weights, tangent


def error_and_slope(
    task: Task, penalty: Penalty, value: float, part: str = "validation"
) -> tuple[float, float]:
    """Mean squared error of w*(λ) on a part of the data, and its derivative, from `solve`."""
    weights, tangent = solve(task, penalty, value)
    x, y = (tensor.numpy() for tensor in getattr(task, part))
    residual = x @ weights - y[:, 0]
    return float(np.mean(residual**2)), float(2 * np.mean(residual * (x @ tangent)))


def cross_validation(task: Task, penalty: Penalty, grid: np.ndarray) -> float:
    """The λ that scikit-learn's own cross-validation chooses from `grid`, on the same one split."""
    parts = task.train, task.validation
    x, y = (np.concatenate([part[i].numpy() for part in parts]) for i in (0, 1))
    fold = [-1] * len(task.train.y) + [0] * len(task.validation.y)
    if penalty is RIDGE:
        n = len(task.train.y)
        search = RidgeCV(
            n * grid,
            fit_intercept=False,
            cv=PredefinedSplit(fold),
            scoring="neg_mean_squared_error",
        )
        return float(search.fit(x, y[:, 0]).alpha_) / n
    lasso = LassoCV(
        alphas=grid, fit_intercept=False, cv=PredefinedSplit(fold), tol=1e-6, max_iter=100_000
    )
    return float(lasso.fit(x, y[:, 0]).alpha_)


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Draw both curves with the library's tangents and roots, and the root for short windows.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, RidgeConfig)
    rows: list[dict[str, Any]] = []
    jobs = [(seed, penalty) for seed in settings.seeds for penalty in (RIDGE, LASSO)]
    for seed, penalty in tqdm(jobs, desc="ridge and lasso", disable=not progress):
        rows += _study_one(seed, penalty, settings)
    save_numbers(folder, rows)
    ridge_figure(rows, folder.figure_file)
    findings = {p.name: _findings(rows, p.name) for p in (RIDGE, LASSO)}
    return {**findings, "says": [_sentence(name, found) for name, found in findings.items()]}


def _study_one(seed: int, penalty: Penalty, settings: RidgeConfig) -> list[dict[str, Any]]:
    task = diabetes(seed)
    grid = np.geomspace(penalty.lowest, penalty.highest, settings.points)
    own = {"penalty": penalty.name, "seed": seed}
    curve = [error_and_slope(task, penalty, value)[0] for value in grid]
    rows: list[dict[str, Any]] = [
        {**own, "what": "curve", "value": value, "error": error}
        for value, error in zip(grid, curve, strict=True)
    ]
    started = time.perf_counter()
    chosen = cross_validation(task, penalty, grid)
    rows.append(_root("cross-validation", own, task, penalty, chosen, started))
    for start in (penalty.lowest, penalty.highest):
        started = time.perf_counter()
        visits = descend(task, penalty, start, settings.window, settings.window, settings)
        root = _root("library", own, task, penalty, visits[-1].value, started)
        rows.append({**root, "window": settings.window, "ratio": root["value"] / chosen})
        rows += [
            _tangent({**own, "start": start, "update": k}, visit, task, penalty)
            for k, visit in enumerate(visits)
        ]
    for window in settings.short_windows:
        started = time.perf_counter()
        every = max(window, settings.update_every)
        value = descend(task, penalty, chosen, window, every, settings)[-1].value
        root = _root("short window", own, task, penalty, value, started)
        rows.append({**root, "window": window, "ratio": value / chosen})
    return rows


def _root(
    what: str, own: dict[str, Any], task: Task, penalty: Penalty, value: float, started: float
) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    error, test_error = (
        error_and_slope(task, penalty, value, part)[0] for part in ("validation", "test")
    )
    scores = {"error": error, "test_error": test_error, "seconds": seconds}
    return {**own, "what": what, "value": value, **scores}


def _tangent(own: dict[str, Any], visit: Visit, task: Task, penalty: Penalty) -> dict[str, Any]:
    slope = error_and_slope(task, penalty, visit.value)[1]
    return {**own, "what": "tangent", **asdict(visit), "closed_form": slope}


def _findings(rows: Sequence[dict[str, Any]], penalty: str) -> dict[str, Any]:
    def of(what: str, key: str) -> list[float]:
        return [row[key] for row in rows_of(rows, what, penalty=penalty)]

    both = ("library", "cross-validation")
    visits = rows_of(rows, "tangent", penalty=penalty)
    roots = [r for r in rows if r["penalty"] == penalty and "window" in r]
    return {
        "value": {what: spread(of(what, "value")) for what in both},
        "runs_within_3_percent": sum(abs(math.log(r)) < 0.03 for r in of("library", "ratio")),
        "minima_of_curve": _minima(rows, penalty),
        "error_of_slope": _errors_of_slope(visits),
        "validation_error": {what: spread(of(what, "error")) for what in both},
        "test_error": {what: spread(of(what, "test_error")) for what in both},
        "seconds": {what: spread(of(what, "seconds")) for what in both},
        "root_by_window": {
            str(window): spread([row["ratio"] for row in rows_of(roots, window=window)])
            for window in sorted({row["window"] for row in roots})
        },
    }


def _minima(rows: Sequence[dict[str, Any]], penalty: str) -> list[int]:
    """How many local minima inside the range each split's curve has."""
    points = rows_of(rows, "curve", penalty=penalty)
    curves = [
        np.array([row["error"] for row in rows_of(points, seed=seed)])
        for seed in dict.fromkeys(row["seed"] for row in points)
    ]
    return [int(np.sum((curve[1:-1] < curve[:-2]) & (curve[1:-1] < curve[2:]))) for curve in curves]


def _errors_of_slope(visits: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Errors of dE/dλ relative to the steepest slope of the run, first updates and later ones.

    The first window starts from weights of zero, and its end is not yet a fixed point. Runs of
    three updates or fewer have no later ones.
    """
    errors: dict[str, list[float]] = {}
    for visit in visits:
        run = rows_of(visits, seed=visit["seed"], start=visit["start"])
        scale = max(abs(other["closed_form"]) for other in run)
        error = abs(visit["hypergradient"] - visit["closed_form"]) / scale
        errors.setdefault("first_three" if visit["update"] < 3 else "later", []).append(error)
    return {when: max(found) for when, found in errors.items()}


def _sentence(name: str, found: dict[str, Any]) -> str:
    ours, theirs = found["value"]["library"], found["value"]["cross-validation"]
    return (
        f"{name}: dE/dλ = 0 at λ = {ours['mean']:.3g} ± {ours['std']:.2g}, cross-validation "
        f"chooses {theirs['mean']:.3g} ± {theirs['std']:.2g}. {found['runs_within_3_percent']} of "
        f"{len(ours['values'])} runs agree with it within 3 %."
    )
