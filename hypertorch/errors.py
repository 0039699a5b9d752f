"""What can go wrong, one class each; every error is also the builtin error a caller would expect.

A message says what is wrong, what was got, and what to do about it.
"""

import difflib
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable
from typing import Any


class HypertorchError(Exception):
    """The base of every error this package raises."""


class ArgumentError(HypertorchError, ValueError):
    """An argument has a value that cannot work."""


class ArgumentTypeError(HypertorchError, TypeError):
    """An argument is not the kind of object that is needed."""


class UnsupportedError(HypertorchError, NotImplementedError):
    """A request that cannot be differentiated correctly, refused by name."""


class WindowError(HypertorchError, RuntimeError):
    """A step that an open window cannot take."""


class CheckpointError(HypertorchError, ValueError):
    """A state dict that does not fit this optimizer."""


class DivergenceError(HypertorchError, ArithmeticError):
    """Training diverged again and again, although it was rolled back each time."""


class Diverged(Exception):
    """Training went wrong, as the message says. It never reaches a caller: it is rolled back."""


class Relapsed(Diverged):
    """The weights are hardly better than untrained ones; those of the last window may be so too."""


class SolverError(HypertorchError, ArithmeticError):
    """A linear system or a nested problem that a solver cannot solve as it stands."""


class HypertorchWarning(UserWarning):
    """Something a user should know once, and that does not stop the run."""


#: The modules whose lines tell a user nothing.
_INSIDE = re.compile(r"(hypertorch|torch|contextlib|functools)(\.|$)")


def warn(message: str) -> None:
    """Warn of the line outside this package, and outside torch, from which it was called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _INSIDE.match(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, HypertorchWarning, stacklevel=level)


def check_number(
    argument: str,
    number: Any,
    expected: str,
    holds: Callable[[Any], bool],
    kind: type = numbers.Real,
) -> None:
    """Raise unless an argument is such a number.

    Raises:
        ArgumentError: it is another one, or none.
    """
    if isinstance(number, bool) or not isinstance(number, kind) or not holds(number):
        raise ArgumentError(f"{argument} must be {expected}. Got {number!r}.")


def check_count(argument: str, number: Any, of: str = "") -> None:
    """Raise unless an argument is a whole number, at least 1."""
    check_number(argument, number, f"a whole number{of}, at least 1", lambda n: n >= 1, int)


def kind_of(what: object) -> str:
    """Return what to call something that was got: its type, or ``"the class Adam"``."""
    return f"the class {what.__name__}" if isinstance(what, type) else type(what).__name__


def listed(names: Iterable[str]) -> str:
    """Join names in alphabetical order: ``"dampening, lr, momentum"``."""
    return ", ".join(sorted(names))


def did_you_mean(name: str, available: Iterable[str], meant: Container[str] = ()) -> str:
    """Return `` Did you mean `x`?`` for the closest available name, or nothing for one `meant`."""
    if name in meant:
        return ""
    close = difflib.get_close_matches(name, list(available), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""
