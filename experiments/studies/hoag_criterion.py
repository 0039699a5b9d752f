"""Generalised cross-validation of ridge: an outer loss that depends on λ directly, ∂E/∂λ ≠ 0.

E(w, λ) = mean (Xw − y)² / (1 − tr S(λ) / n)²,   S = X (XᵀX + n λ I)⁻¹ Xᵀ,   on training data alone.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

import hypertorch
from experiments.tables import diabetes
from hypertorch.bilevel import exact


def generalised_cross_validation(seed: int) -> dict[str, float]:
    """Minimise it by HOAG and by its closed form.

    Args:
        seed: of the split of the diabetes data, of which 296 patients are for training.

    Returns:
        The λ found by HOAG, that of the closed form and the relative difference; dE/d log λ where
        HOAG ended, and what is left of it without ∂E/∂λ; test errors there and without a penalty.
    """
    task = diabetes(seed, train_size=296, validation_size=0)
    x, y = task.train
    known = _closed_form(x.numpy(), y.numpy())
    criterion = Criterion(x, y)
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
    plain = torch.linalg.lstsq(x, y).solution
    return {
        "hoag": found,
        "closed_form": known,
        "error": abs(found / known - 1),
        "slope": slopes[0],
        "slope_without_direct_term": slopes[1],
        "test_error": (test_x @ criterion.w.detach() - test_y).square().mean().item(),
        "test_error_without_penalty": (test_x @ plain - test_y).square().mean().item(),
    }


class Criterion:
    """Ridge as an inner problem, and E.

    Args:
        x: inputs `(n, d)`.
        y: targets `(n, 1)`.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.w = nn.Parameter(torch.zeros(x.shape[1], 1, dtype=x.dtype))
        one = torch.ones((), dtype=x.dtype)
        self.decay = hypertorch.Hyperparameter(
            one, hypertorch.positive, name="decay", bounds=(1e-5, 10.0)
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
        freedom = (self.squares / (self.squares + n * decay)).sum()  # tr S
        return (self.x @ self.w - self.y).square().mean() / (1 - freedom / n) ** 2


def _closed_form(x: np.ndarray, y: np.ndarray) -> float:
    n = len(y)

    def criterion(log: float) -> float:
        hat = x @ np.linalg.solve(x.T @ x + n * math.exp(log) * np.eye(x.shape[1]), x.T)
        return float(np.mean((hat @ y - y) ** 2) / (1 - np.trace(hat) / n) ** 2)

    logs = np.linspace(math.log(1e-5), math.log(10), 60)
    middle = int(np.argmin([criterion(log) for log in logs]))
    bounds = logs[max(middle - 1, 0)], logs[min(middle + 1, 59)]
    best = scipy.optimize.minimize_scalar(criterion, bounds=bounds, options={"xatol": 1e-10})
    return math.exp(best.x)
