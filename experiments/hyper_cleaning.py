"""Data hyper-cleaning: one weight λᵢ per training example, half of which have wrong labels.

min_λ E(w_T(λ)), with w_T the weights of softmax regression after T steps of gradient descent from
zero on Σᵢ λᵢ ℓᵢ / n, and E the loss on validation images (Franceschi et al. 2017, section 5.1).
What is learned is judged by a training with the weights λ and the validation images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments import tasks
from experiments.loaders import Examples
from experiments.studies.schema import CleaningConfig
from experiments.tasks import Task

START = 0.5  # of every weight; below it, an example counts as corrupted
FASHION = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
DATA: dict[str, Callable[..., Task]] = {
    "digits": tasks.digits,
    "fashion_mnist": tasks.fashion_mnist,
    "mnist": tasks.mnist,
}


@dataclass(frozen=True)
class Cleaned:
    """Weights that were learned, and the F1 of finding the corrupted examples on the way.

    Attributes:
        weights: λ, `(n,)`.
        trace: cost in training steps (one of a window counts as three) and F1, at each update.
        network: with the weights at the end of the run; None if there is no one run.
    """

    weights: Tensor
    trace: list[tuple[float, float]]
    network: nn.Linear | None


class Laboratory:
    """One data set and seed: what is trained, and what is known of it.

    Args:
        name: of the data set, one of `DATA`.
        images: for training, and as many for validation; twice as many for test.
        settings: of the study.
        seed: of the split and of the wrong labels.

    Attributes:
        train, validation, test: the examples, their pixels in a row; `train` has wrong labels.
        corrupted: where they are wrong, `(n,)`. Only what judges a method looks there.
    """

    def __init__(self, name: str, images: int, settings: CleaningConfig, seed: int) -> None:
        sizes = {"train_size": images, "validation_size": images, "test_size": 2 * images}
        files = {"root": settings.root, "archives": settings.archives, "group": "study"}
        load = functools.partial(DATA[name], **sizes, split_seed=seed)
        if name == "fashion_mnist":
            load = functools.partial(load, **files)
        clean, noisy = load(label_noise=0.0), load(label_noise=settings.noise)
        parts = noisy.train, noisy.validation, noisy.test
        self.train, self.validation, self.test = (Examples(p.x.flatten(1), p.y) for p in parts)
        self.true_labels, self.classes = clean.train.y, noisy.classes
        self.corrupted = self.true_labels != self.train.y
        self.image_shape = noisy.image_shape[1:]
        self.names = FASHION if name == "fashion_mnist" else [str(c) for c in range(self.classes)]
        self.settings, self.n = settings, images

    def network(self) -> nn.Linear:
        """Softmax regression, at zero."""
        network = nn.Linear(self.train.x.shape[1], self.classes)
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network

    def optimizer(self, network: nn.Linear, momentum: float) -> torch.optim.SGD:
        """Gradient descent with momentum."""
        return torch.optim.SGD(network.parameters(), lr=self.settings.lr, momentum=momentum)

    def trained(
        self, weights: Tensor, labels: Tensor | None = None, start: nn.Linear | None = None
    ) -> nn.Linear:
        """The final training: T steps on Σᵢ λᵢ ℓᵢ / Σᵢ λᵢ over training and validation images.

        Args:
            weights: λᵢ of the training images, `(n,)`; those of the validation images are 1.
            labels: of the training images; by default those they came with.
            start: goes on from there, and changes it; by default from zero.

        Returns:
            The trained network.
        """
        used, labels = weights > 0, self.train.y if labels is None else labels
        x = torch.cat([self.train.x[used], self.validation.x])
        y = torch.cat([labels[used], self.validation.y])
        shares = torch.cat([weights[used].float(), torch.ones(len(self.validation.y))])
        shares /= shares.sum()
        network = start or self.network()
        optimizer = self.optimizer(network, self.settings.momentum)
        for _ in range(self.settings.steps):
            optimizer.zero_grad()
            (shares @ cross_entropy(network(x), y, reduction="none")).backward()
            optimizer.step()
        return network

    def weighted_loss(self, network: nn.Linear, weights: hypertorch.Hyperparameter) -> Tensor:
        """Σᵢ λᵢ ℓᵢ / n on the training images."""
        losses = cross_entropy(network(self.train.x), self.train.y, reduction="none")
        return (weights() * losses).mean()

    def validation_loss(self, network: nn.Linear) -> Tensor:
        """E."""
        return cross_entropy(network(self.validation.x), self.validation.y)

    def f1(self, found: Tensor) -> float:
        """2 P R / (P + R) of finding the corrupted examples, with precision P and recall R."""
        both = (found & self.corrupted).sum().item()
        return 2 * both / (found.sum().item() + self.corrupted.sum().item())

    def right(self, network: nn.Linear) -> Tensor:
        """How probable it is that a label is right, by a network's probabilities p of it, `(n,)`.

        With a fraction ε of wrong labels, drawn uniformly from c − 1 classes, by Bayes' rule
        (1 − ε) p / ((1 − ε) p + ε (1 − p) / (c − 1)).
        """
        noise = self.settings.noise
        with torch.no_grad():
            p = network(self.train.x).softmax(1).gather(1, self.train.y[:, None])[:, 0]
        return (1 - noise) * p / ((1 - noise) * p + noise * (1 - p) / (self.classes - 1))


def accuracy(network: nn.Linear, examples: Examples) -> float:
    """Fraction of right answers."""
    with torch.no_grad():
        return (network(examples.x).argmax(1) == examples.y).float().mean().item()


def new_weights(n: int) -> hypertorch.Hyperparameter:
    """λ in the unit interval, one per example."""
    return hypertorch.Hyperparameter(
        torch.full((n,), START), hypertorch.unit_interval, name="weights"
    )


def clean_online(laboratory: Laboratory) -> Cleaned:
    """Learn λ in one run, while the weights of the network train.

    The outer rule is gradient descent, ρᵢ ← ρᵢ − rate · n · dE/dρᵢ.

    Args:
        laboratory: the data and the training.

    Returns:
        What was learned, with the network as the run leaves it.
    """
    settings, network = laboratory.settings, laboratory.network()
    weights = new_weights(laboratory.n)
    optimizer = hypertorch.HyperOptimizer(
        laboratory.optimizer(network, settings.online_momentum),
        network,
        outer_loss=functools.partial(laboratory.validation_loss, network),
        learn=(weights,),
        window=settings.window,
        update_every=settings.window,
        outer=functools.partial(torch.optim.SGD, lr=settings.online_rate * laboratory.n),
    )
    trace = []
    for step in range(settings.steps):
        optimizer.step(laboratory.weighted_loss(network, weights))
        if (step + 1) % settings.window == 0:
            trace.append((optimizer.cost, laboratory.f1(weights() < START)))
    optimizer.close()
    return Cleaned(weights().detach(), trace, network)


def clean_nested(laboratory: Laboratory) -> Cleaned:
    """Learn λ by gradient descent on E(w_T(λ)): each update differentiates a training from zero.

    Args:
        laboratory: the data and the training.

    Returns:
        What was learned; there is no network.
    """
    settings, network = laboratory.settings, laboratory.network()
    weights = new_weights(laboratory.n)
    bare = laboratory.optimizer(network, settings.nested_momentum)
    optimizer = hypertorch.HyperOptimizer(bare, network, learn=(weights,), outer=None)
    rule = torch.optim.SGD([weights.raw], lr=settings.nested_rate * laboratory.n)
    losses = [functools.partial(laboratory.weighted_loss, network, weights)] * settings.horizon
    outer_loss = functools.partial(laboratory.validation_loss, network)
    trace = []
    for update in range(settings.updates):
        hypergradients = hypertorch.hypergradient(optimizer, losses, outer_loss)
        weights.raw.grad = weights.pull_back(hypergradients["weights"])
        rule.step()
        weights.refresh()
        cost = float((update + 1) * (3 * settings.horizon + 1))
        trace.append((cost, laboratory.f1(weights() < START)))
    return Cleaned(weights().detach(), trace, None)
