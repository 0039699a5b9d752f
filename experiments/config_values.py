"""Values that have the right type and mean nothing: refused before anything is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import ListConfig, OmegaConf

from experiments.config_errors import ConfigError, did_you_mean
from experiments.schema import Config

COUNTS = ("run.epochs", "run.evaluate_every", "run.checkpoint_every", "run.threads")
MAY_BE_EMPTY = ("hidden", "short_windows")  # of a study: then there is less to do
ANY_NUMBER = ("seeds",)  # of a study


def check_values(config: Config) -> None:
    """Refuse a run without steps, a number that is none, and a folder that is not the run's own.

    Args:
        config: of the run.

    Raises:
        ConfigError: for the first such value.
    """
    check_finite(config)
    check_least(config, COUNTS, 1)
    for key in ("experiment", "name"):
        _check_folder_name(f"run.{key}", config.run[key])
    _check_betas(config)
    if config.study is not None:
        _check_study(config.study)


def check_finite(config: Any) -> None:
    """Refuse nan and infinity anywhere in a configuration.

    Args:
        config: an OmegaConf node.

    Raises:
        ConfigError: for the first of them.
    """
    for key, value in _leaves(OmegaConf.to_container(config, resolve=True), ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"`{key}` is no finite number. Got {value}. Give it one.")


def check_least(config: Any, keys: Sequence[str], least: int, prefix: str = "") -> None:
    """Refuse what lies below the least value that makes sense.

    Args:
        config: an OmegaConf node; keys that it lacks and values of None are passed over.
        keys: of numbers and of lists of them, dotted.
        least: the smallest that is allowed.
        prefix: where the node sits in the whole, as `"tier.size."`.

    Raises:
        ConfigError: for the first that is smaller.
    """
    for key in keys:
        _check_numbers(config, key, prefix, lambda value: value >= least, f"{least} or more")


def check_positive(config: Any, keys: Sequence[str], prefix: str = "") -> None:
    """Refuse what is not above 0, as numbers must be whose logarithm is taken.

    Args:
        config: an OmegaConf node; keys that it lacks and values of None are passed over.
        keys: of numbers and of lists of them, dotted.
        prefix: where the node sits in the whole, as `"tier.size."`.

    Raises:
        ConfigError: for the first that is 0 or below.
    """
    for key in keys:
        _check_numbers(config, key, prefix, lambda value: value > 0, "a number above 0")


def _check_numbers(
    config: Any, key: str, prefix: str, is_possible: Callable[[float], bool], choice: str
) -> None:
    found = OmegaConf.select(config, key)
    for value in found if isinstance(found, ListConfig) else [found]:
        if value is not None and not is_possible(value):
            raise ConfigError(f"`{prefix}{key}` is too small. Got {value}. Choose {choice}.")


def check_names(key: str, names: Collection[Any], known: Collection[str] | None = None) -> None:
    """Refuse an empty list, and a name in it that nothing has.

    Args:
        key: of the setting.
        names: the list.
        known: those there are; None takes all.

    Raises:
        ConfigError: if it is empty, or for the first such name.
    """
    if not names:
        hint = f" Available: {', '.join(known)}." if known else ""
        raise ConfigError(f"`{key}` is empty: there is nothing to run. Name at least one.{hint}")
    for name in names:
        if known is not None and name not in known:
            raise ConfigError(f"`{key}`: there is no `{name}`.{did_you_mean(name, known)}")


def make_folder(path: Path, key: str) -> None:
    """Make a folder that a setting decides about, unless it is there.

    Args:
        path: of the folder.
        key: of the setting, as `"run.root"`.

    Raises:
        ConfigError: if the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"No folder can be made at `{path}`: {error.strerror}. Choose another `{key}`."
        ) from None


def _check_betas(config: Any) -> None:
    betas = OmegaConf.select(config, "optimizer.betas")
    if betas is not None and len(betas) != 2:
        raise ConfigError(
            f"`optimizer.betas` must be two numbers. Got {betas}. Write `optimizer.betas=[…,…]`."
        )


def _check_study(study: Any) -> None:
    """Refuse empty lists, and whole numbers below 1 or what the study's `least` has instead."""
    least = getattr(OmegaConf.get_type(study), "least", {})
    for key, value in study.items():
        values = value if isinstance(value, ListConfig) else [value]
        if not values and key not in MAY_BE_EMPTY:
            raise ConfigError(f"`study.{key}` is empty. Name at least one: `study.{key}=[…]`.")
        if key not in ANY_NUMBER and all(isinstance(one, int) for one in values):
            check_least(study, (key,), least.get(key, 1), "study.")


def _check_folder_name(key: str, name: str) -> None:
    path = PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"`{key}` must name a folder of its own. Got `{name}`. Choose one, such as `default`."
        )


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key; those of a list share its key."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _leaves(value, prefix)
    else:
        yield prefix, node
