"""`load_config`: the configuration of a run, composed from `configs/` and checked by the schema."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.config_errors import ConfigError, check_keys, explained
from experiments.config_values import check_values
from experiments.schema import CHOICES, RUNS, TRAINING, Config, StudyRunConfig
from experiments.studies.schema import STUDIES

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def register_schema() -> None:
    """Make the dataclasses known to Hydra: `schema`, and `<choice>_schema` in each group.

    The groups `run` and `study` have no files; there the dataclass is the choice itself.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, nodes in (("run", RUNS), ("study", STUDIES)):
        for name, node in nodes.items():
            store.store(group=group, name=name, node=node)
    for group, choices in CHOICES.items():
        for choice, node in choices.items():
            store.store(group=group, name=f"{choice}_schema", node=node)


def load_config(overrides: list[str], folder: Path = CONFIG_FOLDER) -> Config:
    """The configuration of one run, as `python -m experiments.run OVERRIDES` would see it.

    Args:
        overrides: Hydra overrides, e.g. `["experiment=digits", "optimizer.lr=0.01"]`.
        folder: where `config.yaml` and the groups are.

    Returns:
        A checked configuration (an OmegaConf node with the fields of `Config`).

    Raises:
        ConfigError: for an unknown key or choice, or a value of the wrong type.
    """
    register_schema()
    return checked(composed("config", overrides, folder))


def composed(name: str, overrides: list[str], folder: Path) -> DictConfig:
    """What Hydra makes of a configuration, also while it runs a command in the same process.

    Args:
        name: of the file or dataclass at the top.
        overrides: Hydra overrides.
        folder: where the files are.

    Raises:
        ConfigError: for an unknown key or choice, or a value of the wrong type.
    """
    hydra = GlobalHydra.instance()
    running = hydra.hydra  # the command's own, which composes by other folders
    hydra.clear()
    try:
        with explained(folder), initialize_config_dir(str(folder), version_base="1.3"):
            return compose(name, overrides)
    finally:
        hydra.hydra = running
        GlobalHydra.set_instance(hydra)


def given_keys(overrides: list[str]) -> set[str]:
    """The keys that a command line sets, `optimizer.lr` also in `optimizer={lr: 1}`.

    Args:
        overrides: Hydra overrides that it can read.

    Returns:
        Dotted keys, and the groups of which something is chosen.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {key for one in parsed for key in _keys(one.key_or_group, one.value())}


def _keys(key: str, value: Any) -> Iterator[str]:
    """The keys that one override sets: several if its value is a dictionary."""
    if not isinstance(value, dict):
        yield key
        return
    for name, below in value.items():
        yield from _keys(f"{key}.{name}", below)


def checked(config: DictConfig) -> Config:
    """The same configuration, once every key in it is known and every value is there and possible.

    Raises:
        ConfigError: for a key past the schema, a study without its experiment, a group without a
            choice, one that the study does not use, or a value that `check_values` refuses.
    """
    check_keys(config)
    _check_groups_have_a_choice(config, ["run"])
    _check_study_has_its_experiment(config)
    unused = _unused(config)
    _check_groups_have_a_choice(config, sorted(set(TRAINING) - unused))
    missing = sorted(OmegaConf.missing_keys(config) - unused)
    if missing:
        raise ConfigError(f"command line: `{missing[0]}` has no value. Give it one.")
    for group in sorted(unused):
        if not OmegaConf.is_missing(config, group):
            raise ConfigError(
                f"command line: `{config.run.experiment}` does not use `{group}`. Leave it out."
            )
    check_values(cast(Config, config))
    return cast(Config, config)


def _check_groups_have_a_choice(config: DictConfig, groups: Iterable[str]) -> None:
    """Refuse a group that `~` took away, though it may still hold what other groups set in it."""
    for group in groups:
        if not is_dataclass(OmegaConf.get_type(config, group)):
            raise ConfigError(f"command line: `{group}` has no value. Give it one.")


def _check_study_has_its_experiment(config: DictConfig) -> None:
    """Refuse a study that was chosen alone: its experiment brings what else it needs."""
    names = {kind: name for name, kind in STUDIES.items()}
    kind: Any = OmegaConf.get_type(config, "study")
    name, experiment = names.get(kind), OmegaConf.select(config, "run.experiment")
    is_study = OmegaConf.get_type(config, "run") is StudyRunConfig
    if name and not (is_study and STUDIES.get(experiment, kind) is kind):
        raise ConfigError(
            f"command line: `study={name}` alone lacks what its experiment brings. Write "
            f"`experiment={name}` instead."
        )


def _unused(config: DictConfig) -> set[str]:
    """The groups of the training loop that this run does without."""
    if config.study is None:
        return set()
    uses: tuple[str, ...] = getattr(OmegaConf.get_type(config.study), "uses", ())
    return set(TRAINING) - set(uses)
