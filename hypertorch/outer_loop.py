"""The outer loop: windows opened, differentiated and closed, ρ moved, divergence rolled back.

Every `update_every` training steps the first `window` of them are differentiated together; at their
end dE/dλ moves ρ, and λ = c(ρ) goes on training the weights.
"""

import weakref
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import place
from .double_backward import TwiceDifferentiable
from .errors import Diverged, warn
from .gradient_hooks import refuse_gradient_hooks
from .hypergradients import Carried, Engine, OuterLoss, Training, TrainingStep, Window
from .hyperparameters import Hyperparameter
from .inner_loss import WRITTEN_TO, checked_outer, guarded
from .outer import OuterFactory, new_rule, takes_sparse
from .param_groups import LearnedGroups
from .safeguards import Safeguards
from .settings import Setting
from .slots import Slots
from .state import State, params_of, set_gradients, versions
from .surroundings import ModuleBuffers
from .transition import gradients

#: What belongs to the process and not to the object, and is left out of copies and pickles.
_TRANSIENT = ("training", "_switches", "_open", "_finalizer", "_before")


class OuterLoop:
    """The learning side of a HyperOptimizer.

    Args:
        model: the live model.
        optimizer: the bare optimizer.
        outer_loss: E.
        hyperparameters: what is learned, by name.
        groups: the live param groups and what is learned in them.
        engine: how dE/dλ is computed.
        factory: builds the rule that moves ρ.
        safeguards: when to roll back.
        rhythm: the window's length and the steps between outer updates.

    Attributes:
        position: how many steps of the present period have been made.
        overhead: what windows and outer losses have cost so far beyond the training steps
            themselves, in plain training steps.
        hypergradients, outer_loss_value: dE/dλ by name, and E, at the latest outer update; `None`
            before.
        training: what the engine works on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        outer_loss: OuterLoss,
        hyperparameters: Mapping[str, Hyperparameter],
        groups: LearnedGroups,
        engine: Engine,
        factory: OuterFactory,
        safeguards: Safeguards,
        rhythm: tuple[int, int],
    ) -> None:
        self.model, self.optimizer, self.outer_loss = model, optimizer, outer_loss
        self.hyperparameters = dict(hyperparameters)
        self.engine, self.safeguards, self._factory = engine, safeguards, factory
        self.groups, (self.window, self.update_every) = groups, rhythm
        self._carried: Carried | None = None
        self.position, self.overhead = 0, 0.0
        self._age, self._cuts, self._steps_in_window = 0, 0, 0  # age: steps since a snapshot
        self._losses, self._inner_losses = list[Tensor](), list[Tensor]()
        self.hypergradients: dict[str, Tensor] | None = None
        self.outer_loss_value: Tensor | None = None
        self.engine.check(self._new_training())
        self.rule = self._new_rule()
        self.groups.start()
        self._attach()
        self.engine.prepare(self.training)

    def _attach(self) -> None:
        self.training = self._new_training()
        self._switches = TwiceDifferentiable(self.model)
        self._open: list[Window] = []
        self._finalizer = weakref.finalize(self, _leave, self._open, self._switches)
        self._finalizer.atexit = False
        self.get_ready()

    def _new_training(self) -> Training:
        slots, dynamics = Slots(self.model, params_of(self.optimizer)), self.groups.dynamics
        is_contiguous = self.window == self.update_every
        return Training(self.optimizer, slots, dynamics, self.hyperparameters, is_contiguous)

    def _new_rule(self) -> torch.optim.Optimizer:
        return new_rule(self._factory, [h.raw for h in self.hyperparameters.values()])

    @property
    def is_window_due(self) -> bool:
        """Whether the next step belongs to a window."""
        return self.position < self.window

    @property
    def is_window_open(self) -> bool:
        """Whether the model holds the fast weights of a window."""
        return bool(self._open)

    def get_ready(self) -> None:
        """Hold torch's switches if the next step needs them, else let them go."""
        if self.is_window_due and self.engine.differentiates_twice:
            self._switches.hold()
        else:
            self._switches.release()
        if not self._open and (self.is_window_due or not self.safeguards.has_snapshot):
            self._before = versions(params_of(self.optimizer)), ModuleBuffers(self.model)

    def see_to_snapshot(self) -> None:
        """See that there is a state to roll back to, and no old one where windows never open.

        Raises:
            Diverged: a step since the last time went wrong.
        """
        if place(self.hyperparameters.values(), self.optimizer):
            self.training = self._new_training()  # a trainer has moved the model
            self.settings_were_set()
        self._age += 1
        if self._age > self.update_every:
            self.safeguards.settle()
        if self._age > self.update_every or not self.safeguards.has_snapshot:
            self._remember()

    def _remember(self) -> State:
        """Remember the state before this step, whose forward pass has been made.

        It may have left NaN in the module buffers: those of `get_ready` count, unless somebody
        loaded a model since.
        """
        self._age = 0
        before, buffers = self._before
        if before != versions(params_of(self.optimizer)):
            buffers = ModuleBuffers(self.model)
        return self.safeguards.remember(self.optimizer, buffers, self.hyperparameters)

    def window_step(self, step: TrainingStep) -> None:
        """Make the step s_t = Φ_t(s_{t-1}, λ) as part of a window.

        Raises:
            Diverged: the loss or its gradient must not reach the weights.
        """
        window = self._open[0] if self._open else self._new_window()
        window.step(step)
        window.follow()
        self._open[:] = [window]
        self._steps_in_window += 1
        if step.loss is not None:
            self._losses.append(step.loss.detach())

    def _new_window(self) -> Window:
        if self.engine.needs != "gradients":
            who = f"a window of {self.engine!r}"
            refuse_gradient_hooks(self.model, self.training.slots.params, who)
        self.safeguards.settle()
        self.training = self._new_training()  # weights may have been tied, moved or replaced
        return self.engine.open(replace(self.training, start=self._remember()), self._carried)

    def cut_if_written_to(self, loss: Tensor | None) -> bool:
        """Cut an open window whose weights somebody wrote to; leave ∇loss, if any, in `.grad`.

        Returns:
            Whether that was so: the step is then a plain one.
        """
        if not (self._open and self._open[0].was_written_to):
            return False
        found = None if loss is None else gradients(loss, self._open[0].params)
        self.close()
        self._carried = None
        self._cuts += 1
        if self._cuts == 3:
            warn(WRITTEN_TO)
        if found is not None:
            set_gradients(params_of(self.optimizer), found)
        return True

    def advance(self) -> bool:
        """Count one training step; return whether an outer update was made after it.

        Raises:
            Diverged: the outer loss or a hypergradient is unusable, or the run learns nothing.
        """
        if cost := self.safeguards.count_step(self.groups.largest_schedule):
            self.overhead += cost
            self.safeguards.look()
        self.position = (self.position + 1) % self.update_every
        if not (self._open and self.position == self.window % self.update_every):
            return False
        self._update()
        return True

    def _update(self) -> None:
        """Differentiate the outer loss through the window, close it, and move ρ."""
        try:
            with guarded(self.outer_loss, self.model), torch.enable_grad():
                checked = checked_outer(self.outer_loss, self.engine, self.model)
                outer_loss, hypergradients = self._open[0].hypergradient(checked)
            horizon, unforeseen = self._steps_in_window, self._open[0].unforeseen
            self.overhead += self.engine.cost(horizon, self.training) + unforeseen - horizon
            self.safeguards.settle()
            called = self.training.called if self.engine.differentiates_outer_loss else ()
            judged = outer_loss, hypergradients, self.groups.largest_schedule(), called
            if cost := self.safeguards.judge_update(*judged):
                self.overhead += cost
                self.safeguards.check()
        except Diverged:
            raise
        except BaseException:
            self.close()
            raise
        self._inner_losses = self._losses
        self.close()
        self.hypergradients, self.outer_loss_value = hypergradients, outer_loss
        self._move(hypergradients)

    def _move(self, hypergradients: Mapping[str, Tensor]) -> None:
        """ρ ← outer rule(ρ, dE/dρ), then λ = c(ρ), then the numbers in the param groups."""
        for name, h in self.hyperparameters.items():
            gradient = h.pull_back(hypergradients[name])
            h.raw.grad = gradient if takes_sparse(self.rule) else gradient.to_dense()
        self.rule.step(lambda: self.outer_loss_value)  # type: ignore[arg-type, return-value]
        for h in self.hyperparameters.values():
            h.raw.grad = None
            h.clamp_()
        self.groups.publish()

    def roll_back(self, reason: Diverged) -> None:
        """Return to where the last window started, or the best one, with a lower η."""
        self.training.slots.empty()
        self._forget_window()
        self._carried, self.position = None, 0
        self.safeguards.roll_back(reason, self.optimizer, self.hyperparameters)
        self.rule = self._new_rule()
        self.groups.publish()

    def close(self) -> None:
        """Hand an open window back to the live model and optimizer."""
        for window in self._open:
            self._carried = window.close()
        self._forget_window()

    def _forget_window(self) -> None:
        self._open.clear()
        self._losses, self._steps_in_window = [], 0

    def cut(self) -> None:
        """Make the present state a start, or the last good one if a step since went wrong."""
        try:
            self.safeguards.settle()
        except Diverged as reason:
            self.roll_back(reason)
        self.close()
        self.safeguards.forget()
        self.get_ready()

    def add_group(self, additions: Mapping[str, Setting]) -> None:
        """Take in the param group that was added last; the outer rule starts afresh."""
        self._switches.release()  # its modules may need others
        self.groups.add_group(additions)
        self.training = self._new_training()
        place(self.hyperparameters.values(), self.optimizer)
        self.settings_were_set()

    def restart(self) -> None:
        """Learn on from the numbers that the param groups hold; what was before does not count."""
        self.safeguards.forget()
        self.groups.restart(is_learning=True)
        self.position = 0
        self.settings_were_set()

    def settings_were_set(self, cost: float = 0.0) -> None:
        """Learn on from what the settings hold, which took `cost` training steps to find."""
        self.groups.start()
        self.rule = self._new_rule()
        self.overhead += cost
        self.cut()
        self._carried = None

    def settings_moved(self) -> None:
        """Learn on from what the settings hold; the state to roll back to stays what it was."""
        self.groups.publish()
        self.rule, self._carried = self._new_rule(), None
        self.close()
        self.get_ready()

    def take_up(self, update_every: int) -> None:
        """Go on with the plain steps of such a period; the next window opens after them."""
        self.update_every, self.position = update_every, self.window % update_every
        self.training = self._new_training()
        self.get_ready()

    def losses(self) -> dict[str, Tensor]:
        """Return E and the window's mean inner loss, at the latest update, where known."""
        inner = torch.stack(self._inner_losses).mean() if self._inner_losses else None
        found = {"loss/inner": inner, "loss/outer": self.outer_loss_value}
        return {name: loss for name, loss in found.items() if loss is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return ρ, and the state of the loop, its rule, the safeguards and the outer loss."""
        outer_state = getattr(self.outer_loss, "state_dict", None)
        return {
            "raw": {name: h.raw.detach().clone() for name, h in self.hyperparameters.items()},
            "groups": self.groups.state_dict(),
            "rhythm": (self.window, self.update_every, self.position),
            "bounds": {name: h.bounds for name, h in self.hyperparameters.items()},
            "carried": deepcopy(self._carried),
            "overhead": self.overhead,
            "rule": deepcopy(self.rule.state_dict()),
            "safeguards": self.safeguards.state_dict(),
            "outer_loss": outer_state() if outer_state else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; optimizer and outer loss are loaded before."""
        for name, h in self.hyperparameters.items():
            h.bound(state["bounds"][name])
            h.put(state["raw"][name])
        self.groups.load_state_dict(state["groups"])
        self.window, self.update_every, self.position = state["rhythm"]
        self.training, self.overhead = self._new_training(), state["overhead"]
        self._carried = deepcopy(state["carried"])
        self.rule.load_state_dict(deepcopy(state["rule"]))
        self.safeguards.load_state_dict(state["safeguards"])
        self.get_ready()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()


def _leave(windows: list[Window], switches: TwiceDifferentiable) -> None:
    """Hand everything back when a loop goes out of use."""
    for window in windows:
        window.close()
    switches.release()
