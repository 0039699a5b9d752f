"""The history of a run: its rows in `metrics.csv`, TensorBoard and the progress bar."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from experiments.run_folder import Row, RunFolder

SHORT_NAMES = {
    "lr": "η",
    "weight_decay": "λ",
    "train_loss": "train",
    "validation_loss": "val",
    "validation_accuracy": "acc",
}


class Recorder:
    """Keeps the rows, and writes them to the run folder if there is one.

    Args:
        folder: of the run, or None to write nothing.
        progress: show a bar.
        steps: of the whole run.
        title: of the bar.
    """

    def __init__(self, folder: RunFolder | None, progress: bool, steps: int, title: str) -> None:
        self.folder = folder
        self.history: list[Row] = []
        self.writer: Any = None
        self._new_bar = functools.partial(
            tqdm, total=steps, desc=title, unit="step", disable=not progress, dynamic_ncols=True
        )
        self.bar: Any = None

    def start(self, history: list[Row]) -> None:
        """Begin with the rows that a checkpoint holds; later event files replace what followed."""
        self.history = history
        self.bar = self._new_bar()
        if self.folder is not None:
            self.folder.start_metrics(history)
        if history:
            self.bar.update(int(history[-1]["step"]))

    def open_writer(self, purge_step: int | None = None) -> Any:
        """The SummaryWriter of the run folder, or None without a folder."""
        if self.folder is not None:
            self.writer = SummaryWriter(str(self.folder.path), purge_step=purge_step)
        return self.writer

    def add(self, row: Row) -> None:
        """Record one row."""
        self.history.append(row)
        self.bar.set_postfix_str(_postfix(row), refresh=False)
        self.bar.update(int(row["step"]) - self.bar.n)
        if self.folder is not None:
            self.folder.add_metrics(row)
            self._write_scalars(row)

    def close(self) -> None:
        """Close the bar and the event files."""
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _write_scalars(self, row: Row) -> None:
        for name in row.keys() - {"step", "epoch"}:
            if not math.isnan(row[name]):  # the training loss before the first step is
                self.writer.add_scalar(f"evaluation/{name}", row[name], int(row["step"]))


def _postfix(row: Row) -> str:
    return " ".join(f"{short}={row[name]:.3g}" for name, short in SHORT_NAMES.items())
