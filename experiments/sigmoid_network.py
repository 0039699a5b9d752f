"""Nielsen's network: sigmoid units, his two costs, and many trainings of it at once.

C = C₀ + λ/2n Σ w², with n training images and w the weights without the biases; C₀ is the
cross-entropy or the quadratic cost (*Neural Networks and Deep Learning*, chapters 1 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from experiments.loaders import Examples

COSTS = ("cross-entropy", "quadratic")


class SigmoidNetwork(nn.Module):
    """One hidden layer of sigmoid units; returns the outputs before their sigmoid.

    Args:
        inputs: pixels.
        hidden: units.
        outputs: classes.
        seed: of the start: every weight and bias from N(0, 1), as in his chapters 1 and 2.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(inputs, hidden), (1, hidden), (hidden, outputs), (1, outputs)]
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return logits(list(self.weights), x)

    def penalty(self) -> Tensor:
        """½ Σ w²."""
        return penalty(list(self.weights))


def logits(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs before their sigmoid, for one network or, with a leading dimension, for many."""
    first, first_bias, second, second_bias = weights
    return torch.sigmoid(x.flatten(1) @ first + first_bias) @ second + second_bias


def penalty(weights: Sequence[Tensor]) -> Tensor:
    """½ Σ w² of each network."""
    return (weights[0].square().sum((-2, -1)) + weights[2].square().sum((-2, -1))) / 2


def data_cost(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """C₀ of each network, a mean over images of a sum over outputs.

    Args:
        kind: one of `COSTS`.
        outputs: from `logits`, `(…, n, classes)`.
        labels: class numbers, `(n,)`.

    Returns:
        `(…)`, in nats for the cross-entropy.
    """
    targets = one_hot(labels, outputs.shape[-1]).to(outputs)
    if kind == "quadratic":
        return (outputs.sigmoid() - targets).square().sum(-1).mean(-1) / 2
    return (softplus(outputs) - targets * outputs).sum(-1).mean(-1)


def training_cost(
    weights: Sequence[Tensor], kind: str, examples: Examples, decays: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """C of each of G networks, `(G,)`, and its gradient in their weights."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    cost = data_cost(kind, logits(leaves, examples.x), examples.y)
    cost = cost + decays / len(examples.y) * penalty(leaves)
    return cost.detach(), torch.autograd.grad(cost.sum(), leaves)


def train_many(
    network: SigmoidNetwork,
    kind: str,
    examples: Examples,
    decays: Tensor,
    rates: Tensor,
    stops: Sequence[int],
) -> list[list[Tensor]]:
    """Plain gradient descent on C for every pair (λ, η), without the library.

    Args:
        network: holds the weights to start from; left as it is.
        kind: one of `COSTS`.
        examples: the training images.
        decays: λ, `(G,)`.
        rates: η, `(G,)`.
        stops: numbers of steps after which the weights are kept.

    Returns:
        For each stop the four weights, each with a leading dimension of G.
    """
    weights = [w.detach().expand(len(rates), *w.shape).clone() for w in network.weights]
    kept = []
    for step in range(1, max(stops) + 1):
        _, gradients = training_cost(weights, kind, examples, decays)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= rates[:, None, None] * gradient
        if step in stops:
            kept.append([weight.clone() for weight in weights])
    return kept


def pixels(examples: Examples) -> int:
    """How many inputs an image gives."""
    return math.prod(examples.x.shape[1:])
