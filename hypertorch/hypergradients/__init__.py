"""dE/dλ by every method of the literature: one method per file, one interface."""

from .engine import Carried, Engine, OuterLoss, Training, TrainingStep, Window
from .unroll import Unroll

__all__ = [
    "Carried",
    "Engine",
    "OuterLoss",
    "Training",
    "TrainingStep",
    "Unroll",
    "Window",
]
