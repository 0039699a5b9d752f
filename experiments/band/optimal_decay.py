"""The λ that a validation loss of a logistic regression asks for, found with scikit-learn.

    w(λ) = argmin_w  mean cross-entropy(w; training data) + λ/2 ‖w‖²,    λ* = argmin_λ E(w(λ))

E is the cross-entropy of the logits, CE(z), or the calibrated one, min_β CE(β z).

torch's two weight vectors are opposite at the minimum, w = (−u/2, u/2), so that ‖w‖² = ‖u‖²/2 and
scikit-learn's C, which weighs n times the mean loss against ‖u‖²/2, is 2/(λn).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from experiments.band.problems import Problem
from experiments.loaders import Examples
from experiments.models import MLP

DECAYS = np.logspace(-4, 1, 26)  # five a decade
FACTOR = 3.0  # how near is near

Margins = np.ndarray[Any, np.dtype[np.float64]]  # log-odds of the right class
Criterion = Callable[[Margins], float]


def cross_entropy(margins: Margins) -> float:
    """CE(z), in nats."""
    return float(np.logaddexp(0, -margins).mean())


def calibrated_cross_entropy(margins: Margins) -> float:
    """min_β CE(β z) over β from e⁻⁸ to e⁸, in nats."""

    def loss(log_beta: float) -> float:
        return cross_entropy(np.exp(log_beta) * margins)

    return float(minimize_scalar(loss, bounds=(-8, 8), method="bounded").fun)


CRITERIA: dict[str, Criterion] = {
    "cross_entropy": cross_entropy,
    "calibrated_cross_entropy": calibrated_cross_entropy,
}


def optimal_decays(problem: Problem) -> dict[str, float]:
    """λ* by the criterion, of a linear model with two classes; empty for another.

    Args:
        problem: task and seed.

    Returns:
        λ*, each one of 26 between 1e-4 and 10.
    """
    model = problem.model()
    if not isinstance(model, MLP) or len(model) != 2 or problem.task.classes != 2:
        return {}
    margins = [validation_margins(problem, decay) for decay in DECAYS]
    return {
        name: float(DECAYS[int(np.argmin([criterion(m) for m in margins]))])
        for name, criterion in CRITERIA.items()
    }


def validation_margins(problem: Problem, decay: float) -> Margins:
    """The log-odds of the right class at w(λ), of each validation example.

    Args:
        problem: task and seed.
        decay: λ.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = _arrays(problem.task.train)
    regression = LogisticRegression(
        C=2 / (decay * len(y)), fit_intercept=False, solver="newton-cholesky", tol=1e-8
    )
    z, labels = _arrays(problem.task.validation)
    log_odds = regression.fit(x, y).decision_function(z)
    return np.where(labels == 1, log_odds, -log_odds)


def is_near(decay: float, optimum: float) -> bool:
    """Whether λ lies within a factor 3 of λ*.

    Args:
        decay: λ.
        optimum: λ*.
    """
    return optimum / FACTOR <= decay <= optimum * FACTOR


def _arrays(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with a column of ones, for the bias that torch decays too, and class numbers."""
    x = examples.x.flatten(1).double().numpy()
    return np.hstack([x, np.ones((len(x), 1))]), examples.y.numpy()
