"""The optimizer of a run, bare or wrapped to learn; one training step; the live λ and η."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.config_errors import ConfigError, did_you_mean
from experiments.loaders import TensorLoader
from experiments.schema import AnyStartConfig, Config, FixedConfig, HyperConfig, Schedule

#: How many epochs a trapezoid stays at 1, and how much of a shorter run.
HELD_EPOCHS, HELD_SHARE = 4, 0.8

#: Classes of torch.optim that cannot move λ and η: they need matrices, sparse gradients, a closure.
NO_RULES = ("Optimizer", "Muon", "SparseAdam", "LBFGS")


def build(node: Any, *args: Any, **extra: Any) -> Any:
    """Call what `_target_` of a configuration node names, with its other keys as arguments."""
    settings: dict[Any, Any] = dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    target = get_object(settings.pop("_target_"))
    return target(*args, **extra, **settings)


def bare_optimizer(node: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration node, for a model's parameters.

    Raises:
        ConfigError: torch refuses its settings.
    """
    try:
        return cast(torch.optim.Optimizer, build(node, model.parameters()))
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"command line: `optimizer`: {error}.") from error


def wrapped(
    bare: torch.optim.Optimizer,
    config: Config,
    model: nn.Module,
    train_loader: TensorLoader,
    validation_loader: TensorLoader,
    writer: Any = None,
) -> torch.optim.Optimizer:
    """The optimizer that `hyper` chooses, around a bare one, for a cross-entropy.

    `hypertorch.from_any_start`, which makes its trials on the first batches of both loaders; a
    `HyperOptimizer` that learns what `hyper.learn` names; or the bare optimizer (`hyper=none`).

    Args:
        bare: of `config.optimizer`.
        config: of the run.
        model: whose parameters are trained; at its initial weights.
        train_loader: its length is what `hyper.update_every=epoch` means.
        validation_loader: what λ and η are learned on.
        writer: a SummaryWriter, or None.

    Returns:
        The optimizer.

    Raises:
        ConfigError: if `hyper.outer` names no rule, or `hyper.learn` nothing.
    """
    hyper, epoch = config.hyper, len(train_loader)
    if OmegaConf.get_type(hyper) is FixedConfig:
        return bare
    optional = {"window": hyper.window, "update_every": hyper.update_every}
    options = {name: value for name, value in optional.items() if value is not None}
    options |= {"steps_per_epoch": epoch, "writer": writer}
    if OmegaConf.get_type(hyper) is AnyStartConfig:
        loaders, steps = (train_loader, validation_loader), config.run.epochs * epoch
        return hypertorch.from_any_start(bare, model, cross_entropy, *loaders, steps, **options)
    if not hyper.learn:
        raise ConfigError("`hyper.learn` is empty. Name a setting, or choose `hyper=none`.")
    return hypertorch.HyperOptimizer(
        bare,
        model,
        outer_loss=hypertorch.ValidationLoss(model, cross_entropy, validation_loader),
        learn=dict(hyper.learn),
        outer=outer_rule(hyper),
        **options,
    )


def outer_rule(hyper: HyperConfig) -> Callable[..., torch.optim.Optimizer]:
    """The rule that moves λ and η: hypertorch's own, or a class of torch.optim by its name.

    `hyper.outer_lr` is the `max_step` of the one and the `lr` of the others.

    Raises:
        ConfigError: if there is no such rule.
    """
    if hyper.outer == "GatedSign":
        rule, rate = cast(Any, hypertorch.GatedSign), "max_step"
    else:
        rule, rate = _torch_rule(hyper.outer), "lr"
    return rule if hyper.outer_lr is None else functools.partial(rule, **{rate: hyper.outer_lr})


def _torch_rule(name: str) -> Any:
    names = [other for other in dir(torch.optim) if other[0].isupper() and other not in NO_RULES]
    if name not in names:
        hint = did_you_mean(name, ["GatedSign", *names])
        raise ConfigError(f"`hyper.outer` names no rule. Got `{name}`.{hint}")
    return getattr(torch.optim, name)


def training_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step on the weights; a wrapped optimizer also learns λ and η from it."""
    if isinstance(optimizer, hypertorch.HyperOptimizer):
        optimizer.step(loss)
    else:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def hyperparameter_values(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """λ and η, and what else is learned: the mean over groups or tensors, before any schedule."""
    values = dict.fromkeys(("lr", "weight_decay"), 0.0)
    group = optimizer.param_groups[0]
    values.update(lr=group.get("initial_lr", group["lr"]), weight_decay=group["weight_decay"])
    if isinstance(optimizer, hypertorch.HyperOptimizer):
        learned = optimizer.hyperparameters.items()
        values |= {name: hyperparameter().mean().item() for name, hyperparameter in learned}
    return {name: float(value) for name, value in values.items()}


def cost_of(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """What the run cost so far, counted in plain training steps."""
    return optimizer.cost if isinstance(optimizer, hypertorch.HyperOptimizer) else float(steps)


def rollbacks_of(optimizer: torch.optim.Optimizer) -> int:
    """How often the run was rolled back to its last good window."""
    return optimizer.rollbacks if isinstance(optimizer, hypertorch.HyperOptimizer) else 0


def close(optimizer: torch.optim.Optimizer) -> None:
    """Hand an open window back to the model."""
    if isinstance(optimizer, hypertorch.HyperOptimizer):
        optimizer.close()


def schedule_factor(schedule: Schedule, total: int, epochs: float, step: int) -> float:
    """schedule(t) of η_t = η · schedule(t): 1 at the first step, and 0 at `total`, if not constant.

    Args:
        schedule: constant, linear, half a cosine, or a trapezoid: linear after the first epochs.
        total: number of steps of the run.
        epochs: number of its epochs.
        step: t.

    Returns:
        A factor in [0, 1].
    """
    done = min(step / total, 1.0)
    if schedule is Schedule.linear:
        return 1.0 - done
    if schedule is Schedule.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule is Schedule.trapezoid:
        held = min(HELD_SHARE, HELD_EPOCHS / epochs)
        return min(1.0, (1.0 - done) / (1.0 - held))
    return 1.0
