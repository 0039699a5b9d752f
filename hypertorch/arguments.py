"""What a HyperOptimizer accepts, checked before anything is touched."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .double_backward import check_modules
from .dynamics import Dynamics, check_learnable
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    check_count,
    did_you_mean,
    kind_of,
    listed,
)
from .hypergradients import Engine, FiniteDifferences
from .hyperparameters import Hyperparameter, held_as
from .param_groups import silent_unless, starting_values
from .safeguards import Safeguards
from .settings import Setting
from .wrapper import OptimizerWrapper

#: Where the outer rule keeps a setting, in its own units: guard rails, far outside what is useful.
BOUNDS = {"lr": (1e-8, 10.0), "weight_decay": (1e-7, 10.0)}


def check_pieces(
    optimizer: Any,
    model: Any,
    outer_loss: Any,
    outer: Any,
    engine: Any,
    writer: Any = None,
    safeguards: Any = None,
) -> None:
    """Raise unless each piece is the kind of object it should be."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"`optimizer` must be a torch.optim.Optimizer. Got {type(optimizer).__name__}. "
            "Build one first: torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise ArgumentError(
            f"`optimizer` is a {type(optimizer).__name__} already. Pass the bare one it wraps, "
            "`optimizer.optimizer`, or build a new one."
        )
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"`model` must be a torch.nn.Module. Got {type(model).__name__}.")
    if outer is not None and not callable(outer):
        raise ArgumentTypeError(
            f"`outer` must build an optimizer from raw tensors. Got {type(outer).__name__}. "
            "Pass functools.partial(torch.optim.Adam, lr=0.05), or None to switch learning off."
        )
    if outer is not None:
        check_outer_loss(outer_loss)
    if engine is not None and not isinstance(engine, Engine):
        raise ArgumentTypeError(
            f"`engine` must be an engine such as Unroll(). Got {kind_of(engine)}."
        )
    if isinstance(engine, FiniteDifferences) and engine.entries is not None:
        raise ArgumentError(
            f"`FiniteDifferences(entries={engine.entries})` leaves the others out, and nothing is "
            "learned of them. Leave `entries` to `hypergradient`."
        )
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise ArgumentTypeError(
            f"`writer` must have an `add_scalar`. Got {kind_of(writer)}. "
            "Pass torch.utils.tensorboard.SummaryWriter(folder)."
        )
    if safeguards is not None and not isinstance(safeguards, Safeguards):
        raise ArgumentTypeError(
            f"`safeguards` must be a Safeguards. Got {kind_of(safeguards)}. "
            "Pass Safeguards(patience=20) or the like, or None for the default."
        )
    _check_gradients_are_dense(model)
    if outer is not None and (engine is None or engine.differentiates_twice):
        check_modules(model)


def check_options_besides(options: Mapping[str, Any], wrapper: type, own: set[str]) -> None:
    """Raise unless what `from_any_start` got besides its own arguments is for `wrapper`."""
    known = [name for name in inspect.signature(wrapper).parameters if name not in own]
    for name in options.keys() - known:
        raise ArgumentTypeError(
            f"`from_any_start` has no option `{name}`.{did_you_mean(name, known, own)} Options are "
            f"{listed(known)}. The outer loss is made of `outer_criterion`."
        )


def both_learned(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of the options of `from_any_start` how η and λ are learned, in this order.

    Raises:
        ArgumentError: something else is to be learned.
        UnsupportedError: one is to be learned finer than by param groups.
    """
    learn = options.pop("learn", ("lr", "weight_decay"))
    names = {learn} if isinstance(learn, str) or not isinstance(learn, Iterable) else set(learn)
    if names != {"lr", "weight_decay"}:
        raise ArgumentError(
            "`from_any_start` learns `lr` and `weight_decay`, both and nothing else. "
            f"Got {learn!r}. For more, use `HyperOptimizer` with `search_lr`."
        )
    if isinstance(learn, Mapping):
        for name, granularity in learn.items():
            if granularity in ("tensor", "element") and "engine" not in options:
                raise UnsupportedError(
                    f'`from_any_start` learns `{name}` per "group", or "shared". '
                    f'Got "{granularity}". For that pass `engine=FirstOrder()`, or `Unroll()`.'
                )
        return {"learn": {name: learn[name] for name in ("lr", "weight_decay")}}
    return {"learn": ("lr", "weight_decay")}


def check_outer_loss(outer_loss: Any) -> None:
    """Raise unless E is a callable that takes no arguments, as far as one can see."""
    if not callable(outer_loss) or isinstance(outer_loss, type):
        raise ArgumentTypeError(
            "`outer_loss` must be a callable that returns a scalar tensor. "
            f"Got {kind_of(outer_loss)}. Pass ValidationLoss(model, criterion, val_loader)."
        )
    if missing := _arguments_needed(outer_loss):
        raise ArgumentTypeError(
            "`outer_loss` is called without arguments. "
            f"{getattr(outer_loss, '__name__', type(outer_loss).__name__)} needs "
            f"{' and '.join(f'`{name}`' for name in missing)}. Pass a closure without arguments, "
            "such as ValidationLoss(model, criterion, val_loader)."
        )


def _arguments_needed(function: Any) -> list[str]:
    """Return the arguments without a default; none where no signature can be had."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:  # what a decorator has wrapped may be given its arguments by it
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):
        return []
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        name
        for name, argument in signature.parameters.items()
        if argument.default is argument.empty and argument.kind not in optional
    ]


def _check_gradients_are_dense(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise UnsupportedError(
                f"`{name}` ({type(module).__name__}) has sparse gradients, and Φ takes "
                "dense ones. Build it with `sparse=False`."
            )


def check_rhythm(window: Any, update_every: Any, steps_per_epoch: Any) -> tuple[int, int]:
    """Return the window's length and the steps between outer updates, as whole numbers."""
    if update_every == "epoch":
        if steps_per_epoch is None:
            raise ArgumentError(
                '`update_every="epoch"` needs `steps_per_epoch`. Pass len(train_loader).'
            )
        update_every = whole("steps_per_epoch", steps_per_epoch)
    elif isinstance(update_every, str):
        raise ArgumentError(
            f'`update_every` must be a number of steps or "epoch". Got {update_every!r}.'
            f"{did_you_mean(update_every, ['epoch'])}"
        )
    window, update_every = whole("window", window), whole("update_every", update_every)
    if window > update_every:
        raise ArgumentError(
            f"A window of {window} steps does not fit into {update_every} steps between updates. "
            "Shorten `window` or lengthen `update_every`."
        )
    return window, update_every


def whole(name: str, number: Any) -> int:
    """Return a number of steps once it is one."""
    check_count(f"`{name}`", number, " of steps")
    return cast(int, number)


def learned(
    learn: Any, optimizer: torch.optim.Optimizer, dynamics: Dynamics, is_learning: bool
) -> dict[str, Hyperparameter]:
    """Return the hyperparameters that `learn` asks for, by name."""
    entries = _entries(learn)
    if is_learning and not entries:
        raise ArgumentError('`learn` is empty. Name a setting, such as "lr", or pass `outer=None`.')
    found: dict[str, Hyperparameter] = {}
    for name, what in entries:
        if name in found:
            raise ArgumentError(
                f"`{name}` is learned twice. Give each Hyperparameter a `name` of its own."
            )
        # What is learned as `lr` is divided at a rollback, so it must be the optimizer's own.
        is_claimed = isinstance(learn, Mapping) or (name == "lr" and is_learning)
        if is_claimed and isinstance(what, Hyperparameter):
            _check_is_used(name, what, optimizer, dynamics)
        with silent_unless(is_learning):
            found[name] = (
                what
                if isinstance(what, Hyperparameter)
                else _setting(name, what, optimizer, dynamics)
            )
    for name, hyperparameter in found.items():
        hyperparameter.name = name
    return found


def _entries(learn: Any) -> list[tuple[str, Any]]:
    if isinstance(learn, (str, Hyperparameter)):
        learn = (learn,)
    if isinstance(learn, Mapping):
        return list(learn.items())
    if not isinstance(learn, Iterable):
        raise ArgumentTypeError(f"`learn` must hold names. Got {type(learn).__name__}.")
    found = [_entry(item) for item in learn]
    is_ordered = not isinstance(learn, (set, frozenset))
    return found if is_ordered else sorted(found, key=lambda entry: entry[0])


def _entry(item: Any) -> tuple[str, Any]:
    if isinstance(item, Hyperparameter):
        return item.name, item
    if isinstance(item, str):
        return item, "group"
    raise ArgumentTypeError(
        f"`learn` holds names of settings and Hyperparameter objects. Got {item!r}."
    )


def _check_is_used(
    name: str, what: Hyperparameter, optimizer: torch.optim.Optimizer, dynamics: Dynamics
) -> None:
    """Raise if `name` is a setting of the optimizer, in whose place `what` would not be used."""
    read = {*dynamics.constraints, *dynamics.flags}
    if name in read and not held_as(what, optimizer.param_groups) & read:
        owner = type(optimizer).__name__
        raise ArgumentError(
            f"`{name}` is a setting of {owner}, which would not use the Hyperparameter given for "
            f"it. To learn {owner}'s own, let it start in the optimizer and say how many there "
            f'are: learn={{"{name}": "group"}}. If your loss uses the Hyperparameter, give it '
            "another name."
        )


def _setting(
    name: str, granularity: Any, optimizer: torch.optim.Optimizer, dynamics: Dynamics
) -> Setting:
    owner = type(optimizer).__name__
    check_learnable(owner, dynamics, name)
    if name == "dampening" and any(group.get("nesterov") for group in optimizer.param_groups):
        raise UnsupportedError(
            f"{owner} with `nesterov=True` has no dampening to learn: torch requires it to be 0."
        )
    return Setting(
        name,
        starting_values(owner, optimizer.param_groups, name),
        [[p.shape for p in group["params"]] for group in optimizer.param_groups],
        dynamics.constraints[name],
        granularity,
        BOUNDS.get(name),
    )


def place(hyperparameters: Iterable[Hyperparameter], optimizer: torch.optim.Optimizer) -> bool:
    """Move hyperparameters to the device and precision of the first weight, at least float32.

    Returns:
        Whether one was elsewhere.
    """
    weight = next(p for group in optimizer.param_groups for p in group["params"])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    moved = [hyperparameter.to(weight.device, dtype) for hyperparameter in hyperparameters]
    return any(moved)


def check_loss(loss: Any, what: str, has_graph: bool = True) -> None:
    """Raise unless `loss` is a real scalar tensor, with a graph unless that is not asked for."""
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(
            f"{what} must be a tensor. Got {type(loss).__name__}. "
            "Pass the tensor that the criterion returned, not its `.item()`."
        )
    if loss.numel() != 1:
        raise ArgumentError(
            f"{what} must be a scalar. Got shape {tuple(loss.shape)}. Reduce it: `loss.mean()`."
        )
    if loss.is_complex():
        raise ArgumentError(
            f"{what} must be real. Got {loss.dtype}. Take its modulus or its real part: "
            "`loss.abs()`, `loss.real`."
        )
    if has_graph and not loss.requires_grad:
        raise ArgumentError(
            f"{what} has no graph. Compute it from the model, outside `torch.no_grad()` and "
            "without `.detach()`."
        )


def new_group(param_group: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Return a new param group with a list of its parameters, and these without any names."""
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise ArgumentTypeError("A param group must be a dict with the key `params`.")
    params = param_group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    return {**param_group, "params": params}, [p[1] if isinstance(p, tuple) else p for p in params]
