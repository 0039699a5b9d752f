"""The beginning of a run that does not learn at once: no decay yet, and an η that grows meanwhile.

Deep networks, sigmoids and transformers may lie on a plateau at first: for a hundred steps E hardly
falls, whatever η is. Trials say little there, and a decay would shrink the weights to nothing while
no gradient holds against it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .forgetting import start_weight_decay
from .kept_batches import BatchLosses
from .optimizer import HyperOptimizer
from .safeguards import Probation
from .settings import Setting
from .trials import CLEAR, TELLING, fallen

#: From which step on a look that finds no change makes η grow, and by what factor; and from which
#: on a hundredth of E is enough for λ to start.
TRUST, GROWTH, PATIENCE = 40, 3.0, 90


class SlowStart(Probation):
    """A probation that goes on until the run has begun to learn.

    λ is meanwhile the least that it may be. A look after 20, 40, 90, 180, 360, … steps finds that E

        has fallen by a fifth, from 90 on by a hundredth:    λ starts (`start_weight_decay`);
        is where it was, to a hundredth, from 40 on:         η ← 3 η;
        has risen by more, from 40 on:                       η ← η / 3.

    Args:
        probation: of the first steps; it does not count what is looked at besides the loss.
        trial: E, on the examples that judge trials. Its optimizer learns η and λ.
        before: E at the initial weights.
        run: T and the steps of an epoch, as for `start_weight_decay`, which was called.
    """

    def __init__(
        self,
        probation: Probation,
        trial: BatchLosses,
        before: float,
        run: tuple[int, int | None],
    ) -> None:
        looks = list(probation.steps)
        while 4 * looks[-1] <= run[0]:
            looks.append(2 * looks[-1])
        cost = probation.cost + len(trial.batches) / 3
        super().__init__(probation.loss, probation.limit, tuple(looks), cost)
        self._trial, self._before, self._run = trial, before, run
        self._is_waiting = True
        optimizer, decay = self._learning("weight_decay")
        assert decay.bounds is not None
        decay.start_at([decay.bounds[0]] * len(optimizer.param_groups))
        _publish(optimizer)

    def look(self, steps: int) -> None:
        """Raise `Diverged` unless the loss stands the probation; let λ start, or η grow."""
        super().look(steps)
        if not self._is_waiting:
            return
        with torch.no_grad():
            loss = self._trial.mean().item()
        share = fallen(self._before, loss)
        optimizer, lr = self._learning("lr")
        if share >= (CLEAR if steps < PATIENCE else TELLING):
            self._is_waiting = False
            start_weight_decay(optimizer, *self._run)
        elif share < TELLING and steps >= TRUST:
            lr.set((GROWTH if share > -TELLING else 1 / GROWTH) * lr.value.detach())
            lr.clamp_()
            _publish(optimizer)

    def _learning(self, name: str) -> tuple[HyperOptimizer, Setting]:
        optimizer = self._trial.optimizer
        assert optimizer is not None  # this belongs to it
        setting = optimizer.hyperparameters[name]
        assert isinstance(setting, Setting)
        return optimizer, setting

    def state_dict(self) -> dict[str, Any]:
        """Return what the present run may reach, and whether it still has to begin."""
        return {**super().state_dict(), "is_waiting": self._is_waiting, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that over; a run that did not wait has begun."""
        super().load_state_dict(state)
        self._is_waiting = state.get("is_waiting", False)
        self._before = state.get("before", self._before)


def _publish(optimizer: HyperOptimizer) -> None:
    assert optimizer._loop is not None
    optimizer._loop.settings_were_set()
