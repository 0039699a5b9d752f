"""Φ: one training step of each optimizer as a pure function, s_t = Φ_t(s_{t-1}, λ)."""

from . import adagrad, adam, rmsprop, sgd
from .registry import (
    Dynamics,
    Inverse,
    check_learnable,
    check_options,
    dynamics_of,
    read_setting,
    register_dynamics,
    unrolled,
    write_setting,
)
from .shrinking import shrinking

__all__ = [
    "Dynamics",
    "Inverse",
    "adagrad",
    "adam",
    "check_learnable",
    "check_options",
    "dynamics_of",
    "read_setting",
    "register_dynamics",
    "rmsprop",
    "sgd",
    "shrinking",
    "unrolled",
    "write_setting",
]
