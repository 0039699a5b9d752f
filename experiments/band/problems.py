"""A task with one seed: its split, its initial weights and the order of its batches."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.band.rows import fingerprint
from experiments.band.schema import TaskConfig
from experiments.loaders import TensorLoader
from experiments.optimizers import build, schedule_factor
from experiments.schema import Schedule
from experiments.tasks import Task


class Problem:
    """All that runs with the same task and seed share.

    Args:
        config: of the task.
        seed: of the split, of the initial weights and of the order of the batches.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        data = OmegaConf.merge(cast(Any, config.data), {"split_seed": seed})
        self.task: Task = build(data)
        self.steps = config.epochs * len(self.loader())

    def model(self) -> nn.Module:
        """The model with the seed's initial weights."""
        torch.manual_seed(self.seed)
        model: nn.Module = build(self.config.model, self.task.image_shape, self.task.classes)
        return model.to(self.task.train.x.dtype) if self.task.train.x.is_floating_point() else model

    def loader(self) -> TensorLoader:
        """Training batches in the seed's order."""
        return TensorLoader(self.task.train, self.config.batch_size, shuffle=True, seed=self.seed)

    def validation_loader(self) -> TensorLoader:
        """Validation batches as large as training batches: their gradients cost the same."""
        size = min(self.config.batch_size, len(self.task.validation.y))
        return TensorLoader(self.task.validation, size, shuffle=True, seed=self.seed + 1)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.task.classes

    @functools.cached_property
    def evaluation_steps(self) -> frozenset[int]:
        """The steps after which the validation set is evaluated; the same for every method."""
        count = min(self.config.evaluations, self.steps)
        return frozenset(round(self.steps * k / count) for k in range(1, count + 1))

    def factor(self, schedule: str, step: int) -> float:
        """schedule(t) of η_t = η · schedule(t)."""
        return schedule_factor(Schedule(schedule), self.steps, self.config.epochs, step)


_kept: dict[tuple[str, int], Problem] = {}


def problem_of(config: TaskConfig, seed: int) -> Problem:
    """The problem, kept for the next run of the same process."""
    key = fingerprint(config), seed
    if key not in _kept:
        _kept.clear()
        _kept[key] = Problem(config, seed)
    return _kept[key]
