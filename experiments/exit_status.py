"""How a command ends that cannot do its work: with one line on stderr and a status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import hypertorch
from experiments.config_errors import ConfigError
from experiments.resuming import Interrupted

BAD_INPUT, INTERRUPTED = 2, 130  # the second is the shells' own for Ctrl-C


@contextlib.contextmanager
def with_exit_status() -> Iterator[None]:
    """Exit with status 2 on bad input and 130 on Ctrl-C; anything else keeps its trace."""
    try:
        yield
    except (ConfigError, OSError, ModuleNotFoundError, hypertorch.HypertorchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        print("Interrupted; nothing was written since the last checkpoint.", file=sys.stderr)
        sys.exit(INTERRUPTED)
