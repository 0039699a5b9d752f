"""What a run keeps of its evaluations: two sets of weights, chosen on validation data."""

from __future__ import annotations

import math

from torch import Tensor, nn

from experiments.evaluation import evaluate
from experiments.loaders import Examples

Weights = dict[str, Tensor]


class Checkpoints:
    """The weights with the best validation accuracy, those with the lowest loss, and the history.

    Args:
        validation: the examples that decide.
    """

    def __init__(self, validation: Examples) -> None:
        self.validation = validation
        self.history: list[list[float]] = []
        self.best, self.lowest = (-1.0, -math.inf), math.inf
        self.best_step = 0
        self.by_accuracy: Weights = {}
        self.by_loss: Weights = {}

    def offer(self, model: nn.Module, step: int, lr: float, weight_decay: float) -> bool:
        """Evaluate the model, and keep a copy of its weights if they did better.

        Returns:
            Whether the validation loss is finite.
        """
        loss, accuracy = evaluate(model, self.validation)
        self.history.append([step, loss, accuracy, lr, weight_decay])
        if not math.isfinite(loss):
            return False
        better, lower = (accuracy, -loss) > self.best, loss < self.lowest
        if better or lower:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if better:
            self.best, self.best_step, self.by_accuracy = (accuracy, -loss), step, weights
        if lower:
            self.lowest, self.by_loss = loss, weights
        return True

    def test(self, model: nn.Module, test: Examples) -> dict[str, float]:
        """Try the weights of the model, and both that were kept, on test data; once, at the end."""
        last = evaluate(model, test)
        model.load_state_dict(self.by_accuracy)
        best = evaluate(model, test)
        model.load_state_dict(self.by_loss)
        lowest = evaluate(model, test)
        return {
            "test_loss": best[0],
            "test_accuracy": best[1],
            "test_loss_by_loss": lowest[0],
            "test_accuracy_by_loss": lowest[1],
            "last_test_accuracy": last[1],
        }
