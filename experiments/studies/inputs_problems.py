"""The nested problems of the study `inputs`: linear models with one λ per input, on real tables.

h(W, λ) = Σ_s [mean of l(x w_s) over the training rows of split s + Σ_i λ_i w_si² / 2 n_s] and
E(W) = mean over what each split holds out; one split, or k folds with one w_s each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import hypertorch
from hypertorch.bilevel import InnerProblem

Split = tuple[np.ndarray, np.ndarray]  # rows to train on, rows held out


@dataclass(frozen=True)
class Part:
    """Rows of a table: inputs `(n, d)` and targets `(n,)`."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Table:
    """One data set, its inputs standardised, with some that are artificial.

    Attributes:
        inputs: the names of the inputs.
        artificial: how many there are at the end that know nothing: each is one of the real
            inputs, the first ones, in the order of other rows.
        is_classification: logistic regression of 0 or 1; else regression of a standardised number.
        fit: rows for training and validation.
        test: rows that nothing is chosen by.
    """

    inputs: list[str]
    artificial: int
    is_classification: bool
    fit: Part
    test: Part

    def loss(self, outputs: np.ndarray, part: Part) -> float:
        """Cross-entropy in nats, or mean squared error with the target's variance as 1."""
        if not self.is_classification:
            return float(np.mean((outputs - part.y) ** 2))
        return float(np.mean(np.logaddexp(0, outputs) - part.y * outputs))

    def score(self, weights: np.ndarray) -> dict[str, float]:
        """Loss on the test rows of `weights` `(d + 1,)`, the last the intercept; and accuracy."""
        outputs = self.test.x @ weights[:-1] + weights[-1]
        found = {"test_loss": self.loss(outputs, self.test)}
        if self.is_classification:
            found["test_accuracy"] = float(np.mean((outputs > 0) == (self.test.y > 0)))
        return found


LOADERS = {"diabetes": load_diabetes, "breast_cancer": load_breast_cancer}


def table(name: str, seed: int, artificial: int) -> Table:
    """scikit-learn's diabetes (442 rows, 10 inputs) or breast_cancer (569 rows, 30 inputs).

    Args:
        name: which.
        seed: of the split, two thirds for training and validation, and of the artificial inputs.
        artificial: how many of these.
    """
    loaded = LOADERS[name]()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(loaded.target))
    copies = [generator.permutation(column) for column in loaded.data.T[:artificial]]
    x = np.column_stack([loaded.data, *copies])[order]
    y = loaded.target[order].astype(float)
    rows = 2 * len(y) // 3
    x = (x - x[:rows].mean(0)) / x[:rows].std(0)
    if name == "diabetes":
        y = (y - y[:rows].mean()) / y[:rows].std()
    names = [str(n) for n in loaded.feature_names]
    return Table(
        inputs=names + [f"shuffled {n}" for n in names[:artificial]],
        artificial=len(copies),
        is_classification=name == "breast_cancer",
        fit=Part(x[:rows], y[:rows]),
        test=Part(x[rows:], y[rows:]),
    )


def hold_out(rows: int) -> list[Split]:
    """One split: the first half trains, the second is held out."""
    return [(np.arange(rows // 2), np.arange(rows // 2, rows))]


def folds(rows: int, count: int) -> list[Split]:
    """As many splits as folds: each holds out one of them."""
    parts = np.array_split(np.arange(rows), count)
    return [(np.setdiff1d(np.arange(rows), part), part) for part in parts]


class Problem(nn.Module):
    """h and E of one table and its splits, as the library wants them.

    Args:
        table: the data.
        splits: of the rows of `table.fit`.
        start: every λ_i at the beginning, in scikit-learn's units: `Ridge`'s `alpha`, 1 / `C`.
        bounds: the box of every λ_i.
    """

    def __init__(
        self, table: Table, splits: Sequence[Split], start: float, bounds: tuple[float, float]
    ) -> None:
        super().__init__()
        self.table = table
        x = np.column_stack([table.fit.x, np.ones(len(table.fit.y))])
        self.x = torch.from_numpy(x)
        self.y = torch.from_numpy(table.fit.y)[:, None].expand(-1, len(splits))
        train, held_out = (self._rows([s[part] for s in splits]) for part in (0, 1))
        self.sizes = train.sum(0)  # n_s
        self.shares, self.held_out = train / self.sizes, held_out / held_out.sum()
        self.w = nn.Parameter(torch.zeros(x.shape[1], len(splits), dtype=torch.float64))
        self.decays = hypertorch.Hyperparameter(
            torch.full((x.shape[1] - 1,), start, dtype=torch.float64),
            hypertorch.positive,
            name="decays",
            bounds=bounds,
        )

    def _rows(self, parts: Sequence[np.ndarray]) -> Tensor:
        """Indicators `(n, k)` of the rows of each part."""
        return torch.from_numpy(
            np.stack([np.isin(np.arange(len(self.x)), part) for part in parts], 1).astype(float)
        )

    def _losses(self, weights: Tensor) -> Tensor:
        outputs = self.x @ self.w
        if self.table.is_classification:
            losses = binary_cross_entropy_with_logits(outputs, self.y, reduction="none")
        else:
            losses = mse_loss(outputs, self.y, reduction="none")
        return (weights * losses).sum()

    def inner_loss(self) -> Tensor:
        """The inner loss h; that of regression is half the squared error. Intercepts are free."""
        losses = self._losses(self.shares if self.table.is_classification else 0.5 * self.shares)
        penalties = (self.decays() @ self.w[:-1].square() / self.sizes).sum()
        return losses + 0.5 * penalties

    def outer_loss(self) -> Tensor:
        """The outer loss E."""
        return self._losses(self.held_out)

    def newton(self, inner: InnerProblem, goal: float) -> None:
        """Move W to the minimum of h by Newton's method, with the Hessian of each w_s in full.

        A step that does not lower h is halved. For the squared error one step suffices.
        """
        value, (gradient,) = inner.value_and_gradient()
        while gradient.norm() > goal:
            step = torch.stack(
                [
                    torch.linalg.solve(hessian, g)
                    for hessian, g in zip(self.hessians(), gradient.T, strict=True)
                ],
                1,
            )
            before, kept, size = value, self.w.detach().clone(), 1.0
            while size > 1e-6:
                with torch.no_grad():
                    self.w.copy_(kept - size * step)
                value, (gradient,) = inner.value_and_gradient()
                if value <= before:
                    break
                size /= 2
            else:
                return

    @torch.no_grad()
    def hessians(self) -> list[Tensor]:
        """∂²h/∂w_s² of each split, at the present W."""
        outputs = self.x @ self.w
        curvatures = self.shares
        if self.table.is_classification:
            curvatures = self.shares * torch.sigmoid(outputs) * torch.sigmoid(-outputs)
        penalty = torch.cat([self.decays(), torch.zeros(1, dtype=torch.float64)])
        return [
            self.x.T @ (c[:, None] * self.x) + torch.diag(penalty / n)
            for c, n in zip(curvatures.T, self.sizes, strict=True)
        ]


def fitted(table: Table, values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """w(λ) `(d + 1,)` by scikit-learn, on all rows of `table.fit` or some.

    Σ λ_i w_i² is one penalty ‖v‖² of the inputs x_i / √λ_i, with w_i = v_i / √λ_i.
    """
    part = table.fit if rows is None else Part(table.fit.x[rows], table.fit.y[rows])
    scale = 1 / np.sqrt(values)
    model = (
        LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        if table.is_classification
        else Ridge(alpha=1.0, solver="cholesky")
    )
    model.fit(part.x * scale, part.y)
    return np.append(np.ravel(model.coef_) * scale, model.intercept_)


def error_and_slope(
    table: Table, splits: Sequence[Split], values: np.ndarray
) -> tuple[float, np.ndarray]:
    """E(w(λ)) and dE/dλ without our code: scikit-learn's w, then the normal equations.

    dE/dλ_i = −Σ_s v_si w_si / n_s,   H_s v_s = ∂E/∂w_s
    """
    held_out = sum(len(part) for _, part in splits)
    error, slope = 0.0, np.zeros(len(values))
    for rows, others in splits:
        w = fitted(table, values, rows)
        part = Part(table.fit.x[others], table.fit.y[others])
        outputs = part.x @ w[:-1] + w[-1]
        error += table.loss(outputs, part) * len(others) / held_out
        residual = 2 * (outputs - part.y)
        if table.is_classification:
            residual = _sigmoid(outputs) - part.y
        ones = np.column_stack([part.x, np.ones(len(others))])
        v = np.linalg.solve(hessian(table, values, w, rows), ones.T @ residual / held_out)
        slope -= (v * w)[:-1] / len(rows)
    return error, slope


def hessian(
    table: Table, values: np.ndarray, weights: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """∂²h/∂w² `(d + 1, d + 1)` of the fit to all rows of `table.fit` or some."""
    x = table.fit.x if rows is None else table.fit.x[rows]
    x = np.column_stack([x, np.ones(len(x))])
    outputs = x @ weights
    curvatures = np.ones(len(x))
    if table.is_classification:
        curvatures = _sigmoid(outputs) * _sigmoid(-outputs)
    return (x.T * curvatures) @ x / len(x) + np.diag(np.append(values, 0.0)) / len(x)


def freedom(table: Table, values: np.ndarray) -> np.ndarray:
    """γ_i = 1 − λ_i (H⁻¹)_ii / n of each input: 1 where w_i is free, 0 where it is switched off.

    References:
        MacKay 1992, the number of well-determined parameters, one by one.
    """
    inverse = np.linalg.inv(hessian(table, values, fitted(table, values)))
    return 1 - values * np.diag(inverse)[:-1] / len(table.fit.y)


def _sigmoid(outputs: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -outputs))
