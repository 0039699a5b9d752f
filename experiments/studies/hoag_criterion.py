"""Two outer losses of ridge that depend on λ directly, ∂E/∂λ ≠ 0, and need training data alone.

With S = X (XᵀX + n λ I)⁻¹ Xᵀ and w = w(λ), generalised cross-validation is
E(w, λ) = mean (Xw − y)² / (1 − tr S / n)², and Stein's unbiased risk estimate
E(w, λ) = mean (Xw − y)² + 2 σ² tr S / n − σ², which estimates the mean of (Xw − X w_true)².
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

import hypertorch
from experiments.tables import diabetes
from hypertorch.bilevel import exact

#: E from mean (Xw − y)², tr S / n, and σ², which only one of them uses.
Formula = Callable[[Any, Any, float], Any]


def _generalised_cross_validation(error: Any, freedom: Any, noise: float) -> Any:
    return error / (1 - freedom) ** 2


def _stein(error: Any, freedom: Any, noise: float) -> Any:
    return error + 2 * noise * freedom - noise


FORMULAS: dict[str, Formula] = {
    "generalised cross-validation": _generalised_cross_validation,
    "Stein's unbiased risk estimate": _stein,
}


def ridge_criterion(name: str, seed: int) -> dict[str, float]:
    """Minimise one of the two by HOAG and by its closed form.

    Args:
        name: of `FORMULAS`.
        seed: of the split of the diabetes data, of which 296 patients are for training.

    Returns:
        The λ found by HOAG, that of the closed form and the relative difference; dE/d log λ where
        HOAG ended, and what is left of it without ∂E/∂λ; σ²; test errors there, without a penalty,
        and the least that any λ has.
    """
    task = diabetes(seed, train_size=296, validation_size=0)
    x, y = task.train
    noise = noise_of(x.numpy(), y.numpy())
    known = _closed_form(x.numpy(), y.numpy(), FORMULAS[name], noise)
    criterion = Criterion(x, y, FORMULAS[name], noise)
    hoag = hypertorch.HOAG(
        criterion.inner_loss, criterion.outer_loss, [criterion.w], criterion.decay,
        tolerance=exact(1e-8),
    )  # fmt: skip
    hoag.minimize(15, atol=1e-6)
    found = criterion.decay().item()
    slopes = []
    for criterion.has_direct_term in (True, False):
        slopes.append(found * hoag.problem.hypergradient(1e-8)["decay"].item())
    test_x, test_y = task.test

    def test_error(w: Tensor) -> float:
        return (test_x @ w - test_y).square().mean().item()

    return {
        "hoag": found,
        "closed_form": known,
        "error": abs(found / known - 1),
        "slope": slopes[0],
        "slope_without_direct_term": slopes[1],
        "noise": noise,
        "test_error": test_error(criterion.w.detach()),
        "test_error_without_penalty": test_error(torch.linalg.lstsq(x, y).solution),
        "least_test_error": min(
            test_error(torch.from_numpy(_weights(x.numpy(), y.numpy(), value)))
            for value in np.geomspace(*BOUNDS, 200)
        ),
    }


BOUNDS = (1e-5, 10.0)


class Criterion:
    """Ridge as an inner problem, and E.

    Args:
        x: inputs `(n, d)`.
        y: targets `(n, 1)`.
        formula: E from mean (Xw − y)², tr S / n and σ².
        noise: σ².
    """

    def __init__(self, x: Tensor, y: Tensor, formula: Formula, noise: float) -> None:
        self.x, self.y, self.formula, self.noise = x, y, formula, noise
        self.w = nn.Parameter(torch.zeros(x.shape[1], 1, dtype=x.dtype))
        one = torch.ones((), dtype=x.dtype)
        self.decay = hypertorch.Hyperparameter(
            one, hypertorch.positive, name="decay", bounds=BOUNDS
        )
        self.squares = torch.linalg.svdvals(x).square()
        self.has_direct_term = True

    def inner_loss(self) -> Tensor:
        """The inner loss ‖Xw − y‖² / 2n + λ ‖w‖² / 2."""
        residual = self.x @ self.w - self.y
        return 0.5 * residual.square().mean() + 0.5 * self.decay() * self.w.square().sum()

    def outer_loss(self) -> Tensor:
        """The outer loss E."""
        decay, n = self.decay(), len(self.y)
        decay = decay if self.has_direct_term else decay.detach()
        trace = (self.squares / (self.squares + n * decay)).sum()  # tr S
        error = (self.x @ self.w - self.y).square().mean()
        loss: Tensor = self.formula(error, trace / n, self.noise)
        return loss


def noise_of(x: np.ndarray, y: np.ndarray) -> float:
    """The estimate ‖Xw − y‖² / (n − d − 1) of σ², with w of least squares and centred data."""
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(np.sum(residual**2) / (len(y) - x.shape[1] - 1))


def _weights(x: np.ndarray, y: np.ndarray, value: float) -> np.ndarray:
    w: np.ndarray = np.linalg.solve(x.T @ x + len(y) * value * np.eye(x.shape[1]), x.T @ y)
    return w


def _closed_form(x: np.ndarray, y: np.ndarray, formula: Formula, noise: float) -> float:
    n = len(y)

    def criterion(log: float) -> float:
        hat = x @ np.linalg.solve(x.T @ x + n * math.exp(log) * np.eye(x.shape[1]), x.T)
        return float(formula(np.mean((hat @ y - y) ** 2), np.trace(hat) / n, noise))

    logs = np.linspace(math.log(BOUNDS[0]), math.log(BOUNDS[1]), 60)
    middle = int(np.argmin([criterion(log) for log in logs]))
    bounds = logs[max(middle - 1, 0)], logs[min(middle + 1, 59)]
    best = scipy.optimize.minimize_scalar(criterion, bounds=bounds, options={"xatol": 1e-10})
    return math.exp(best.x)
