"""Loss and accuracy of a model on held-out examples, and the best weights so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.loaders import Examples

BATCH_SIZE = 2000


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in eval mode; the model's mode is put back.

    Args:
        model: maps inputs to logits.
        examples: on the model's device.

    Returns:
        The loss in nats, and the accuracy in [0, 1].
    """
    was_training = model.training
    model.eval()
    loss = correct = torch.zeros((), device=examples.y.device)
    for x, y in zip(*(tensor.split(BATCH_SIZE) for tensor in examples), strict=True):
        logits = model(x)
        loss = loss + cross_entropy(logits, y, reduction="sum")
        correct = correct + (logits.argmax(1) == y).sum()
    model.train(was_training)
    n = examples.y.numel()
    return loss.item() / n, correct.item() / n


class BestWeights:
    """The weights with the highest validation accuracy, ties broken by the lower loss."""

    def __init__(self) -> None:
        self.step = -1
        self.accuracy, self.loss = -1.0, math.inf
        self.weights: dict[str, Any] = {}

    def offer(self, model: nn.Module, step: int, loss: float, accuracy: float) -> None:
        """Keep a copy of the model's weights if they did better than all before."""
        if (accuracy, -loss) > (self.accuracy, -self.loss):
            self.step, self.accuracy, self.loss = step, accuracy, loss
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        vars(self).update(state)


def or_infinite(loss: float) -> float:
    """A loss that can be compared: a run that diverged is worse than any other."""
    return loss if math.isfinite(loss) else math.inf
