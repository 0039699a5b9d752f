"""Hydra's complaints about a configuration, reworded: which file, which key, what to type."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from experiments.studies.schema import STUDIES

COMMAND_LINE = "command line"
also_known: list[type] = []  # dataclasses of configurations that are not `schema`'s
MAPPINGS = {  # what is to be said of one beyond its form
    "hyper.learn": " maps names to granularities: `hyper.learn.lr=group`, and "
    "`+hyper.learn.momentum=shared` for a name that is not there yet."
}
BEGINNINGS = (
    "Value",
    "Invalid",
    "Incompatible",
    "Cannot",
    "field",
)  # of OmegaConf's sentences about a value


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or that does not fit the others."""


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise inside into a `ConfigError` of one line.

    Args:
        folder: the folder of the configuration; its name prefixes the files that are blamed.
    """
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_missing_choice(error)) from None
    except OverrideParseException as error:
        raise ConfigError(_unreadable(error.override, folder)) from None
    except HydraException as error:
        raise ConfigError(_bad_setting(error, folder)) from None
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):  # what Hydra says of null
            raise
        raise ConfigError(
            f"{COMMAND_LINE}: `GROUP=null` chooses nothing from a group. Name a choice, or leave "
            "it out."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(_bad_yaml(error)) from None


def check_keys(config: DictConfig, prefix: str = "") -> None:
    """Refuse keys that no dataclass names (`+key=value` adds them past the schema).

    Args:
        config: a composed configuration.
        prefix: where it sits in the whole, as `"hyper."`.

    Raises:
        ConfigError: for the first such key.
    """
    known = getattr(OmegaConf.get_type(config), "__dataclass_fields__", None)
    for key in map(str, config):
        if known is not None and key not in known:
            raise ConfigError(f"{COMMAND_LINE}: {_unknown_key(f'{prefix}{key}', known)}")
        if isinstance(config._get_node(key), DictConfig):
            check_keys(config[key], f"{prefix}{key}.")


def did_you_mean(word: str, words: Iterable[str], prefix: str = "") -> str:
    """` Did you mean `…`?` for a close word, else the list of those there are, each prefixed."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f" Did you mean `{prefix}{close[0]}`?"
    return f" Available: {', '.join(prefix + name for name in words)}."


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [name for name in error.options or [] if not name.endswith("_schema")]
    close = difflib.get_close_matches(choice, options, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"No {group} is called `{choice}`.{hint} Available: {', '.join(options)}."


def _unreadable(override: str, folder: Path) -> str:
    """What to write instead of an argument; `ridge` alone is taken for a choice of a group."""
    files = sorted(folder.glob("*/*.yaml"))
    file = min(files, key=lambda file: (file.stem != override, file.stem != "digits"))
    example = f"`{file.parent.name}={file.stem}`"
    return f"{COMMAND_LINE}: cannot read `{override}`. Write KEY=VALUE, such as {example}."


def _bad_setting(error: HydraException, folder: Path) -> str:
    cause = error.__cause__
    text = f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    place = re.match(r"In '(?P<file>[^']+)'", text)
    where = f"{folder.name}/{place['file']}.yaml" if place else COMMAND_LINE
    key = re.search(r"full_key: (\S+)", text)
    if key is None:
        return f"{where}: {_first_line(text)}"
    if re.search(r"Key '.*' (is )?not in ", text):
        group, _, choice = place["file"].partition("/") if place else ("", "", "")
        if group in schema.TRAINING and f"object_type={schema.StudyRunConfig.__name__}" in text:
            option = f"{group}={choice}"
            return f"{COMMAND_LINE}: this experiment does not use `{group}`. Leave `{option}` out."
        added = re.search(r"use \+(.+)", text)  # Hydra's hint: the whole override
        is_open = "object_type=dict" in text and key[1].count(".") > 1  # a dict within a group
        if added and is_open:
            fits = added[1].startswith((f"{key[1]}=", f"{key[1]}."))  # or it sets another key too
            setting = added[1] if fits else f"{key[1]}=…"
            return f"{where}: `{key[1]}` has not been set so far. To add it: `+{setting}`."
        return f"{where}: {_unknown_key(key[1], _siblings(text))}"
    return f"{where}: `{key[1]}`{_of_another_kind(key[1], text) or f': {_complaint(text)}'}"


def _of_another_kind(key: str, text: str) -> str | None:
    """What to write if the value is to be a mapping or a list, and is not."""
    found = re.search(r"Cannot (merge|assign) .*", text)
    if found and re.search(r"to Dict\[|with ListConfig", found[0]) and "Dict[" in text:
        return MAPPINGS.get(key, f" maps names to values: `{key}.NAME=VALUE`.")
    is_list = found and re.search(r"reference_type=(List|Tuple)", text)
    if is_list or "is not a ListConfig, list or tuple" in text:
        return f" is a list: `{key}=[…]`."
    return None


def _unknown_key(full_key: str, known: Collection[str]) -> str:
    parent, dot, key = full_key.rpartition(".")
    if not known:
        return f"unknown key `{full_key}`. This experiment has no `{parent}`."
    names = [name for name in known if not name.startswith("_")]
    return f"unknown key `{full_key}`.{did_you_mean(key, names, parent + dot)}"


def _siblings(text: str) -> list[str]:
    """The fields of the dataclass that the message names as the object's type."""
    name = re.search(r"object_type=(\w+)", text)
    choices = [*schema.CHOICES.values(), schema.RUNS, STUDIES]
    nodes = [schema.Config, *also_known, *(node for group in choices for node in group.values())]
    fields: dict[str, Any] = next(
        (vars(node)["__dataclass_fields__"] for node in nodes if name and node.__name__ == name[1]),
        {},
    )
    return list(fields)


def _complaint(text: str) -> str:
    """OmegaConf's sentence about a value, from among Hydra's lines around it."""
    lines = [line.strip() for line in text.splitlines()]
    sentences = [line for line in lines if line.startswith(BEGINNINGS)]
    return (sentences or [_first_line(text)])[0].rstrip(".") + "."


def _bad_yaml(error: yaml.YAMLError) -> str:
    return "Not YAML: " + " ".join(str(error).split()) + "."


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") + "."
