"""What identifies a run, and what is known about it once it is done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import OmegaConf

from experiments.evaluation import or_infinite


@dataclass(frozen=True)
class Run:
    """The key of a run: two runs with the same key are the same run.

    `lr` and `weight_decay` are η₀ and λ₀; None where a method takes no such start.
    """

    task: str
    task_id: str  # of the task's settings: runs of other settings are other runs
    seed: int
    base: str  # sgd or adamw
    method: str
    schedule: str
    lr: float | None
    weight_decay: float | None
    code: str = ""  # of the library, for the methods that are its own


@dataclass
class Row:
    """A finished run. Accuracies in [0, 1], losses in nats.

    `test_accuracy` is that of the weights with the best validation accuracy, and chance if the run
    diverged; `test_accuracy_by_loss` that of the weights with the lowest validation loss.
    """

    run: Run
    test_accuracy: float
    test_loss: float
    validation_accuracy: float
    validation_loss: float
    best_step: int
    test_accuracy_by_loss: float
    test_loss_by_loss: float
    lowest_validation_loss: float
    last_test_accuracy: float
    last_validation_accuracy: float
    last_validation_loss: float
    final_lr: float
    final_weight_decay: float
    steps: int
    cost_steps: float
    seconds: float
    plain_seconds: float  # what plain training took on the same machine at the same time
    diverged: bool
    rollbacks: int = 0
    error: str = ""
    history: list[list[float]] = field(default_factory=list)

    def to_json(self) -> str:
        """One line."""
        values = asdict(self)
        return json.dumps({**values.pop("run"), **values})

    @classmethod
    def from_json(cls, line: str) -> Row:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(line)
        run = Run(**{name: values.pop(name) for name in Run.__dataclass_fields__})
        return cls(run, **values)

    @property
    def score(self) -> tuple[float, float]:
        """What searches choose by: validation accuracy, then validation loss."""
        loss = self.validation_loss
        return (-1.0 if self.diverged else self.validation_accuracy), -or_infinite(loss)


# What does not change a run: where its data lie, and with which others it is done.
PLACES = ("root", "archives", "download", "split_seed", "bases", "together")


def fingerprint(task: Any) -> str:
    """Ten hexadecimal digits that change with any setting of a task that changes its runs."""
    settings: Any = OmegaConf.to_container(OmegaConf.create(task), resolve=True)
    settings = {k: v for k, v in settings.items() if k not in PLACES}
    settings["data"] = {k: v for k, v in settings["data"].items() if k not in PLACES}
    return digest(json.dumps(settings, sort_keys=True))


def digest(text: str) -> str:
    """Ten hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]
