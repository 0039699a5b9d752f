"""What the study `inputs` compares with: one λ for all, the lasso, and Bayesian relevance.

All by scikit-learn. The searches see the same splits, and are fitted to all their rows in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.linear_model import ARDRegression, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV

from experiments.studies.inputs_problems import Split, Table

BOUNDS = (1e-3, 1e6)  # of every λ, in scikit-learn's units


def _searched(
    model: Any, name: str, grid: Iterable[float], table: Table, splits: list[Split]
) -> Any:
    scoring = "neg_log_loss" if table.is_classification else "neg_mean_squared_error"
    search = GridSearchCV(model, {name: list(grid)}, scoring=scoring, cv=splits)
    return search.fit(table.fit.x, table.fit.y).best_estimator_


def one_for_all(table: Table, splits: list[Split], points: int) -> float:
    """The one λ of ridge or of L2 logistic regression that cross-validation chooses.

    Args:
        table: the data.
        splits: of cross-validation.
        points: of the grid over `BOUNDS`.
    """
    grid = np.geomspace(*BOUNDS, points)
    if table.is_classification:
        logistic = LogisticRegression(solver="newton-cholesky", max_iter=1000)
        return float(1 / _searched(logistic, "C", 1 / grid, table, splits).C)
    return float(_searched(Ridge(), "alpha", grid, table, splits).alpha)


def lasso(table: Table, splits: list[Split], points: int) -> np.ndarray:
    """Weights `(d + 1,)` of the lasso or of L1 logistic regression, penalty by cross-validation.

    Args:
        table: the data.
        splits: of cross-validation.
        points: of the grid, over four decades and over three.
    """
    if not table.is_classification:
        grid = np.geomspace(1e-3, 1, points)
        return _weights(_searched(Lasso(max_iter=100_000), "alpha", grid, table, splits))
    # `penalty="l1"` was replaced by `l1_ratio=1` in scikit-learn 1.8.
    is_old = getattr(LogisticRegression(), "penalty", None) == "l2"
    model = LogisticRegression(
        solver="liblinear", intercept_scaling=10.0, max_iter=5000, random_state=0,
        **({"penalty": "l1"} if is_old else {"l1_ratio": 1.0}),
    )  # fmt: skip
    return _weights(_searched(model, "C", np.geomspace(1e-2, 1e2, points), table, splits))


def relevance(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Automatic relevance determination: weights `(d + 1,)`, and its one λ per input `(d,)`.

    They maximise the evidence of all rows for training and validation; in the units of ridge they
    are the precision of each weight over that of the noise.
    """
    model = ARDRegression(max_iter=1000).fit(table.fit.x, table.fit.y)
    return _weights(model), model.lambda_ / model.alpha_


def _weights(model: Any) -> np.ndarray:
    return np.append(np.ravel(model.coef_), model.intercept_)
