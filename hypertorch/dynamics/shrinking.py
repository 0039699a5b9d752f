"""What a weight decay λ does to a weight: a step shrinks it by η̂ λ, once momentum has settled."""

from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from .registry import Dynamics
from .sgd import sgd


def shrinking(dynamics: Dynamics, group: Mapping[str, Any]) -> float | None:
    """Return η̂ / η of a param group: (1 − d) / (1 − μ) for SGD, 1 where the decay is decoupled.

    `None` where the decay passes through a second moment, which hides what it does.

    Raises:
        ArgumentError: momentum or dampening are 1 or above, and nothing settles.
    """
    if dynamics.update is sgd:
        momentum = _below_1(group, "momentum")
        return (1 - _below_1(group, "dampening")) / (1 - momentum) if momentum else 1.0
    return 1.0 if group.get("decoupled_weight_decay") else None


def _below_1(group: Mapping[str, Any], name: str) -> float:
    number = float(group[name])
    if not number < 1:
        raise ArgumentError(
            f"`{name}` of SGD must be below 1, for a weight decay to shrink the weights. "
            f"Got {number:g}. Use momentum=0.9 and dampening=0."
        )
    return number
