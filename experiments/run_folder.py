"""The folder of one run: resolved config, metrics, checkpoint, weights, summary.

A folder belongs to one configuration, and to one process at a time; a run that finds its own
checkpoint in it goes on from there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from experiments.config_errors import ConfigError
from experiments.config_values import make_folder
from experiments.folder_lock import locked
from experiments.schema import Config
from experiments.whole_files import written_whole

Row = dict[str, float]
WRITTEN = (  # by a run, and so removed when it starts again
    *("config.yaml", "checkpoint.pt", "model.pt", "summary.json"),
    *("config.*.part", "checkpoint.*.part", "model.*.part", "summary.*.part"),
    *("metrics.csv", "numbers.csv", "figure.png", "events.out.tfevents.*"),
)


class RunFolder:
    """`config.yaml`, `metrics.csv`, `model.pt`, `summary.json`, `figure.png`, event files.

    While the run is under way, `checkpoint.pt` is what it goes on from. A study has `numbers.csv`
    instead of metrics, weights, checkpoint and event files.

    Args:
        path: of the folder; nothing is read or written yet.
        config: of the run; only `run.device`, `run.threads` and `run.root` may differ from what
            the folder already holds.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.csv"
        self.checkpoint_file = path / "checkpoint.pt"
        self.model_file = path / "model.pt"
        self.summary_file = path / "summary.json"
        self.figure_file = path / "figure.png"
        self.numbers_file = path / "numbers.csv"

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder `<root>/<experiment>/<name>`."""
        return cls(Path(config.run.root) / config.run.experiment / config.run.name, config)

    @contextlib.contextmanager
    def claimed(self, fresh: bool = False) -> Iterator[None]:
        """Make the folder, and keep others out of it while entered.

        What an earlier run with the same settings left is removed if it cannot be gone on with. A
        run that ends in an error before its first checkpoint leaves the folder to any settings. In
        that of a finished run nothing is written.

        Args:
            fresh: remove what an earlier run left in any case, whatever its settings.

        Raises:
            ConfigError: if a run is under way in the folder, or it holds one of other settings.
        """
        if self.finished() and not fresh:
            self._check_settings()
            yield
            return
        make_folder(self.path, "run.root")
        with locked(self.path):
            self._prepare(fresh)
            try:
                yield
            except Exception:
                if not self._can_go_on():
                    self.config_file.unlink(missing_ok=True)
                raise

    def _prepare(self, fresh: bool) -> None:
        if not fresh:
            self._check_settings()
        if fresh or not self._can_go_on():
            self._clear()
        if not self.finished():
            _replace(self.config_file, OmegaConf.to_yaml(self.config, resolve=True))

    def _can_go_on(self) -> bool:
        return self.checkpoint_file.exists() or self.summary_file.exists()

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        for pattern in WRITTEN:
            for file in self.path.glob(pattern):
                file.unlink()

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
        """Replace the checkpoint, all or nothing: from there the run goes on."""
        with written_whole(self.checkpoint_file) as unfinished:
            torch.save(state, unfinished)

    def save_model(self, weights: Mapping[str, Tensor]) -> None:
        """Write `model.pt`, all or nothing: a state_dict that any machine loads.

        Args:
            weights: those that the summary speaks of.
        """
        with written_whole(self.model_file) as unfinished:
            torch.save({name: value.cpu() for name, value in weights.items()}, unfinished)

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The checkpoint that an interrupted run left, or None."""
        if not self.checkpoint_file.exists():
            return None
        content = io.BytesIO(self.checkpoint_file.read_bytes())
        try:
            state: dict[str, Any] = torch.load(content, map_location=device)
        except Exception:  # damaged bytes raise anything from an IndexError to an OSError
            raise _damaged(self.checkpoint_file, "Delete it, and the run starts again.") from None
        return state

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, all or nothing: the run is finished."""
        _replace(self.summary_file, json.dumps(summary, indent=2) + "\n")

    def load_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        if not self.summary_file.exists():
            return None
        try:
            summary: dict[str, Any] = json.loads(self.summary_file.read_text())
        except ValueError:
            what_to_do = "Delete it, and the run goes on from its checkpoint or starts again."
            raise _damaged(self.summary_file, what_to_do) from None
        return summary

    def finished(self) -> datetime | None:
        """When the run was finished; None before."""
        if not self.summary_file.exists():
            return None
        return datetime.fromtimestamp(self.summary_file.stat().st_mtime)

    def _check_settings(self) -> None:
        if not self.config_file.exists() and not self._can_go_on():
            return
        for key, old, new in _differences(self._settings_there(), self.config):
            raise ConfigError(
                f"`{self.path}` holds a run with other settings: `{key}` is {old} there and "
                f"{new} here. Choose another `run.name`, or delete the folder."
            )

    def _settings_there(self) -> Any:
        if not self.config_file.exists():
            return OmegaConf.create()
        try:
            return OmegaConf.load(self.config_file)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError):
            raise _damaged(
                self.config_file, "Delete its folder, and the run starts again."
            ) from None


def _replace(file: Path, text: str) -> None:
    """Write a file, all or nothing."""
    with written_whole(file) as unfinished:
        unfinished.write_text(text)


def _damaged(file: Path, what_to_do: str) -> ConfigError:
    return ConfigError(f"`{file}` is damaged. {what_to_do}")


def _differences(there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is chosen comes first: `hyper.name` says more than the keys that come with it."""
    free = {"run.device", "run.threads", "run.root"}
    old, new = (dict(_flat(OmegaConf.to_yaml(c, resolve=True))) for c in (there, here))
    keys = (old.keys() | new.keys()) - free
    for key in sorted(keys, key=lambda key: (not key.endswith((".name", "._target_")), key)):
        if old.get(key) != new.get(key):
            yield key, old.get(key, "not set"), new.get(key, "not set")


def _flat(yaml_text: str) -> Iterator[tuple[str, Any]]:
    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict):
            yield prefix, node
            return
        for key, value in node.items():
            yield from walk(value, f"{prefix}.{key}" if prefix else str(key))

    return walk(OmegaConf.to_container(OmegaConf.create(yaml_text)), "")
