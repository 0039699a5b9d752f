"""What a weight decay λ does to a weight: a step shrinks it by η̂ λ, once momentum has settled."""

from collections.abc import Mapping
from typing import Any

from .registry import Dynamics
from .sgd import sgd


def shrinking(dynamics: Dynamics, group: Mapping[str, Any]) -> float | None:
    """Return η̂ / η of a param group: (1 − d) / (1 − μ) for SGD, 1 where the decay is decoupled.

    `None` where the decay passes through a second moment, which hides what it does.
    """
    if dynamics.update is sgd:
        dampening = float(group["dampening"]) if group["momentum"] else 0.0
        return (1 - dampening) / (1 - float(group["momentum"]))
    return 1.0 if group.get("decoupled_weight_decay") else None
