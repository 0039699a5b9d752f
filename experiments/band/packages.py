"""Packages that only one method needs, imported when that method runs."""

from __future__ import annotations

import importlib
from typing import Any

from experiments.config_errors import ConfigError


def package(name: str) -> Any:
    """The imported package.

    Args:
        name: to import.

    Returns:
        The module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The package `{name}` is missing. Install what the benchmark compares with: "
            "pip install -c constraints.txt '.[band]'."
        ) from error
