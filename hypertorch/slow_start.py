"""The beginning of a run that does not learn at once: no decay yet, and an η that grows meanwhile.

Deep networks, sigmoids and transformers may lie on a plateau at first: for a hundred steps E hardly
falls, whatever η is. Trials say little there, and a decay would shrink the weights to nothing while
no gradient holds against it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .errors import Relapsed
from .forgetting import start_weight_decay
from .kept_batches import BatchLosses
from .optimizer import HyperOptimizer
from .outer_loop import OuterLoop
from .probation import GAIN, Probation
from .settings import Setting
from .state import params_of
from .surroundings import leaving_no_trace
from .transition import gradients
from .trials import CLEAR, HARMLESS, TELLING, are_reached, fallen, matrix_norms

#: What η grows by, and from which step on: where E has not fallen by then, it hardly will.
GROWTH, PATIENCE = 3.0, 90


class SlowStart(Probation):
    """A probation that goes on until the run has begun to learn.

    λ begins at the least that it may be. A look after 20, 40, 90, 180, 360, … steps finds that E

        has fallen by a fifth, from 90 on by a hundredth:    λ starts (`start_weight_decay`);
        has not fallen by a hundredth, from 90 on:           η ← 3 η;
        has risen by a twentieth, from 90 on:                η ← η / 3.

    A loss that does not fall may also be one that no longer can: units have died, and no gradient
    reaches the weights before them. Where a matrix has less than a hundredth of its first gradient,
    though the training loss has not fallen, the run goes back, and on with η / 9; a third of that η
    is the most from now on.

    Args:
        probation: of the first steps.
        inner: of training, whose gradient shows that.
        trial: E; its optimizer learns η and λ.
        run: T and the steps of an epoch, as for `start_weight_decay`, which was called.
    """

    def __init__(
        self,
        probation: Probation,
        inner: BatchLosses,
        trial: BatchLosses,
        run: tuple[int, int | None],
    ) -> None:
        looks = list(probation.steps)
        while 2 * looks[-1] <= run[0]:
            looks.append(2 * looks[-1])
        super().__init__(probation.losses, probation.before, tuple(looks), probation.cost)
        self._inner, self._trial, self._run = inner, trial, run
        self._norms_at_first = self._norms()
        self._is_waiting = True
        optimizer, decay = self._learning("weight_decay")
        assert decay.bounds is not None
        decay.start_at([decay.bounds[0]] * len(optimizer.param_groups))
        self._loop().settings_were_set(cost=1.0)

    def look(self, steps: int) -> None:
        """Let λ start, or η move; raise `Relapsed` as every probation does, or where units died."""
        inner, outer = self.check(steps)
        share = fallen(self.before[1], outer)
        if share < TELLING and steps >= PATIENCE:
            if fallen(self.before[0], inner) < GAIN:
                self._check_gradient(steps)
            if self._is_waiting:
                self._move(GROWTH if share > -HARMLESS else 1 / GROWTH)
        elif self._is_waiting and share >= (CLEAR if steps < PATIENCE else TELLING):
            start_weight_decay(self._learning("lr")[0], *self._run)
            self._is_waiting = False

    def _check_gradient(self, steps: int) -> None:
        """Raise `Relapsed` if the weights can no longer be trained."""
        loop, lr = self._loop(), self._learning("lr")[1]
        assert lr.bounds is not None
        loop.close()
        loop.overhead += 1
        if not are_reached(self._norms(), self._norms_at_first):
            self._move(1 / GROWTH)
            lr.bound((lr.bounds[0], max(GROWTH * lr.bounds[0], lr.value.max().item())))
            raise Relapsed(f"after {steps} steps hardly any gradient reaches some of the weights")

    def _move(self, factor: float) -> None:
        """Multiply every η by this, or by as much of it as their bounds allow."""
        lr = self._learning("lr")[1]
        assert lr.bounds is not None
        present = lr.value.detach()
        lr.set(min(factor, lr.bounds[1] / present.max().item()) * present)
        lr.clamp_()
        self._loop().settings_moved()

    def _norms(self) -> list[float]:
        """Return the norms of the first batch's gradient."""
        params = params_of(self._learning("lr")[0])
        with leaving_no_trace(self._inner.model), torch.enable_grad():
            return matrix_norms(params, gradients(self._inner.of(0), params))

    def _learning(self, name: str) -> tuple[HyperOptimizer, Setting]:
        optimizer = self._trial.optimizer
        assert optimizer is not None  # this belongs to it
        setting = optimizer.hyperparameters[name]
        assert isinstance(setting, Setting)
        return optimizer, setting

    def _loop(self) -> OuterLoop:
        loop = self._learning("lr")[0]._loop
        assert loop is not None
        return loop

    def state_dict(self) -> dict[str, Any]:
        """Return what the probation has seen, and whether the run still has to begin."""
        return {
            **super().state_dict(),
            "is_waiting": self._is_waiting,
            "norms_at_first": self._norms_at_first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that over; a run that did not wait has begun."""
        super().load_state_dict(state)
        self._is_waiting = state.get("is_waiting", False)
        self._norms_at_first = state.get("norms_at_first", self._norms_at_first)
