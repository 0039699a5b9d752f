"""Steps taken back: s_{t-1} = Φ_t⁻¹(s_t), for dynamics that have an inverse.

The gradient it needs, at w_{t-1}, is the one that reverse mode computes there anyway: a state that
was not stored costs no gradient to find. Rounding grows on the way, so it is short, and where it
arrives at a stored state it is compared with it.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..state import State
from ..transition import Gradients, Transition
from .engine import Training

#: How far rounding may grow on the way: by five of a number's 24 or 53 bits; and how far off it may
#: arrive, in units of the last bit.
MOST_GROWTH, MOST_OFF = 32.0, 256.0

#: How large module buffers may be, over a state: those before each step are kept.
MOST_BUFFERS = 1 / 64


class Astray(Exception):
    """The way back does not lead to the stored state."""


def reach(training: Training) -> float:
    """Return how many steps back may be taken from a state; 0 where Φ has no inverse.

    Args:
        training: what is trained and learned; μ is taken as it is now.

    Cost: at most one number is read from the device.
    """
    inverse, optimizer = training.dynamics.inverse, training.optimizer
    state = State.of(optimizer)
    is_exact = {p.dtype for p in state.params} <= {torch.float32, torch.float64}
    kept = sum(b.numel() * b.element_size() for b in training.slots.model.buffers())
    if inverse is None or not is_exact or kept > MOST_BUFFERS * state.nbytes:
        return 0
    groups = optimizer.param_groups
    now = Transition(training.dynamics, groups, training.settings, [1.0] * len(groups))
    growth = _largest([inverse.growth(**own) for own in now.parameter_settings()])
    if not math.isfinite(growth):
        return 0
    return math.log(MOST_GROWTH) / math.log(growth) if growth > 1 else math.inf


def _largest(numbers: Sequence[float | Tensor]) -> float:
    """Return the largest of numbers and of the entries of tensors; 0 where there are none."""
    tensors = [n.detach().max() for n in numbers if isinstance(n, Tensor) and n.numel()]
    known = [float(n) for n in numbers if not isinstance(n, Tensor)]
    return max([*known, *([float(torch.stack(tensors).max())] if tensors else [])], default=0.0)


def is_short(transitions: Iterable[Transition]) -> bool:
    """Return whether steps together magnify rounding little, with the μ that schedules gave them.

    What is learned does not move within a window: `reach` has seen to it.
    """
    growth = 1.0
    for transition in transitions:
        inverse, settings = transition.dynamics.inverse, transition.dynamics.settings
        assert inverse is not None
        growth *= _largest([inverse.growth(**settings(group, 0)) for group in transition.groups])
    return growth <= MOST_GROWTH


class StepBack:
    """One step taken back, in the two parts in which it can be: weights, and then their buffers.

    Args:
        transition: Φ_t.
        after: s_t, which is written to.
        moved: whether each parameter had a gradient in step t; the others are where they were.

    Attributes:
        params: w_{t-1}.
    """

    def __init__(self, transition: Transition, after: State, moved: Sequence[bool]) -> None:
        assert transition.dynamics.inverse is not None
        self._inverse, self._after = transition.dynamics.inverse, after
        self._settings = transition.parameter_settings()
        with torch.no_grad():
            self.params = [
                self._inverse.param(param, buffers, **own) if has_moved else param
                for param, buffers, own, has_moved in zip(
                    after.params, after.buffers, self._settings, moved, strict=True
                )
            ]

    def state(self, grads: Gradients) -> State:
        """Return s_{t-1}, given ∇L(w_{t-1}), which is `None` where a parameter did not move."""
        with torch.no_grad():
            buffers = [
                old if grad is None else self._inverse.buffers(param, grad, old, **own)
                for param, grad, old, own in zip(
                    self.params, grads, self._after.buffers, self._settings, strict=True
                )
            ]
        return State(self.params, buffers)


def check_arrival(found: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
    """Raise unless weights that were found are, to rounding, those that were stored.

    Raises:
        Astray: they are not, such as where weights jump, and are lost in later ones' rounding.

    Cost: two passes over the weights, and one number read from the device.
    """
    within = [
        torch.dist(a, b) <= MOST_OFF * torch.finfo(b.dtype).eps * torch.linalg.vector_norm(b)
        for a, b in zip(found, stored, strict=True)
    ]
    if not torch.stack([w.to(within[0].device) for w in within]).all():
        raise Astray
