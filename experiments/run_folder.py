"""The folder of one run: resolved config, metrics, checkpoint, summary.

A folder belongs to one configuration; a run that finds its own checkpoint in it goes on from there.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.config_errors import ConfigError
from experiments.schema import Config

Row = dict[str, float]


class RunFolder:
    """`config.yaml`, `metrics.csv`, `checkpoint.pt`, `summary.json`, `figure.png`, event files.

    A study has `numbers.csv` instead of metrics, checkpoint and event files.

    Args:
        path: of the folder, made if it is not there.
        config: of the run; only `run.device`, `run.threads` and `run.root` may differ from what
            the folder already holds.

    Raises:
        ConfigError: if the folder holds a run with other settings.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.csv"
        self.checkpoint_file = path / "checkpoint.pt"
        self.summary_file = path / "summary.json"
        self.figure_file = path / "figure.png"
        self.numbers_file = path / "numbers.csv"
        self._claim(config)

    @classmethod
    def of(cls, config: Config, fresh: bool = False) -> RunFolder:
        """The folder `<root>/<experiment>/<name>`.

        `fresh` deletes what an earlier run left; what cannot be gone on with is deleted anyway.
        """
        path = Path(config.run.root) / config.run.experiment / config.run.name
        can_go_on = any((path / name).exists() for name in ("checkpoint.pt", "summary.json"))
        if (path / "config.yaml").is_file() and (fresh or not can_go_on):
            shutil.rmtree(path)
        return cls(path, config)

    def start_metrics(self, history: list[Row]) -> None:
        """Begin `metrics.csv` with the rows up to the checkpoint; later ones are appended."""
        self.metrics_file.unlink(missing_ok=True)
        for row in history:
            self.add_metrics(row)

    def add_metrics(self, row: Row) -> None:
        """Append one row, after a header if it is the first."""
        new = not self.metrics_file.exists()
        with self.metrics_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def load_metrics(self) -> list[Row]:
        """The rows of `metrics.csv`."""
        with self.metrics_file.open(newline="") as file:
            return [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
            ]

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, all or nothing."""
        unfinished = self.checkpoint_file.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint_file)

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The checkpoint that an interrupted run left, or None."""
        if not self.checkpoint_file.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint_file, map_location=device)
        return state

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`: the run is finished."""
        self.summary_file.write_text(json.dumps(summary, indent=2) + "\n")

    def load_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        if not self.summary_file.exists():
            return None
        summary: dict[str, Any] = json.loads(self.summary_file.read_text())
        return summary

    def finished(self) -> datetime | None:
        """When the run was finished; None before."""
        if not self.summary_file.exists():
            return None
        return datetime.fromtimestamp(self.summary_file.stat().st_mtime)

    def _claim(self, config: Config) -> None:
        if self.config_file.exists():
            there = OmegaConf.load(self.config_file)
            for key, old, new in _differences(there, config):
                raise ConfigError(
                    f"`{self.path}` holds a run with other settings: `{key}` is {old} there and "
                    f"{new} here. Choose another `run.name`, or delete the folder."
                )
        self.config_file.write_text(OmegaConf.to_yaml(config, resolve=True))


def _differences(there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    free = {"run.device", "run.threads", "run.root"}
    old, new = (dict(_flat(OmegaConf.to_yaml(c, resolve=True))) for c in (there, here))
    for key in sorted((old.keys() | new.keys()) - free):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flat(yaml_text: str) -> Iterator[tuple[str, Any]]:
    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict):
            yield prefix, node
            return
        for key, value in node.items():
            yield from walk(value, f"{prefix}.{key}" if prefix else str(key))

    return walk(OmegaConf.to_container(OmegaConf.create(yaml_text)), "")
