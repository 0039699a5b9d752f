"""breast_cancer in random Fourier features: a convex task on which λ decides."""

from __future__ import annotations

import math

import torch

from experiments.config_errors import ConfigError
from experiments.loaders import Examples
from experiments.tasks import Task, check_sizes, with_label_noise


def breast_cancer(
    features: int = 200,
    width: float = 6.0,
    train_size: int = 200,
    validation_size: int = 120,
    label_noise: float = 0.1,
    split_seed: int = 0,
) -> Task:
    """scikit-learn's breast_cancer (569 tumours, 30 measurements), lifted to random features.

    φ_j(x) = √2 cos(ω_j · x + b_j) with ω_j ~ N(0, 1 / width²) and b_j uniform on a circle, so that
    φ(x) · φ(x') / features approaches exp(−‖x − x'‖² / (2 width²)). With about as many features as
    training examples, and some wrong labels, a linear model overfits unless λ forbids it.

    Args:
        features: how many.
        width: of the kernel, in training standard deviations of a measurement.
        train_size: training examples.
        validation_size: validation examples; the others are test examples.
        label_noise: fraction in [0, 1] of training labels that become the other class.
        split_seed: of the split, the noise and the features.

    Returns:
        The task: inputs `(n, features)`, two classes.

    Raises:
        ConfigError: for a size below 1, if the sizes leave no test example, or if the noise is no
            fraction.

    References:
        Rahimi and Recht, Random features for large-scale kernel machines, 2007.
    """
    from sklearn.datasets import load_breast_cancer

    check_sizes(features=features, train_size=train_size, validation_size=validation_size)
    bunch = load_breast_cancer()
    x, y = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).long()
    held = train_size + validation_size
    if held >= len(y):
        raise ConfigError(
            f"`task.train_size` and `task.validation_size` do not fit the data. Got {train_size} "
            f"and {validation_size}, and there are {len(y)} examples, some of them to test on."
        )
    generator = torch.Generator().manual_seed(split_seed)
    order = torch.randperm(len(y), generator=generator)
    train, validation, test = order.split([train_size, validation_size, len(y) - held])
    z = (x - x[train].mean(0)) / x[train].std(0)
    omega = torch.randn(z.shape[1], features, dtype=z.dtype, generator=generator) / width
    phase = 2 * math.pi * torch.rand(features, dtype=z.dtype, generator=generator)
    phi = (math.sqrt(2) * torch.cos(z @ omega + phase)).float()
    noisy = with_label_noise(y[train], label_noise, 2, generator)
    held_out, last = (Examples(phi[part], y[part]) for part in (validation, test))
    return Task(Examples(phi[train], noisy), held_out, last, classes=2)
