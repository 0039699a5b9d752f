"""The device of a run: chosen by name, and waited for before a clock is read."""

from __future__ import annotations

import torch

from experiments.config_errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device that `run.device` names.

    Args:
        name: of torch's, or "auto": CUDA where there is one.

    Raises:
        ConfigError: if nothing can be put there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # the second without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"`run.device` cannot be used here. Got `{name}`: {reason}. Choose `auto` or `cpu`."
        ) from error
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
