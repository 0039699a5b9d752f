"""What stopping and going on need: Ctrl-C as a request, and the state of random numbers."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; the message says what the same command does next."""


class Interruption:
    """While entered, the first Ctrl-C only sets `requested`; a second one interrupts at once.

    A step that is under way is thus always finished before the checkpoint is written.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None


def rng_states() -> dict[str, Any]:
    """The states of torch's global generators, on the CPU and on each GPU."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_states(states: dict[str, Any]) -> None:
    """Go on with the random numbers that were due when `rng_states` was called."""
    torch.set_rng_state(states["cpu"].cpu())
    torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
