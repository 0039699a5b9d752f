"""Files that are there as a whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A name to write under, no other process's; once that has been done, it becomes `file`.

    What was written is removed if the block ends in an error, and `file` is as it was.

    Args:
        file: in a folder that exists.
    """
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
