"""What a state dict must be to fit an optimizer, checked before anything is touched."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, listed
from .hyperparameters import Hyperparameter, number_of
from .settings import Setting
from .state import params_of

#: What a HyperOptimizer adds to the state dict of the optimizer it wraps.
PARTS = (
    *("steps", "raw", "groups", "rhythm", "bounds", "carried", "overhead", "rule", "safeguards"),
    "outer_loss",
)


def check_checkpoint(
    state_dict: Any,
    optimizer: torch.optim.Optimizer,
    hyperparameters: Mapping[str, Hyperparameter],
    rule: torch.optim.Optimizer | None,
) -> None:
    """Raise `CheckpointError` unless groups, buffers, hyperparameters and outer rule fit."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError(
            "This is not an optimizer's state dict: it has no `state` and `param_groups`. "
            "Pass what `state_dict()` of a HyperOptimizer or a torch optimizer returned."
        )
    saved = state_dict["param_groups"]
    sizes, live_sizes = (
        [len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups)
    )
    if sizes != live_sizes:
        raise CheckpointError(
            f"The checkpoint has param groups of {sizes} parameters, and this optimizer of "
            f"{live_sizes}. Build the model and optimizer that wrote it."
        )
    params = params_of(optimizer)
    keys = [key for group in saved for key in group["params"]]
    for key, param in zip(keys, params, strict=True):
        _check_buffers(key, state_dict["state"].get(key, {}), param)
    _check_held(saved, optimizer.param_groups)
    own = state_dict.get("hypertorch")
    if own is not None:
        _check_parts(own)
        _check_where_learned(own["groups"]["learned_in"], hyperparameters)
        _check_hyperparameters(own["raw"], hyperparameters)
        if rule is not None:
            _check_rule(own["rule"], rule)


def load_outer_loss(outer_loss: Any, state: Any) -> None:
    """Let an outer loss go on where its state was taken, if it has one.

    Raises:
        CheckpointError: a `ValidationLoss` cannot, and is left untouched.
    """
    load = getattr(outer_loss, "load_state_dict", None)
    if load and state is not None:
        load(state)


def _check_buffers(key: Any, buffers: Mapping[str, Any], param: Tensor) -> None:
    for name, value in buffers.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != param.shape:
            raise CheckpointError(
                f"`{name}` of parameter {key} has shape {tuple(value.shape)} in the checkpoint, "
                f"and the parameter {tuple(param.shape)}. Build the model that wrote it."
            )


def _check_held(saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]]) -> None:
    for number, (there, here) in enumerate(zip(saved, live, strict=True)):
        for key, held in here.items():
            if not isinstance(held, Hyperparameter):
                continue
            value = number_of(there.get(key))
            if value is None or value.shape != held().shape:
                found = f"{there.get(key)!r}" if value is None else f"shape {tuple(value.shape)}"
                raise CheckpointError(
                    f"`{key}` of group {number} has {found} in the checkpoint, and the "
                    f"Hyperparameter there is of shape {tuple(held().shape)}. Build the optimizer "
                    "that wrote it."
                )


def _check_parts(own: Mapping[str, Any]) -> None:
    missing = set(PARTS) - set(own)
    if missing:
        raise CheckpointError(
            f"The checkpoint's `hypertorch` part lacks {listed(missing)}. "
            "Pass the whole of what `state_dict()` returned."
        )


def _check_where_learned(
    saved: Mapping[str, list[bool]], hyperparameters: Mapping[str, Hyperparameter]
) -> None:
    for name, there in saved.items():
        setting = hyperparameters.get(name)
        if isinstance(setting, Setting) and setting.learned_in != there:
            before, now = (
                [g for g, is_learned in enumerate(each) if is_learned]
                for each in (there, setting.learned_in)
            )
            raise CheckpointError(
                f"`{name}` was learned in the param groups {before} of the checkpoint, and is in "
                f"{now} here: one that starts at 0 beside others above 0 has none of it. Let the "
                "same groups start at 0."
            )


def _check_rule(saved: Mapping[str, Any], rule: torch.optim.Optimizer) -> None:
    settings, live = (
        set().union(*groups) - {"params"} for groups in (saved["param_groups"], rule.param_groups)
    )
    if settings != live:
        raise CheckpointError(
            f"The checkpoint's outer rule has the settings {listed(settings)}, and this one "
            f"{listed(live)}. Pass the same `outer`."
        )


def _check_hyperparameters(
    raw: Mapping[str, Tensor], hyperparameters: Mapping[str, Hyperparameter]
) -> None:
    if list(raw) != list(hyperparameters):
        raise CheckpointError(
            f"The checkpoint learned {', '.join(raw)}, and this optimizer learns "
            f"{', '.join(hyperparameters)}. Pass the same `learn`, in the same order."
        )
    for name, hyperparameter in hyperparameters.items():
        if raw[name].shape != hyperparameter.raw.shape:
            raise CheckpointError(
                f"`{name}` has raw shape {tuple(raw[name].shape)} in the checkpoint, and "
                f"{tuple(hyperparameter.raw.shape)} here. Learn it at the same granularity."
            )
