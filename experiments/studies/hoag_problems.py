"""The nested problems of the study `hoag`: h and E as functions of w and λ, on real data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)

import hypertorch
from experiments.loaders import Examples
from experiments.tasks import Task, digits, fashion_mnist
from hypertorch.bilevel import InnerProblem, NestedProblem

Values = dict[str, float]
Loss = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Problem:
    """E(w(λ), λ) with w(λ) = argmin h(w, λ), on one split of one data set.

    Attributes:
        inner: h.
        outer: E.
        shape: of w, which starts at 0.
        box: the lowest and the highest value of each λ.
        curvature: no second derivative of h − λ/2 ‖w‖² in w is larger.
        closed_form: λ ↦ w(λ), where there is one.
    """

    inner: Loss
    outer: Loss
    shape: tuple[int, ...]
    box: dict[str, tuple[float, float]]
    curvature: float
    closed_form: Callable[[Values], Tensor] | None = None

    def somewhere(self, generator: np.random.Generator) -> Values:
        """A point of the box, uniform in the logarithms."""
        return {
            name: math.exp(generator.uniform(math.log(low), math.log(high)))
            for name, (low, high) in self.box.items()
        }


class Weights(nn.Module):
    """w, which starts at 0.

    Args:
        shape: of it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))


class Copy:
    """A problem with weights and hyperparameters of its own, as the library wants them.

    Args:
        problem: which.
        values: of λ at the beginning.
    """

    def __init__(self, problem: Problem, values: Values) -> None:
        self.problem = problem
        self.model = Weights(problem.shape)
        self.hyperparameters = {
            name: hypertorch.Hyperparameter(
                torch.tensor(values[name], dtype=torch.float64),
                hypertorch.positive,
                name=name,
                bounds=bounds,
            )
            for name, bounds in problem.box.items()
        }

    def inner_loss(self) -> Tensor:
        """The inner loss h at the present w and λ."""
        return self.problem.inner(self.model.w, self._values())

    def outer_loss(self) -> Tensor:
        """The outer loss E at the present w and λ."""
        return self.problem.outer(self.model.w, self._values())

    def _values(self) -> dict[str, Tensor]:
        return {name: h() for name, h in self.hyperparameters.items()}

    @property
    def arguments(self) -> dict[str, Any]:
        """What `HOAG` and `NestedProblem` are made from."""
        return {
            "inner_loss": self.inner_loss,
            "outer_loss": self.outer_loss,
            "params": self.model.parameters(),
            "hyperparameters": list(self.hyperparameters.values()),
        }

    def set(self, values: Values) -> None:
        """Let λ be `values`."""
        for name, h in self.hyperparameters.items():
            h.set(torch.tensor(values[name], dtype=torch.float64))

    @property
    def values(self) -> Values:
        """The present λ."""
        return {name: h().item() for name, h in self.hyperparameters.items()}


class Truth:
    """f(λ) = E(w(λ), λ), w(λ) solved tightly or by its closed form; each λ once.

    Args:
        problem: which.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[tuple[float, ...], float] = {}
        self._copy = Copy(problem, {name: high for name, (_, high) in problem.box.items()})
        solver = None if problem.closed_form is None else self._solve
        self._nested = NestedProblem(**self._copy.arguments, inner_solver=solver)

    def _solve(self, inner: InnerProblem, goal: float) -> None:
        assert self.problem.closed_form is not None
        with torch.no_grad():
            inner.params[0].copy_(self.problem.closed_form(self._copy.values))

    def __call__(self, values: Values) -> float:
        """The value of f at λ."""
        key = tuple(values[name] for name in self.problem.box)
        if key not in self._known:
            self._copy.set(values)
            self._known[key] = self._nested.value(1e-6)
        return self._known[key]

    def all_of(self, points: Sequence[Values]) -> None:
        """Evaluate f at all of them, in the order of λ: neighbours have similar w."""
        for values in sorted(points, key=lambda point: -point["decay"]):
            self(values)

    def least(self, points: int) -> float:
        """The least f: of all known, of a grid of so many points, and downhill from there."""
        names, box = list(self.problem.box), np.log(list(self.problem.box.values()))
        count = round(points ** (1 / len(names)))
        axes = [np.linspace(high, low, count) for low, high in box]
        for point in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)):
            self._at(point)
        best = np.log(min(self._known, key=lambda key: self._known[key]))
        scipy.optimize.minimize(
            self._at, best, method="Nelder-Mead", bounds=box,
            options={"xatol": 1e-3, "fatol": 1e-7, "initial_simplex": _simplex(best, box)},
        )  # fmt: skip
        return min(self._known.values())

    def _at(self, logs: np.ndarray) -> float:
        values = [
            float(min(max(math.exp(log), low), high))
            for log, (low, high) in zip(logs, self.problem.box.values(), strict=True)
        ]
        return self(dict(zip(self.problem.box, values, strict=True)))


def _simplex(corner: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A small simplex at a point of the box, pointing to its middle."""
    inwards = np.where(corner > box.mean(1), -0.1, 0.1)
    return np.vstack([corner, corner + np.diag(inwards)])


DECAYS = {"decay": (1e-5, 10.0)}


def breast_cancer(seed: int) -> Problem:
    """scikit-learn's breast_cancer: L2 logistic regression, λ."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _logistic(*_thirds(x, y, seed))


def multinomial(task: Task) -> Problem:
    """Ten classes of images: L2 multinomial regression, λ."""
    parts = [
        (_with_ones(part.x.flatten(1).double()), part.y) for part in (task.train, task.validation)
    ]
    (x, y), (x_out, y_out) = parts

    def inner(w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(x @ w, y) + 0.5 * values["decay"] * w.square().sum()

    def outer(w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(x_out @ w, y_out)

    return Problem(inner, outer, (x.shape[1], task.classes), DECAYS, _top(x) / 2)


def _logistic(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> Problem:
    def inner(w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        loss = binary_cross_entropy_with_logits(x @ w, y)
        return loss + 0.5 * values["decay"] * w.square().sum()

    def outer(w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(x_out @ w, y_out)

    return Problem(inner, outer, (x.shape[1],), DECAYS, _top(x) / 4)


def kernel_ridge(seed: int) -> Problem:
    """scikit-learn's diabetes: kernel ridge regression, λ and the RBF width γ.

    h(w) = wᵀ (K/n + λ I) w / 2 − wᵀ y / n, K = exp(−γ ‖x − x′‖²), whose minimum is at
    (K + n λ I) w = y.
    """
    from sklearn.datasets import load_diabetes

    table, targets = load_diabetes(return_X_y=True)
    x, y, x_out, y_out = _thirds(table, targets, seed)
    x, x_out = x[:, :-1], x_out[:, :-1]  # a kernel needs no column of ones
    mean, deviation = y.mean(), y.std()
    y, y_out, n = (y - mean) / deviation, (y_out - mean) / deviation, len(y)
    squares, squares_out = torch.cdist(x, x) ** 2, torch.cdist(x_out, x) ** 2

    def inner(w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        kernel = torch.exp(-values["width"] * squares)
        return 0.5 * w @ (kernel @ w / n + values["decay"] * w) - w @ y / n

    def outer(w: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return mse_loss(torch.exp(-values["width"] * squares_out) @ w, y_out)

    def closed_form(values: Values) -> Tensor:
        kernel = torch.exp(-values["width"] * squares)
        return torch.linalg.solve(kernel + n * values["decay"] * torch.eye(n, dtype=y.dtype), y)

    return Problem(inner, outer, (n,), DECAYS | {"width": (1e-3, 1.0)}, 1.0, closed_form)


def problems(
    seed: int, images: int, root: str, archives: str
) -> dict[str, Problem | FileNotFoundError]:
    """The four problems on the split of a seed; in place of one without data stands its error.

    Args:
        seed: of the splits.
        images: of Fashion-MNIST, for training and for validation each.
        root: torchvision's folder.
        archives: where the files are, if they are not in `root` yet.
    """
    found: dict[str, Problem | FileNotFoundError] = {
        "breast_cancer": breast_cancer(seed),
        "digits": multinomial(digits(599, 599, 599, split_seed=seed)),
        "diabetes": kernel_ridge(seed),
    }
    try:
        task = fashion_mnist(
            root,
            archives,
            train_size=images,
            validation_size=images,
            test_size=1,
            split_seed=seed,
            group="study",
        )
        found["fashion_mnist"] = multinomial(pooled(task))
    except FileNotFoundError as error:
        found["fashion_mnist"] = error
    return found


def pooled(task: Task) -> Task:
    """The images at half their width and height."""
    train, validation, test = (
        Examples(avg_pool2d(x, 2), y) for x, y in (task.train, task.validation, task.test)
    )
    return Task(train, validation, test, task.classes)


def _thirds(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation thirds of a table; the last third is left alone."""
    order = np.random.default_rng(seed).permutation(len(y))
    train, held_out = order[: len(y) // 3], order[len(y) // 3 : 2 * len(y) // 3]
    x = (x - x[train].mean(0)) / x[train].std(0)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y).double()
    inputs = _with_ones(inputs)
    return inputs[train], targets[train], inputs[held_out], targets[held_out]


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def _top(x: Tensor) -> float:
    """The largest eigenvalue of XᵀX / n."""
    return torch.linalg.matrix_norm(x, 2).item() ** 2 / len(x)
