"""The λ that the validation loss of a logistic regression asks for, found with scikit-learn.

    w(λ) = argmin_w  mean cross-entropy(w; training data) + λ/2 ‖w‖²,    λ* = argmin_λ E(w(λ))

torch's two weight vectors are opposite at the minimum, w = (−u/2, u/2), so that ‖w‖² = ‖u‖²/2 and
scikit-learn's C, which weighs n times the mean loss against ‖u‖²/2, is 2/(λn).
"""

from __future__ import annotations

import numpy as np

from experiments.band.problems import Problem
from experiments.loaders import Examples
from experiments.models import MLP

DECAYS = np.logspace(-4, 1, 26)  # five a decade
FACTOR = 3.0  # how near is near


def optimal_decay(problem: Problem) -> float | None:
    """λ* of a linear model with two classes; None for another.

    Args:
        problem: task and seed.

    Returns:
        λ*, one of 26 between 1e-4 and 10.
    """
    model = problem.model()
    if not isinstance(model, MLP) or len(model) != 2 or problem.task.classes != 2:
        return None
    losses = [validation_loss(problem, decay) for decay in DECAYS]
    return float(DECAYS[int(np.argmin(losses))])


def validation_loss(problem: Problem, decay: float) -> float:
    """E(w(λ)), in nats.

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
    return float(np.logaddexp(0, np.where(labels == 1, -log_odds, log_odds)).mean())


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
