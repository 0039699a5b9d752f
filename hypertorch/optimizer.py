"""HyperOptimizer: a torch optimizer that learns its own λ while the weights train.

The only file in which the pieces meet: Φ, an engine, the outer rule, the safeguards, the monitor.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .checkpoint import check_checkpoint
from .double_backward import TwiceDifferentiable
from .dynamics import check_options, dynamics_of
from .errors import HypertorchWarning, WindowError
from .hypergradients import Engine, Unroll, Window
from .hyperparameters import Hyperparameter, Setting
from .monitor import Monitor
from .outer import GatedSign, OuterFactory
from .param_groups import LearnedGroups
from .safeguards import Diverged, Safeguards
from .state import Slots, leaving_no_trace, set_buffers

OuterLoss = Callable[[], Tensor]
Learn = Iterable[str | Hyperparameter] | Mapping[str, str | Hyperparameter]

#: What belongs to the process and not to the object, and is left out of copies and pickles.
_TRANSIENT = ("_slots", "_switches", "_open", "_monitor", "_writer", "step", "_finalizer")


class HyperOptimizer(torch.optim.Optimizer):
    r"""Wraps a torch optimizer and learns its settings on an outer loss while it trains.

    Every `update_every` steps, the first `window` of them are differentiated together,

        s_t = Φ_t(s_{t-1}, λ),   t = 1 … K,       dE/dλ = ∂_s E · ds_K/dλ + ∂_λ E,

    and the outer rule moves ρ, where λ = c(ρ): s is (weights, optimizer buffers), Φ one step of
    `optimizer`, λ what is in `learn`, K `window`, E `outer_loss`. The window's steps are the
    training steps themselves. The hypergradient is exact for the window; what λ did before it is
    not seen.

    It is a `torch.optim.Optimizer`: LR schedulers multiply (η_t = learned · schedule(t)), hooks,
    `state_dict`, pickle and deepcopy work. With `outer=None` it is bit-identical to `optimizer`.

    Args:
        optimizer: SGD, Adam, AdamW, NAdam, RAdam, RMSprop or Adagrad, or any with a registered Φ.
        model: the module that holds its parameters. Inside a window its parameter slots hold the
            differentiable fast weights; `parameters()`, `state_dict()`, copies and hooks work on.
        outer_loss: returns the outer loss, a scalar tensor computed from `model`: a
            `ValidationLoss`, or any callable without arguments.
        learn: names of float settings (`"lr"`, `"weight_decay"`, `"momentum"`, `"beta1"`, …) and
            `Hyperparameter` objects that the inner loss uses; or a mapping from a setting to how
            many there are ("shared", "group", "tensor", "element"; default "group"), and from any
            other name to a `Hyperparameter`.
        window: K ≥ 1, the steps differentiated together.
        update_every: steps from one outer update to the next, at least `window`; or `"epoch"`.
        steps_per_epoch: `len(train_loader)`, for `update_every="epoch"`.
        engine: how hypergradients are computed. Default: `Unroll()`.
        outer: how ρ moves: called with the list of raw tensors, returns a torch optimizer for them,
            such as `functools.partial(torch.optim.Adam, lr=0.05)`. Default: `GatedSign`. `None`
            switches learning off.
        writer: a TensorBoard `SummaryWriter`, for one point per outer update.
        safeguards: when to roll back and for how long; default `Safeguards()`.

    Attributes:
        hyperparameters: the learned `Hyperparameter` objects by name; call one for its λ.
        hypergradients: dE/dλ of the latest outer update by name, in λ's units; `None` before.
        outer_loss_value: E of the latest outer update; `None` before.
        cost: what the run has cost so far, in plain training steps.
        rollbacks: how often the safeguards rolled back.

    Raises:
        ArgumentTypeError, ArgumentError: an argument cannot work; everything is left untouched.
        UnsupportedError: Φ does not cover this optimizer or model.

    Cost: outside windows, a plain step; a window as `engine.cost` says, and one copy of the state.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> optimizer = HyperOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3),
        ...     model,
        ...     outer_loss=lambda: loss_fn(model(x), y),
        ...     window=2,
        ...     update_every=2,
        ... )
        >>> for _ in range(4):
        ...     _ = optimizer.step(loss_fn(model(x), y))
        >>> sorted(optimizer.hypergradients)
        ['lr', 'weight_decay']

    References:
        Franceschi et al. 2017, section 3; truncated windows as in Shaban et al. 2019.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        outer_loss: OuterLoss | None = None,
        learn: Learn = ("lr", "weight_decay"),
        *,
        window: int = 5,
        update_every: int | str = 20,
        steps_per_epoch: int | None = None,
        engine: Engine | None = None,
        outer: OuterFactory | None = GatedSign,
        writer: Any = None,
        safeguards: Safeguards | None = None,
    ) -> None:
        arguments.check_pieces(optimizer, model, outer_loss, outer, engine)
        self.window, self.update_every = arguments.check_rhythm(
            window, update_every, steps_per_epoch
        )
        self._dynamics = dynamics_of(optimizer)
        self.optimizer, self.model, self.outer_loss = optimizer, model, outer_loss
        self._slots = Slots(model, self._params())
        is_learning = outer is not None
        self.hyperparameters = arguments.learned(learn, optimizer, self._dynamics, is_learning)
        self.engine = engine or Unroll()
        self._factory = outer
        self._safeguards = safeguards or Safeguards()
        self._groups = LearnedGroups(optimizer, self._settings() if is_learning else {})
        self._steps, self._position, self.cost = 0, 0, 0.0
        self._window_losses: list[Tensor] = []
        self.hypergradients: dict[str, Tensor] | None = None
        self.outer_loss_value: Tensor | None = None
        self._warned_plain = False
        self._writer = writer
        self._begin()

    def _begin(self) -> None:
        """Do the part of the initialisation that touches live objects."""
        arguments.place(self.hyperparameters.values(), self._params()[0])
        if self.is_learning:
            self._groups.start()
        self._outer = self._new_outer()
        self._attach()

    def _attach(self) -> None:
        """Become a torch Optimizer around the wrapped one; also after a copy or unpickling."""
        super().__setstate__({})
        for hooks in [name for name in vars(self.optimizer) if name.endswith("_hooks")]:
            setattr(self, hooks, getattr(self.optimizer, hooks))
        self._slots = Slots(self.model, self._params())
        self._switches = TwiceDifferentiable(self.model)
        self._open: list[Window] = []
        self._finalizer = weakref.finalize(self, _leave, self._open, self._switches)
        self._finalizer.atexit = False
        self._monitor = self._new_monitor()
        self._get_ready()

    # What torch expects of an optimizer, forwarded to the wrapped one.

    @property
    def state(self) -> Any:
        """The wrapped optimizer's buffers, as of the start of an open window."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
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

    @property
    def is_learning(self) -> bool:
        """Whether outer updates are made at all."""
        return self._factory is not None

    @property
    def rollbacks(self) -> int:
        """How often the safeguards rolled back."""
        return self._safeguards.rollbacks

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _settings(self) -> dict[str, Setting]:
        return {n: h for n, h in self.hyperparameters.items() if isinstance(h, Setting)}

    # One training step.

    def step(self, loss: Any = None) -> Any:
        """Make one training step, and an outer update when one is due.

        Args:
            loss: the inner loss, a scalar tensor with its graph, which takes the place of
                `zero_grad(); loss.backward(); step()`; or a closure that returns one; or nothing,
                after the user's own `loss.backward()`: then it is a plain step, from which an
                engine with `needs_loss` learns nothing.

        Returns:
            The loss.

        Raises:
            ArgumentTypeError, ArgumentError: the loss is not a scalar tensor with a graph.
            WindowError: the loss does not come from this model as it is now, or an open window
                needs a loss and got none.
            DivergenceError: training diverged in spite of repeated rollbacks.
        """
        has_gradients = loss is None
        if callable(loss):
            loss, has_gradients = self._evaluate(loss)
        if not has_gradients:
            arguments.check_loss(loss, "The inner loss")
        try:
            self._advance(loss, has_gradients)
        except Diverged as reason:
            self._roll_back(reason)
        self._get_ready()
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """Return the closure's loss and whether the closure has called backward itself."""
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        return loss, any(p.grad is not None for p in self._params())

    def _advance(self, loss: Any, has_gradients: bool) -> None:
        if self.is_learning and not self._safeguards.has_snapshot:
            self._remember()
        if not (self.is_learning and self._position < self.window):
            self._plain_step(loss, has_gradients)
        elif has_gradients:
            self._step_without_loss(loss)
            return
        elif self._open and self._open[0].was_written_to:
            self._step_out_of_window(loss)
        else:
            self._window_step(loss)
        self._steps += 1
        self._position = (self._position + 1) % self.update_every
        if self._open and self._position == self.window % self.update_every:
            self._update()

    def _plain_step(self, loss: Any, has_gradients: bool) -> None:
        """w, buffers ← Φ(w, buffers), by the wrapped optimizer itself."""
        if not has_gradients:
            self.zero_grad()
            loss.backward()
        grads = self._gradients()
        if self.is_learning and isinstance(loss, Tensor):
            self._safeguards.watch(loss, grads)
        if self._groups.are_scalar:
            with self._groups.effective():
                _unhooked_step(self.optimizer)
        else:
            self._step_by_dynamics()
        self.cost += 1

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradients to step along, of which there must be one."""
        grads = [p.grad for p in self._params()]
        if all(grad is None for grad in grads):
            raise WindowError(
                "There is no gradient to step along. Pass the loss, `step(loss)`, or call "
                "`loss.backward()` on a loss of this optimizer's model first."
            )
        return grads

    @torch.no_grad()
    def _step_by_dynamics(self) -> None:
        """Step by Φ itself: torch's optimizers have no setting per tensor or element."""
        overrides = self._groups.overrides()
        new = []
        for g, group in enumerate(self.param_groups):
            group = {**group, **{name: by_group[g] for name, by_group in overrides.items()}}
            states = {}
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    buffers = dict(self.state[param])
                    value, states[i] = self._dynamics.step(param, param.grad, buffers, group, i)
                    param.copy_(value)
            new.append(states)
        set_buffers(self.optimizer, new)

    def _step_without_loss(self, loss: Any) -> None:
        """Take the plain step that was asked for where a window is due or open."""
        if self._open:
            raise WindowError(
                f"A window of {self.window} steps is open, and `step()` got no loss to "
                "differentiate. Pass it, `step(loss)`, without calling backward; or switch "
                "learning off with `outer=None`."
            )
        self._gradients()
        if not self._warned_plain:
            self._warned_plain = True
            warnings.warn(
                f"`step()` without a loss is a plain step, from which {self.engine!r} learns "
                "nothing. Replace `loss.backward(); optimizer.step()` by `optimizer.step(loss)`.",
                HypertorchWarning,
                stacklevel=4,
            )
        self._plain_step(loss, has_gradients=True)
        self._steps += 1

    # The window.

    def _window_step(self, loss: Tensor) -> None:
        if not self._open:
            self._safeguards.settle()
            self._remember()
        window = self._open[0] if self._open else self.engine.open(self.optimizer, self._slots)
        window.step(
            loss, self._groups.overrides(), lambda grads: self._safeguards.watch(loss, grads)
        )
        self._open[:] = [window]
        self._window_losses.append(loss.detach())

    def _step_out_of_window(self, loss: Tensor) -> None:
        """Go on from weights that somebody wrote to: cut the window, and step plainly."""
        fast = self._open[0].params
        grads = torch.autograd.grad(loss, fast, allow_unused=True)
        self.close()
        for param, grad in zip(self._params(), grads, strict=True):
            param.grad = grad
        self._plain_step(loss, has_gradients=True)

    def _update(self) -> None:
        """Differentiate the outer loss through the window, close it, and move ρ."""
        horizon = len(self._window_losses)
        try:
            outer_loss, hypergradients = self._hypergradients()
            self._safeguards.settle()
            self._safeguards.judge_update(outer_loss, hypergradients)
        except Diverged:
            raise
        except BaseException:
            self.close()
            raise
        self.close()
        through_loss = len(self._settings()) < len(self.hyperparameters)
        self.cost += self.engine.cost(horizon, through_loss)
        self.hypergradients, self.outer_loss_value = hypergradients, outer_loss.detach()
        self._move(hypergradients)
        self._record()
        self._window_losses.clear()

    def _hypergradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.outer_loss is not None
        with leaving_no_trace(self.model), torch.enable_grad():
            outer_loss = self.outer_loss()
            arguments.check_loss(outer_loss, "The outer loss")
            return outer_loss, self._open[0].hypergradient(outer_loss, self.hyperparameters)

    def _move(self, hypergradients: Mapping[str, Tensor]) -> None:
        """ρ ← outer rule(ρ, dE/dρ), then λ = c(ρ), then the numbers in the param groups."""
        for name, h in self.hyperparameters.items():
            h.raw.grad = h.pull_back(hypergradients[name])
        assert self._outer is not None
        self._outer.step()
        for h in self.hyperparameters.values():
            h.raw.grad = None
            h.clamp_()
            h.refresh()
        self._groups.publish()

    def _roll_back(self, reason: Diverged) -> None:
        self._slots.fill(self._slots.params)
        self._open.clear()
        self._window_losses.clear()
        self._position = 0
        self._safeguards.roll_back(reason, self.optimizer, self.hyperparameters)
        self._outer = self._new_outer()
        self._groups.publish()
        self._safeguards.forget()

    def _remember(self) -> None:
        self._safeguards.remember(self.model, self.optimizer, self.hyperparameters)

    def _get_ready(self) -> None:
        """Hold torch's switches if the next step belongs to a window, else let them go."""
        if self.is_learning and self._position < self.window:
            self._switches.hold()
        else:
            self._switches.release()

    def close(self) -> None:
        """Hand an open window back to the live model and optimizer, without an outer update.

        The model then holds ordinary Parameters with the present weights. A checkpoint does this by
        itself; call it when training ends. The next `step` goes on, and what is left of the window
        is differentiated from there.
        """
        for window in self._open:
            window.close()
        self._open.clear()
        self._switches.release()

    # The outer rule and the monitor.

    def _new_outer(self) -> torch.optim.Optimizer | None:
        if self._factory is None:
            return None
        return self._factory([h.raw for h in self.hyperparameters.values()])

    def _new_monitor(self) -> Monitor | None:
        if self._writer is None:
            return None
        start = {f"initial {n}": h().mean().item() for n, h in self.hyperparameters.items()}
        choices = {
            "optimizer": type(self.optimizer).__name__,
            "engine": repr(self.engine),
            "outer": type(self._outer).__name__ if self._outer else "none",
            "window": self.window,
            "update_every": self.update_every,
        }
        return Monitor(self._writer, {**choices, **start}, list(self.hyperparameters))

    def _record(self) -> None:
        if self._monitor is None:
            return
        assert self.hypergradients is not None and self.outer_loss_value is not None
        self._monitor.record(
            self._steps,
            {name: h() for name, h in self.hyperparameters.items()},
            self.hypergradients,
            {
                "loss/inner": torch.stack(self._window_losses).mean(),
                "loss/outer": self.outer_loss_value,
                "safeguards/rollbacks": float(self.rollbacks),
                "cost/plain_steps": self.cost,
                "cost/ratio": self.cost / self._steps,
            },
        )

    # Param groups, checkpoints, copies.

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose parameters are in `model`; its settings are learned as the others are.

        The open window is cut and the outer rule starts afresh.
        """
        params = arguments.group_params(param_group)
        Slots(self.model, params)
        new = {**self.defaults, **param_group, "params": params}
        check_options(type(self.optimizer).__name__, new)
        additions = self._groups.additions(new)
        self.close()
        self.optimizer.add_param_group(param_group)
        self._slots = Slots(self.model, self._params())
        self._groups.add_group(additions)
        arguments.place(self.hyperparameters.values(), self._params()[0])
        self._safeguards.forget()
        self._outer = self._new_outer()
        self._get_ready()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of weights' optimizer and of everything learned.

        `state` and `param_groups` are the wrapped optimizer's, with η_t as `lr`, so that the bare
        optimizer loads them too; `hypertorch` holds the rest. A checkpoint inside a window cuts it
        there: the steps before count as constants, the outer update comes at its time, and the
        run that goes on and the run that is resumed do the same from then on.
        """
        self._safeguards.settle()
        self.close()
        self._get_ready()
        self._window_losses.clear()
        self._safeguards.forget()
        state: dict[str, Any] = self.optimizer.state_dict()
        groups = zip(state["param_groups"], self._groups.effective_lr(), strict=True)
        state["param_groups"] = [{**group, "lr": lr} for group, lr in groups]
        state["hypertorch"] = self._own_state()
        return state

    def _own_state(self) -> dict[str, Any]:
        outer_state = getattr(self.outer_loss, "state_dict", None)
        return {
            "raw": {n: h.raw.detach().clone() for n, h in self.hyperparameters.items()},
            "groups": self._groups.state_dict(),
            "counters": (self._steps, self._position, self.cost),
            "outer": deepcopy(self._outer.state_dict()) if self._outer else None,
            "safeguards": self._safeguards.state_dict(),
            "outer_loss": outer_state() if outer_state else None,
        }

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; one of the bare optimizer sets the starting values.

        Raises:
            CheckpointError: it does not fit this optimizer, which is left untouched.
        """
        check_checkpoint(state_dict, self.optimizer, self.hyperparameters, self._outer)
        own = state_dict.get("hypertorch")
        self.close()
        self.optimizer.load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        if own is None or not self.is_learning:
            self._start_afresh()
        else:
            self._load_own_state(own)
        self._get_ready()

    def _start_afresh(self) -> None:
        self._groups.restart()
        self._outer = self._new_outer()
        self._position = 0
        self._safeguards.forget()

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, h in self.hyperparameters.items():
                h.raw.copy_(own["raw"][name])
                h.refresh()
        self._groups.load_state_dict(own["groups"])
        self._steps, self._position, self.cost = own["counters"]
        if self._outer is not None and own["outer"] is not None:
            self._outer.load_state_dict(own["outer"])
        self._safeguards.load_state_dict(own["safeguards"])
        load_outer = getattr(self.outer_loss, "load_state_dict", None)
        if load_outer and own["outer_loss"] is not None:
            load_outer(own["outer_loss"])

    def __getstate__(self) -> dict[str, Any]:
        self.close()
        self._get_ready()
        kept = {k: v for k, v in self.__dict__.items() if k not in _TRANSIENT}
        return {k: v for k, v in kept.items() if not k.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._writer = None
        self._attach()

    def __repr__(self) -> str:
        learned = ", ".join(repr(h) for h in self.hyperparameters.values()) or "nothing"
        rhythm = f"window={self.window}, update_every={self.update_every}"
        return f"HyperOptimizer ({rhythm}, learned: {learned})\n{self.optimizer!r}"


def _unhooked_step(optimizer: torch.optim.Optimizer) -> None:
    """Call the wrapped step without its hooks: the wrapper's own step has run them."""
    optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks for
    getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)(optimizer)


def _leave(windows: list[Window], switches: TwiceDifferentiable) -> None:
    """Hand everything back when a HyperOptimizer goes out of use."""
    for window in windows:
        window.close()
    switches.release()
