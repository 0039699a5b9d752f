"""dE/dλ by every method of the literature: one method per file, one interface."""

from .displacement import Displacement
from .engine import Carried, Engine, OuterLoss, Training, TrainingStep, Window
from .evolution import Evolution
from .finite_differences import FiniteDifferences
from .first_order import FirstOrder
from .forward import Forward
from .implicit import Implicit
from .one_step import OneStep
from .per_hyperparameter import PerHyperparameter
from .replay import Replay
from .unroll import Unroll

__all__ = [
    "Carried",
    "Displacement",
    "Engine",
    "Evolution",
    "FiniteDifferences",
    "FirstOrder",
    "Forward",
    "Implicit",
    "OneStep",
    "OuterLoss",
    "PerHyperparameter",
    "Replay",
    "Training",
    "TrainingStep",
    "Unroll",
    "Window",
]
