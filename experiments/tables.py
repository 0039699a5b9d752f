"""Tables that scikit-learn brings along, split by a seed and standardised, in float64."""

from __future__ import annotations

import numpy as np
import torch

from experiments.loaders import Examples
from experiments.tasks import Task


def diabetes(seed: int, train_size: int = 150, validation_size: int = 146) -> Task:
    """scikit-learn's diabetes data (442 patients): 10 measurements, their squares and products.

    Inputs and targets have mean 0 and deviation 1 on the training patients, so that an error of 1
    is that of predicting the mean. The square of the one binary column is left out: it repeats it.

    Args:
        seed: of the split.
        train_size: training patients.
        validation_size: validation patients; the others are test patients.

    Returns:
        The task, its inputs `(n, 64)` and targets `(n, 1)`; it has one "class".
    """
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures

    x, y = load_diabetes(return_X_y=True)
    products = PolynomialFeatures(2, include_bias=False).fit_transform(x / x.std(0))
    copies = np.abs(np.corrcoef(products.T)[:10, 10:]).max(0) > 1 - 1e-9
    columns = np.delete(products, 10 + np.flatnonzero(copies), axis=1)
    order = np.random.default_rng(seed).permutation(len(y))
    train = order[:train_size]

    def standardised(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((values - values[train].mean(0)) / values[train].std(0))

    inputs, targets = standardised(columns), standardised(y[:, None])
    sizes = [train_size, validation_size, len(y) - train_size - validation_size]
    training, validation, test = (
        Examples(inputs[part], targets[part]) for part in torch.from_numpy(order).split(sizes)
    )
    return Task(training, validation, test, classes=1)
