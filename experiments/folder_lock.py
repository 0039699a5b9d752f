"""A folder that belongs to one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.config_errors import ConfigError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder/.lock`, a file that names this process.

    The system frees the lock with the process, however that ends. The file stays: were it removed,
    a process that has just opened it would hold a lock that nobody else sees.

    Args:
        folder: which exists.

    Raises:
        ConfigError: if a process holds it, this one too.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"A run is under way in {folder} (process {file.read()}). Wait, or choose another "
                "`run.name`."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
