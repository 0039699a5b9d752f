"""Divergence found before it reaches a weight, the state rolled back, η lowered, the run gone on.

A loss or gradient that is not finite, or a loss far above its recent level, means that the last
window went wrong: weights, buffers and λ return to where it started, and η is divided.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .constraints import to_raw
from .errors import Diverged, DivergenceError, Relapsed, check_count, check_number, warn
from .hyperparameters import Hyperparameter
from .probation import Probation
from .snapshot import Snapshot
from .state import State, sign_of
from .surroundings import ModuleBuffers

#: s and the module buffers at one moment, ρ by name, and what the probation had seen.
_Remembered = tuple[Snapshot, dict[str, Tensor], dict[str, Any]]


#: What is said of a hyperparameter of the loss whose hypergradient is zero.
UNUSED = (
    "The hypergradient of `{name}` is exactly 0: neither the losses of the window nor the outer "
    "loss depend on it as it is now. Call `{name}()` anew in every loss: an outer update makes it "
    "another tensor."
)

#: Steps within which a look tells of the state that a checkpoint leaves to return to.
LATELY = 90


class Safeguards:
    """Watches losses and gradients, and keeps the state to return to.

    A loss explodes when it rises above its running level by more than `explosion` times that level
    (at least a tenth of the first loss) and by more than ten times its usual deviation from it. One
    that is as high at the very state rolled back to owes it to its data, or is another loss: it
    sets a new level, and rises like it, up to three times as large, pass for some hundred steps. On
    a CPU every step is checked before it is made; on an accelerator, where a check would stall it,
    when the next window opens or closes, and the steps since are rolled back with it.

    Args:
        explosion: how many levels above its level a loss may rise.
        backoff: what η is divided by at a rollback.
        patience: rollbacks in a row before giving up.

    Attributes:
        rollbacks: how many there were.
        probation: what the run must not fail to learn, nor lose again, if anything. A relapse
            returns to the state with the least E at an update.

    Raises:
        ArgumentError: `explosion` is not above 0, `backoff` not above 1, or `patience` no whole
            number of at least 1.
    """

    def __init__(self, explosion: float = 5.0, backoff: float = 3.0, patience: int = 12) -> None:
        above_0 = "a number above 0 (math.inf allows any rise)"
        check_number("`explosion` of Safeguards", explosion, above_0, lambda n: n > 0)
        above_1 = "a finite number above 1"
        check_number("`backoff` of Safeguards", backoff, above_1, lambda n: 1 < n < math.inf)
        check_count("`patience` of Safeguards", patience, " of rollbacks")
        self.explosion, self.backoff, self.patience = explosion, backoff, patience
        self.rollbacks = 0
        self._in_a_row, self._has_warned = 0, False
        self._sign = 1.0  # -1 where the inner loss is maximized: what must not rise is minus that
        self._is_back = False  # no loss has been seen since the last rollback
        self._steps = 0  # since the beginning, or the last rollback
        self.probation: Probation | None = None
        self._first: float | None = None
        self._level = self._deviation = 0.0
        self._usual = 0.0  # levels that a loss lately rose by for no fault of the weights
        self._pending: list[tuple[Tensor, bool]] = []
        self._good: _Remembered | None = None
        self._candidate: _Remembered | None = None
        self._best: _Remembered | None = None  # for a relapse; kept under probation alone
        self._is_best_known = False  # to be no relapse itself
        self._stood = 0  # the step of the last look that the run stood

    def begin(self, probation: Probation) -> None:
        """Look at a run from now on; its initial weights are no relapse."""
        self.probation, self._is_best_known = probation, True

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a state to return to."""
        return self._good is not None

    @torch.no_grad()
    def remember(
        self,
        optimizer: torch.optim.Optimizer,
        module_buffers: ModuleBuffers,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> State:
        """Make the present state the one to return to, once its own loss is seen to be good.

        Returns:
            Copies of s, to be read alone.

        Raises:
            Diverged: a weight is not finite, although a former state was.
        """
        snapshot, self._sign = Snapshot(optimizer, module_buffers), sign_of(optimizer)
        if self.has_snapshot:
            norms = torch._foreach_norm(snapshot.state.params)
            if not all(map(math.isfinite, torch.stack([n.to(norms[0]) for n in norms]).tolist())):
                raise Diverged("a weight is not finite")
        seen = self.probation.state_dict() if self.probation else {}
        self._candidate = snapshot, _raws(hyperparameters), seen
        self._good = self._good or self._candidate
        if self.probation:
            self._best = self._best or self._candidate
        return snapshot.state

    def forget(self) -> None:
        """Drop the state to return to, and what was seen since; the next step remembers its own."""
        self._good = self._candidate = self._best = None
        self._is_best_known = self._steps - self._stood <= LATELY
        self._pending.clear()

    def watch(self, loss: Tensor | None, grads: Sequence[Tensor | None]) -> None:
        """Raise `Diverged` if this step must not be made (on an accelerator: must be undone).

        Args:
            loss: `None` where nothing but its gradient is known.
            grads: the gradient.
        """
        probe = _probe(grads)
        if probe.is_cpu:
            self._judge(None if loss is None else loss.item(), probe.sum().item())
            self._promote()
        else:
            norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None]).detach()
            seen = norm if loss is None else loss.detach().to(norm).reshape(())
            self._pending.append((torch.stack([seen, norm]), loss is not None))

    def settle(self) -> None:
        """Raise `Diverged` if one of the steps seen since the last time went wrong."""
        if not self._pending:
            return
        seen = torch.stack([pair for pair, _ in self._pending]).tolist()
        has_loss = [known for _, known in self._pending]
        self._pending = []
        for (loss, witness), known in zip(seen, has_loss, strict=True):
            self._judge(loss if known else None, witness)
        self._promote()

    def _promote(self) -> None:
        self._good, self._candidate = self._candidate or self._good, None

    def _judge(self, loss: float | None, witness: float) -> None:
        if loss is not None and not math.isfinite(loss):
            raise Diverged(f"the inner loss is {loss}")
        if not math.isfinite(witness):
            raise Diverged("the gradient of the inner loss is not finite")
        if loss is None:
            return
        loss *= self._sign
        if not self._first:  # none yet, or zero, which says nothing of the loss's scale
            self._first = self._level = loss
        rise, scale = loss - self._level, max(abs(self._level), 0.1 * abs(self._first))
        levels = max(self.explosion, 3 * self._usual)
        self._usual *= 0.995
        if rise > max(levels * scale, 10 * self._deviation):
            if not self._is_back:
                raise Diverged(
                    f"the inner loss rose from about {self._level:.3g} to {loss:.3g}, more than "
                    f"`Safeguards(explosion={self.explosion:g})` allows"
                )
            self._usual, self._level, rise = rise / scale, loss, 0.0
        self._is_back = False
        self._level += 0.1 * rise
        self._deviation += 0.1 * (abs(rise) - self._deviation)

    def count_step(self, schedule: Callable[[], float]) -> float:
        """Count a step that was made; return what a look after it will cost, 0 if none is due."""
        self._steps += 1
        if self.probation is None:
            return 0.0
        is_due = self._steps in self.probation.steps or not self._is_best_known
        return self.probation.price(schedule()) if is_due else 0.0

    def look(self) -> None:
        """Raise `Relapsed` if the run, at a look that is due, does not stand its probation.

        The state to return to may be new, after a checkpoint, and itself one of those that do not:
        then nothing was gained.
        """
        assert self.probation is not None
        is_scheduled = self._steps in self.probation.steps
        self._stand(self.probation.look if is_scheduled else self.probation.check)

    def check(self) -> None:
        """Do the same at an update that asks for it."""
        assert self.probation is not None
        self._stand(self.probation.check)
        self._in_a_row = 0

    def _stand(self, look: Callable[[int], object]) -> None:
        assert self.probation is not None
        try:
            look(self._steps)
        except Relapsed:
            if self._is_best_known:
                raise
            self.probation.forget()
        self._stands()

    def _stands(self) -> None:
        self._is_best_known, self._stood = True, self._steps

    def judge_update(
        self,
        outer_loss: Tensor,
        hypergradients: Mapping[str, Tensor],
        schedule: float,
        called: Collection[str],
    ) -> float:
        """Return what a look will cost, 0 if the outer loss asks for none.

        Args:
            outer_loss: E.
            hypergradients: dE/dλ by name.
            schedule: the largest of the groups'.
            called: names of what losses call; of one that none has called a warning tells.

        Raises:
            Diverged: the outer loss or a hypergradient is no usable number.
        """
        known = [h.values() if h.is_sparse else h for h in hypergradients.values()]
        largest = torch._foreach_norm(known, math.inf)
        loss, *sizes = torch.stack([outer_loss.to(largest[0]), *largest]).tolist()
        if not math.isfinite(loss):
            raise Diverged(f"the outer loss is {loss}")
        for name, size in zip(hypergradients, sizes, strict=True):
            if not size < 1e15:
                raise Diverged(f"the hypergradient of `{name}` reaches {size:.3g}")
            if size == 0 and name in called:
                warn(UNUSED.format(name=name))
        is_least, is_due = self.probation.hear(loss) if self.probation else (False, False)
        if self.probation and is_least and self._good:
            self._best = (*self._good[:2], self.probation.state_dict())
            self._stands()
        price = self.probation.price(schedule) if self.probation else 0.0
        if not (is_due and price):
            self._in_a_row = 0
            return 0.0
        return price

    def roll_back(
        self,
        reason: Diverged,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> None:
        """Return weights, buffers and λ to the remembered state, or the best, and divide η.

        After a relapse the present η is divided, with which that was.

        Raises:
            DivergenceError: this was the last of `patience` rollbacks in a row.
        """
        remembered = self._best if isinstance(reason, Relapsed) else self._good
        assert remembered is not None  # every learning step remembers one first
        snapshot, raws, seen = remembered
        snapshot.restore(optimizer)
        if self.probation:
            self.probation.load_state_dict(seen)
            self.probation.promise = None  # of another η
        self._pending.clear()
        self._candidate = None
        self.rollbacks += 1
        self._in_a_row += 1
        self._is_back, self._steps, self._stood = True, 0, 0
        if isinstance(reason, Relapsed) and "lr" in hyperparameters:
            raws = {**raws, "lr": hyperparameters["lr"].raw.detach().clone()}
        for name, h in hyperparameters.items():
            h.put(raws[name])
        if self._in_a_row >= self.patience:
            advice = "Check the data for NaN, or start from a smaller `lr`."
            if "lr" not in hyperparameters:
                advice += " Or learn `lr` too, so that a rollback can lower it."
            raise DivergenceError(
                f"Training diverged {self._in_a_row} times in a row; last, {reason}. The weights "
                f"are back at the last good state. {advice}"
            )
        self._warn(reason)
        if "lr" in hyperparameters:
            lr = hyperparameters["lr"]
            lr.put(to_raw(lr.value.detach() / self.backoff, lr.constraint))
        self._good = snapshot, _raws(hyperparameters), seen
        if self._best is remembered:
            self._best = self._good

    def _warn(self, reason: Diverged) -> None:
        """Say once that training is rolled back again and again, though it goes well in between."""
        if self._in_a_row == 1 and self.rollbacks >= 3 and not self._has_warned:
            self._has_warned = True
            warn(
                f"Training was rolled back {self.rollbacks} times so far; now, {reason}. Each time "
                "costs the steps since the last window began, and divides an η that is learned."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the level of the loss and what it may reach, but no snapshot."""
        return {
            "rollbacks": self.rollbacks,
            "in_a_row": self._in_a_row,
            "is_back": self._is_back,
            "steps": self._steps,
            "stood": self._stood,
            "first": self._first,
            "level": self._level,
            "deviation": self._deviation,
            "usual": self._usual,
            "probation": self.probation.state_dict() if self.probation else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was returned; the next step remembers the state it starts from."""
        self.rollbacks, self._in_a_row = state["rollbacks"], state["in_a_row"]
        self._is_back, self._first = state["is_back"], state["first"]
        self._level, self._deviation = state["level"], state["deviation"]
        self._usual, self._steps, self._stood = state["usual"], state["steps"], state["stood"]
        if self.probation and state["probation"] is not None:
            self.probation.load_state_dict(state["probation"])
        self.forget()


def _raws(hyperparameters: Mapping[str, Hyperparameter]) -> dict[str, Tensor]:
    return {name: h.raw.detach().clone() for name, h in hyperparameters.items()}


def _probe(grads: Sequence[Tensor | None]) -> Tensor:
    """Return the gradient in which an error anywhere shows: that of the first bias, or the first.

    Backpropagation carries what is not finite down to the first layer, and reading every gradient
    would cost a tenth of a small network's step. What slips through shows in the next loss, or in
    the weights when the next window opens, and is rolled back from there.
    """
    for grad in grads:
        if grad is not None and grad.dim() == 1:
            return grad
    return next(grad for grad in grads if grad is not None)
