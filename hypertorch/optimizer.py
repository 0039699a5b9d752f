"""HyperOptimizer: a torch optimizer that learns its own λ while the weights train.

The shell a user holds: what torch expects of an optimizer, and which step is which.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .checkpoint import check_checkpoint, load_outer_loss
from .dynamics import check_options, dynamics_of
from .entries import dense
from .errors import Diverged, warn
from .hypergradients import Engine, OuterLoss, TrainingStep, Unroll
from .hyperparameters import Hyperparameter
from .inner_loss import LEFT_OUT, InnerLoss, missing_loss
from .loss_graph import explain
from .monitor import Monitor, choices
from .outer import GatedSign, OuterFactory
from .outer_loop import OuterLoop
from .param_groups import LearnedGroups, load_optimizer
from .safeguards import Safeguards
from .slots import Slots
from .state import set_gradients
from .transition import Gradients
from .wrapper import OptimizerWrapper, hooked

Learn = Iterable[str | Hyperparameter] | Mapping[str, str | Hyperparameter]


class HyperOptimizer(OptimizerWrapper):
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
            other name to a `Hyperparameter`. A group at 0 beside others above has none of it.
        window: K ≥ 1, the steps differentiated together.
        update_every: steps from one outer update to the next, at least `window`; or `"epoch"`.
        steps_per_epoch: `len(train_loader)`, for `update_every="epoch"`.
        engine: how hypergradients are computed. Default: `Unroll()`.
        outer: how ρ moves: called with the list of raw tensors, returns a torch optimizer for them,
            such as `functools.partial(torch.optim.Adam, lr=0.05)`. Default: `GatedSign`. `None`
            switches learning off.
        writer: a TensorBoard `SummaryWriter`, for one point per outer update.
        safeguards: when to roll back and for how long; default `Safeguards()`. It is copied.

    Attributes:
        hyperparameters: the learned `Hyperparameter` objects by name; call one for its λ.

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

    _transient = ("step", "_monitor")

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
        arguments.check_pieces(optimizer, model, outer_loss, outer, engine, writer, safeguards)
        rhythm = arguments.check_rhythm(window, update_every, steps_per_epoch)
        dynamics = dynamics_of(optimizer)
        super().__init__(optimizer)
        self.model, self.outer_loss = model, outer_loss
        Slots(model, self._params()).check()
        self.hyperparameters = arguments.learned(learn, optimizer, dynamics, outer is not None)
        arguments.place(self.hyperparameters.values(), optimizer)
        self._steps, self._warned = 0, set[str]()
        self._groups = LearnedGroups(optimizer, self.hyperparameters)
        self._loop: OuterLoop | None = None
        if outer is not None and outer_loss is not None:
            self._loop = OuterLoop(
                model,
                optimizer,
                outer_loss,
                self.hyperparameters,
                self._groups,
                engine or Unroll(),
                outer,
                deepcopy(Safeguards() if safeguards is None else safeguards),
                rhythm,
            )
        self._monitor = self._new_monitor(writer)

    @property
    def hypergradients(self) -> dict[str, Tensor] | None:
        """dE/dλ of the latest outer update by name, in λ's units and shape; `None` before."""
        found = self._loop.hypergradients if self._loop else None
        return found and dense(found)

    @property
    def outer_loss_value(self) -> Tensor | None:
        """E of the latest outer update; `None` before."""
        return self._loop.outer_loss_value if self._loop else None

    @property
    def rollbacks(self) -> int:
        """How often the safeguards rolled back."""
        return self._loop.safeguards.rollbacks if self._loop else 0

    @property
    def cost(self) -> float:
        """What the run has cost so far, in plain training steps."""
        return self._steps + (self._loop.overhead if self._loop else 0.0)

    @hooked
    def step(self, loss: Any = None, *, closure: Any = None) -> Any:  # type: ignore[override]
        """Make one training step, and an outer update when one is due.

        Args:
            loss: the inner loss with its graph, in place of `zero_grad(); loss.backward(); step()`;
                or a closure that returns one; or nothing, after your own `loss.backward()`: a plain
                step, from which only an engine that needs no more than the gradients learns.
            closure: the same, by torch's name for it.

        Returns:
            The loss.

        Raises:
            ArgumentTypeError, ArgumentError: the loss is not a scalar tensor with a graph.
            WindowError: the loss does not come from this model as it is now, or an open window
                needs a loss and got none.
            DivergenceError: training diverged in spite of repeated rollbacks.
        """
        inner = InnerLoss(loss if closure is None else closure, self._params())
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedulers look for it
        takes_any = self._loop is None or self._loop.engine.needs == "gradients"
        try:
            if takes_any and inner.is_left_out():
                self._warn(LEFT_OUT)
            elif self._loop is None:
                self._plain_step(inner)
                self._steps += 1
            else:
                self._learning_step(self._loop, inner)
        except RuntimeError as error:
            explain(error, inner.closure is not None, inner.loss is not None)
        return inner.loss

    def _learning_step(self, loop: OuterLoop, inner: InnerLoss) -> None:
        was_due = loop.is_window_due
        try:
            loop.see_to_snapshot()
            self._warn(self._groups.said_of_rates())
            is_missing = was_due and not inner.suits(loop.engine)
            if is_missing:
                self._refuse_or_warn(loop, inner)
            if is_missing or not was_due:
                self._plain_step(inner)
            elif loop.cut_if_written_to(None if inner.has_gradients else inner.loss):
                inner.has_gradients = inner.has_gradients or inner.loss is not None
                self._plain_step(inner)
            else:
                loop.window_step(self._window_step(loop, inner))
            self._steps += 1
            if not is_missing and loop.advance():
                self._record(loop)
        except Diverged as reason:
            loop.roll_back(reason)
        finally:
            if was_due or loop.is_window_due:
                loop.get_ready()

    def _window_step(self, loop: OuterLoop, inner: InnerLoss) -> TrainingStep:
        """Return this step as an engine is given it."""

        def make(loss: Tensor | None, grads: Gradients | None) -> None:
            inner.loss, inner.has_gradients = loss, True
            if grads is not None:
                set_gradients(inner.params, grads)
            self._plain_step(inner)

        if loop.engine.needs == "gradients":
            inner.backward()
        closure = inner.replayable() if loop.engine.needs == "closure" else None
        watch = loop.safeguards.watch
        return TrainingStep(self._groups.transition(), make, inner.value(), closure, watch)

    def _plain_step(self, inner: InnerLoss) -> None:
        """w, buffers ← Φ(w, buffers), by the wrapped optimizer itself."""
        inner.backward()
        grads = inner.gradients()
        if self._loop is None:
            self._wrapped_step()
        else:
            self._loop.safeguards.watch(inner.value(), grads)
            self._groups.step(self._wrapped_step)

    def _refuse_or_warn(self, loop: OuterLoop, inner: InnerLoss) -> None:
        """Say what a step without a loss means where a window is open or due."""
        said = missing_loss(inner, loop.engine, loop.window, loop.is_window_open)
        inner.gradients()
        self._warn(said)

    def _warn(self, said: str | None) -> None:
        if said and said not in self._warned:
            self._warned.add(said)
            warn(said)

    def close(self) -> None:
        """Hand an open window back to the live model and optimizer, without an outer update.

        The model then holds ordinary Parameters with the present weights. A checkpoint does this by
        itself; call it when training ends. The next `step` goes on, and what is left of the window
        is differentiated from there: torch's attention and the like stay as that step needs them,
        until it is made or the optimizer is dropped.
        """
        if self._loop:
            self._loop.close()

    def _new_monitor(self, writer: Any) -> Monitor | None:
        if writer is None or self._loop is None:
            return None
        start = {f"initial {n}": h().mean().item() for n, h in self.hyperparameters.items()}
        values = {name: h() for name, h in self.hyperparameters.items()}
        return Monitor(writer, {**choices(self._loop), **start}, values)

    def _record(self, loop: OuterLoop) -> None:
        if self._monitor is None or not (found := self.hypergradients):
            return
        self._monitor.record(
            self._steps,
            {name: h() for name, h in self.hyperparameters.items()},
            found,
            {
                **loop.losses(),
                "safeguards/rollbacks": float(self.rollbacks),
                "cost/plain_steps": self.cost,
                "cost/ratio": self.cost / self._steps,
            },
        )

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose parameters are in `model`; its settings are learned as the others are.

        The open window is cut and the outer rule starts afresh.
        """
        group, params = arguments.new_group(param_group)
        Slots(self.model, params).check()
        new = {**self.defaults, **group, "params": params}
        check_options(type(self.optimizer).__name__, new)
        additions = self._groups.additions(new, self._loop is not None)
        if self._loop:
            self._loop.cut()
        self.optimizer.add_param_group(group)
        (self._loop or self._groups).add_group(additions)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of weights' optimizer and of everything learned.

        `state` and `param_groups` are the wrapped optimizer's, with η_t as `lr`, so that the bare
        optimizer loads them too (a scheduler has a base of its own); `hypertorch` holds the rest.
        Inside a window it cuts that, here as there: the steps before count as constants.
        """
        if self._loop is None:
            return self.optimizer.state_dict()
        self._loop.cut()
        state: dict[str, Any] = self.optimizer.state_dict()
        state["param_groups"] = self._groups.saved(state["param_groups"])
        state["hypertorch"] = {"steps": self._steps, **self._loop.state_dict()}
        return state

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, in its rhythm; a bare one sets the starting values.

        Raises:
            CheckpointError: it does not fit this optimizer, which is left untouched.
        """
        rule = self._loop.rule if self._loop else None
        check_checkpoint(state_dict, self.optimizer, self.hyperparameters, rule)
        own = state_dict.get("hypertorch")
        if self._loop and own:
            load_outer_loss(self.outer_loss, own["outer_loss"])
        self.close()
        load_optimizer(self.optimizer, {k: v for k, v in state_dict.items() if k != "hypertorch"})
        self._steps = own["steps"] if own else 0
        if self._loop is not None and own:
            self._loop.load_state_dict(own)
        else:
            (self._loop or self._groups).restart()

    def __getstate__(self) -> dict[str, Any]:
        if self._loop:
            self._loop.cut()
        return super().__getstate__()

    def __repr__(self) -> str:
        learned = ", ".join(repr(h) for h in self.hyperparameters.values()) or "nothing"
        if self._loop is None:
            return f"HyperOptimizer (learning is off)\n{self.optimizer!r}"
        rhythm = f"window={self._loop.window}, update_every={self._loop.update_every}"
        return f"HyperOptimizer ({rhythm}, learned: {learned})\n{self.optimizer!r}"
