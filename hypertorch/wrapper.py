"""A torch optimizer around another one: what torch expects of an optimizer, forwarded.

References to `state` and `param_groups` are never shared but looked up, so that `load_state_dict`,
which replaces them, and pickle and deepcopy keep the two together.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .state import params_of

P = ParamSpec("P")
R = TypeVar("R")


def hooked(step: Callable[P, R]) -> Callable[P, R]:
    """Return an optimizer's `step` with its hooks and, while a profile is taken, its label there.

    Torch wraps every `step` so, and labels it always, at 4 % of a small network's step. Where a
    subclass has a `step` of its own, that one has the hooks.
    """
    by_torch = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        self: Any = args[0]
        has_hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        is_seen = bool(has_hooks) or torch.autograd._profiler_enabled()
        return (by_torch if is_seen and type(self).step is eager else step)(*args, **kwargs)

    eager: Any = torch._disable_dynamo(run)  # a compiled training step runs this as it is written
    eager.hooked = True  # torch need not wrap it
    return eager


class OptimizerWrapper(torch.optim.Optimizer):
    """An Optimizer whose groups, state, defaults and hooks are those of `optimizer`.

    Args:
        optimizer: the wrapped one.
    """

    #: Attributes that belong to the process, left out of copies and pickles.
    _transient: tuple[str, ...] = ("step",)

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._attach()

    def _attach(self) -> None:
        """Become a torch Optimizer around the wrapped one; also after a copy or unpickling."""
        super().__setstate__({})
        for hooks in [name for name in vars(self.optimizer) if name.endswith("_hooks")]:
            setattr(self, hooks, getattr(self.optimizer, hooks))

    @property
    def state(self) -> Any:
        """The wrapped optimizer's buffers, as of the start of an open window: call `close` before.

        Where it is replaced, an open window is closed.
        """
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.close()
        self.optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups, with the live parameters."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def close(self) -> None:
        """Let the wrapped optimizer hold what training has made of it."""

    def _params(self) -> list[Tensor]:
        return params_of(self.optimizer)

    def _wrapped_step(self) -> None:
        """Call the wrapped step without its hooks: the wrapper's own step has run them."""
        step = type(self.optimizer).step
        getattr(step, "__wrapped__", step)(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in self._transient}
        return {k: v for k, v in kept.items() if not k.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(dict.fromkeys(self._transient[1:]), **state)
        self._attach()
