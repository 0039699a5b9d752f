"""The training loop: the same for every method, with or without learned hyperparameters.

The weights that did best on validation data are kept; only they are tried on test data, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.devices import device_of, synchronize
from experiments.evaluation import BestWeights, evaluate
from experiments.loaders import Examples, TensorLoader, endless
from experiments.optimizers import (
    bare_optimizer,
    build,
    close,
    cost_of,
    hyperparameter_values,
    rollbacks_of,
    schedule_factor,
    training_step,
    wrapped,
)
from experiments.recording import Recorder
from experiments.resuming import Interrupted, Interruption, rng_states, set_rng_states
from experiments.run_folder import Row, RunFolder
from experiments.schema import Config
from experiments.tasks import Task


class Trainer:
    """One run, from its configuration to its summary.

    Args:
        config: of the run.
        task: the data, or None to load what `config.task` names.
        folder: where to record the run and where to look for its checkpoint, or None.
        progress: show a progress bar.
    """

    def __init__(
        self,
        config: Config,
        task: Task | None = None,
        folder: RunFolder | None = None,
        progress: bool = False,
    ) -> None:
        self.config, self.folder = config, folder
        self.device = device_of(config.run.device)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)
        self.task = (build(config.task) if task is None else task).to(self.device)
        shape, classes = self.task.image_shape, self.task.classes
        self.model: nn.Module = build(config.model, shape, classes).to(self.device)
        self.loader = self._train_loader()
        self.steps = config.run.epochs * len(self.loader)
        self.recorder = Recorder(folder, progress, self.steps, config.run.name)
        self.step, self._checkpointed = 0, 0
        self.best = BestWeights()
        self._loss_sum = torch.zeros((), device=self.device)  # since the last evaluation
        self._start()

    def _start(self) -> None:
        checkpoint = None if self.folder is None else self.folder.load_checkpoint(self.device)
        step = None if checkpoint is None else checkpoint["step"] + 1
        writer = self.recorder.open_writer(purge_step=step)
        bare = bare_optimizer(self.config.optimizer, self.model)
        loaders = self._train_loader(), self._validation_loader()
        started = time.perf_counter()  # some optimizers make trials first
        self.optimizer = wrapped(bare, self.config, self.model, *loaders, writer)
        self.seconds = time.perf_counter() - started
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.recorder.start([] if checkpoint is None else checkpoint["history"])
        if checkpoint is not None:
            self.load_state_dict(checkpoint)

    def _factor(self, step: int) -> float:
        """schedule(t) of η_t = η · schedule(t)."""
        run = self.config.run
        return schedule_factor(run.schedule, self.steps, run.epochs, step)

    def _train_loader(self) -> TensorLoader:
        run = self.config.run
        return TensorLoader(self.task.train, run.batch_size, shuffle=True, seed=run.seed)

    def _validation_loader(self) -> TensorLoader:
        validation, size = self.task.validation, self.config.run.validation_batch_size
        return TensorLoader(validation, min(size, len(validation.y)))

    def run(self) -> dict[str, Any]:
        """Train to the end, and try the best weights on test data.

        Returns:
            The summary: accuracies, losses, λ and η (before its schedule) at the end, and the cost.

        Raises:
            Interrupted: after Ctrl-C, once the checkpoint is written.
        """
        try:
            if self.step == 0:
                self._evaluate()
            self._train()
            close(self.optimizer)
            return self._summary()
        finally:
            self.recorder.close()

    def _train(self) -> None:
        self.model.train()
        batches = endless(self.loader)
        with Interruption() as interruption:
            while self.step < self.steps:
                self._train_until(self._next_evaluation(), batches, interruption)
                self._checkpoint_if_due(interruption.requested)
                if interruption.requested:
                    raise Interrupted(
                        f"Stopped at step {self.step} of {self.steps}. The same command goes on "
                        "from here."
                    )

    def _next_evaluation(self) -> int:
        every = self.config.run.evaluate_every or len(self.loader)
        return min(self.steps, self.step + every - self.step % every)

    def _train_until(
        self, stop: int, batches: Iterator[Examples], interruption: Interruption
    ) -> None:
        started = time.perf_counter()
        while self.step < stop and not interruption.requested:
            self._train_step(next(batches))
        synchronize(self.device)
        self.seconds += time.perf_counter() - started
        if self.step == stop:
            self._evaluate()

    def _train_step(self, batch: Examples) -> None:
        loss = cross_entropy(self.model(batch.x), batch.y)
        self._loss_sum += loss.detach()
        training_step(self.optimizer, loss)
        self.scheduler.step()
        self.step += 1

    def _evaluate(self) -> None:
        loss, accuracy = evaluate(self.model, self.task.validation)
        self.best.offer(self.model, self.step, loss, accuracy)
        self.recorder.add(self._row(loss, accuracy))

    def _row(self, loss: float, accuracy: float) -> Row:
        """A row of `metrics.csv`; its `lr` is that of the next step, after the schedule."""
        history = self.recorder.history
        steps = self.step - history[-1]["step"] if history else 0
        mean_loss = self._loss_sum.item() / steps if steps else float("nan")
        self._loss_sum.zero_()
        values = hyperparameter_values(self.optimizer)
        values["lr"] *= self._factor(self.step)
        return {
            "step": self.step,
            "epoch": self.step / len(self.loader),
            "train_loss": mean_loss,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            **values,
            "cost_steps": cost_of(self.optimizer, self.step),
            "rollbacks": rollbacks_of(self.optimizer),
            "seconds": round(self.seconds, 3),
        }

    def _summary(self) -> dict[str, Any]:
        last = self.recorder.history[-1]
        self.model.load_state_dict(self.best.weights)
        test_loss, test_accuracy = evaluate(self.model, self.task.test)
        return {
            "experiment": self.config.run.experiment,
            "name": self.config.run.name,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "best_step": self.best.step,
            "best_validation_accuracy": self.best.accuracy,
            "best_validation_loss": self.best.loss,
            "final": hyperparameter_values(self.optimizer),
            "steps": self.steps,
            "cost_steps": last["cost_steps"],
            "seconds": last["seconds"],
            "rollbacks": last["rollbacks"],
        }

    def _checkpoint_if_due(self, at_once: bool) -> None:
        due = self.step - self._checkpointed >= self.config.run.checkpoint_every
        if self.folder is not None and (due or at_once):
            self._checkpointed = self.step
            self.folder.save_checkpoint(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run needs to go on bit-identically."""
        return {
            "optimizer": self.optimizer.state_dict(),  # first: it may hand an open window back
            "model": self.model.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": rng_states(),
            "best": self.best.state_dict(),
            "history": self.recorder.history,
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": self._loss_sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        for name in ("model", "optimizer", "scheduler", "loader", "best"):
            getattr(self, name).load_state_dict(state[name])
        self.step = self._checkpointed = state["step"]
        self.seconds = state["seconds"]
        self._loss_sum = state["loss_sum"]
        set_rng_states(state["rng"])
