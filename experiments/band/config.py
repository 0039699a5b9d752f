"""`load_band`: what one call of the benchmark is to do, composed from `configs/band/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.band.schema import CHOICES, NODES, BandConfig, SizeConfig, TaskConfig
from experiments.config import CONFIG_FOLDER, composed, given_keys
from experiments.config_errors import ConfigError, also_known, check_keys, did_you_mean
from experiments.config_values import check_finite, check_least, check_names, check_positive
from experiments.schema import Schedule

COUNTS = ("workers", "task.batch_size", "task.epochs", "task.evaluations", "task.together")
BASES = ("sgd", "adamw")
BAND_FOLDER = CONFIG_FOLDER / "band"


def load_band(overrides: list[str], folder: Path = BAND_FOLDER) -> BandConfig:
    """The configuration of one call, as `python -m experiments.band OVERRIDES` sees it.

    Args:
        overrides: Hydra overrides, e.g. `["tier=quick", "task=breast_cancer"]`.
        folder: where the groups `tier` and `task` are.

    Returns:
        A checked configuration.

    Raises:
        ConfigError: for an unknown key or choice, or a value of the wrong type or without meaning.
    """
    store = ConfigStore.instance()
    store.store(name="band", node=BandConfig)
    also_known[:] = dict.fromkeys([*also_known, *NODES])
    for group, choices in CHOICES.items():
        for choice, node in choices.items():
            store.store(group=group, name=f"{choice}_schema", node=node)
    config = composed("band", overrides, folder)
    check_keys(config)
    taken = {key for key in BandConfig.__dataclass_fields__ if key not in config} - {"defaults"}
    missing = sorted(taken | OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"command line: `{missing[0]}` has no value. Give it one.")
    tasks = [path.stem for path in (folder / "task").glob("*.yaml")]
    for name in config.tier.smaller:
        if name not in tasks:
            unknown = f"`tier.smaller`: no task is called `{name}`."
            raise ConfigError(f"{unknown}{did_you_mean(name, tasks)}")
    _let_the_command_line_win(config, overrides)
    check_finite(config)
    check_least(config, COUNTS, 1)
    for base in BASES:
        for key in (f"{base}.lr", f"{base}.weight_decay"):
            check_names(key, OmegaConf.select(config, key))
        check_positive(config, [f"{base}.lr"])
        check_least(config, [f"{base}.weight_decay"], 0)
    return cast(BandConfig, config)


def _let_the_command_line_win(config: DictConfig, overrides: list[str]) -> None:
    """Drop what `tier.smaller` has of a `tier.size.KEY` that was given, unless it was given too."""
    given = given_keys(overrides)
    for task, smaller in config.tier.smaller.items():
        with open_dict(smaller):
            for key in list(smaller):
                if f"tier.size.{key}" in given and f"tier.smaller.{task}.{key}" not in given:
                    del smaller[key]


def load_tasks(overrides: list[str], folder: Path = BAND_FOLDER) -> dict[str, TaskConfig]:
    """The tasks of a call by name: the one it chose, or all of its tier.

    Args:
        overrides: as for `load_band`.
        folder: as for `load_band`.

    Returns:
        The settings of each task.
    """
    config = load_band(overrides, folder)
    if config.task is not None:
        return {config.task.name: config.task}
    names = list(config.tier.tasks)
    check_names("tier.tasks", names)
    tasks = {name: load_band([*overrides, f"task={name}"], folder).task for name in names}
    if None in tasks.values():
        raise ConfigError("command line: `~task` leaves no task to run. Leave it out.")
    return tasks


def size_of(config: BandConfig, task: str) -> SizeConfig:
    """How much is run on a task: the tier's size, with what the tier has otherwise for it.

    A `tier.size.KEY` of the command line holds for every task, a `tier.smaller.TASK.KEY` for one.

    Args:
        config: of the call.
        task: its name.

    Returns:
        The size.

    Raises:
        ConfigError: if `tier.smaller` has a key that `tier.size` has not, for a bad value, and for
            a λ of 0 at an end of a box that is drawn from in the logarithm.
    """
    smaller: Any = config.tier.smaller.get(task, {})
    for key in smaller:
        if key not in SizeConfig.__dataclass_fields__:
            raise ConfigError(
                f"configs/band/tier/{config.tier.name}.yaml: unknown key "
                f"`smaller.{task}.{key}`.{did_you_mean(key, SizeConfig.__dataclass_fields__)}"
            )
    size = OmegaConf.merge(cast(Any, config.tier.size), smaller)
    check_least(size, ("grid_every",), 1, "tier.size.")
    check_least(size, ("random", "tpe"), 0, "tier.size.")
    check_names("tier.size.seeds", size.seeds)
    for key in ("start_lr", "start_weight_decay"):
        check_names(f"tier.size.{key}", OmegaConf.select(size, key))
        check_positive(size, [key], "tier.size.")
    check_names("tier.size.schedules", size.schedules, Schedule.__members__)
    if size.random or size.tpe:
        _check_ends(config)
    return cast(SizeConfig, size)


def _check_ends(config: BandConfig) -> None:
    """Refuse a λ of 0 where random search and TPE begin or end; the grid alone may have one."""
    for base in BASES:
        decays: list[float] = list(getattr(config, base).weight_decay)
        if not (decays[0] and decays[-1]):
            raise ConfigError(
                f"`{base}.weight_decay` begins or ends with 0, and searches draw between the "
                f"logarithms of its ends. Got {decays}. Choose numbers above 0 there, or set "
                "`tier.size.random=0` and `tier.size.tpe=0`."
            )
