"""What all studies share: how one is run and reported, and how its numbers are kept.

A study is a function `(config, folder, progress) -> findings`. It writes `folder.figure_file` and,
by `save_numbers`, every number in the figure.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from experiments.config_errors import ConfigError
from experiments.resuming import Interrupted
from experiments.run_folder import RunFolder
from experiments.schema import Config

Number = dict[str, float | int | str]
Settings = TypeVar("Settings")


def run_study(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Run the study that `config.study` names.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The summary: what the study found, its seeds, and the seconds it took. Under `says` stand
        the sentences that the command prints.

    Raises:
        Interrupted: after Ctrl-C.
    """
    torch.set_num_threads(config.run.threads)
    started = time.perf_counter()
    try:
        findings = get_object(config.study._target_)(config, folder, progress)
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped. A study has no checkpoints: the same command starts it again."
        ) from None
    return {
        "experiment": config.run.experiment,
        "name": config.run.name,
        "seeds": list(config.study.seeds),
        **findings,
        "seconds": round(time.perf_counter() - started, 1),
    }


def report_study(summary: Mapping[str, Any], folder: RunFolder) -> None:
    """Print what was found and where it lies."""
    for sentence in summary["says"]:
        print(sentence)
    print(
        f"{summary['seconds']:.0f} s. Figure {folder.figure_file}, numbers {folder.numbers_file},"
    )
    print(f"all of it in the run folder {folder.path}.")


def settings_of(config: Config, kind: type[Settings]) -> Settings:
    """The study's own settings as its dataclass."""
    settings = OmegaConf.to_object(config.study)
    assert isinstance(settings, kind)
    return settings


def check_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    """Refuse a size that does not fit another one, before any work.

    Args:
        name: of the one, without `study.`.
        value: its own.
        limit_name: of the other.
        limit: the most that fits.

    Raises:
        ConfigError: if it is larger.
    """
    if value > limit:
        raise ConfigError(
            f"`study.{name}` does not fit `study.{limit_name}`. Got {value} and {limit}. Choose "
            f"{limit} at most, or a larger `study.{limit_name}`."
        )


def check_one_each(name: str, values: Sequence[Any], owners: Sequence[str]) -> None:
    """Refuse a list that has not one entry for each of so many things, before any work.

    Args:
        name: of the list, without `study.`.
        values: it.
        owners: what the entries belong to.

    Raises:
        ConfigError: if it is shorter or longer.
    """
    if len(values) != len(owners):
        places = ",".join("…" * len(owners))
        raise ConfigError(
            f"`study.{name}` must have one entry for each of {', '.join(owners)}. "
            f"Got {list(values)}. Write `study.{name}=[{places}]`."
        )


def rows_of(
    rows: Sequence[dict[str, Any]], what: str | None = None, **columns: Any
) -> list[dict[str, Any]]:
    """The rows about `what`, or about anything, that have these values, in their order."""
    wanted = columns if what is None else {"what": what, **columns}
    return [row for row in rows if all(row.get(name) == v for name, v in wanted.items())]


def save_numbers(folder: RunFolder, numbers: Sequence[Number]) -> None:
    """Write `numbers.csv`: the rows may differ in their columns, what one lacks stays empty."""
    columns = list(dict.fromkeys(name for row in numbers for name in row))
    with folder.numbers_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(numbers)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds (0 for one seed), and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}
