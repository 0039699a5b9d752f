"""hypertorch learns a model's hyperparameters while the model trains.

`HyperOptimizer` wraps a torch optimizer: windows of training steps are differentiated, and the
learning rate, the weight decay and any other hyperparameter follow the hypergradient of an outer
loss, usually the validation loss.
"""

from . import bilevel, constraints
from .any_start import from_any_start
from .bilevel import HOAG
from .calibration import calibrated_cross_entropy
from .check import check_hypergradient
from .constraints import interval, positive, real, simplex, unit_interval
from .dynamics import Inverse, register_dynamics
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    DivergenceError,
    HypertorchError,
    HypertorchWarning,
    SolverError,
    UnsupportedError,
    WindowError,
)
from .forgetting import start_weight_decay
from .functional import hypergradient
from .hypergradients import (
    Displacement,
    Engine,
    Evolution,
    FiniteDifferences,
    FirstOrder,
    Forward,
    Implicit,
    OneStep,
    PerHyperparameter,
    Replay,
    Unroll,
)
from .hypergradients.linear_solvers import (
    ConjugateGradient,
    FixedPoint,
    Lanczos,
    NormalConjugateGradient,
)
from .hypergradients.nystrom import Nystrom
from .hyperparameters import Hyperparameter
from .optimizer import HyperOptimizer
from .outer import GatedSign
from .safeguards import Safeguards
from .trials import search_lr
from .validation import ValidationLoss

__all__ = [
    "HOAG",
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "ConjugateGradient",
    "Displacement",
    "DivergenceError",
    "Engine",
    "Evolution",
    "FiniteDifferences",
    "FirstOrder",
    "FixedPoint",
    "Forward",
    "GatedSign",
    "HyperOptimizer",
    "Hyperparameter",
    "HypertorchError",
    "HypertorchWarning",
    "Implicit",
    "Inverse",
    "Lanczos",
    "NormalConjugateGradient",
    "Nystrom",
    "OneStep",
    "PerHyperparameter",
    "Replay",
    "Safeguards",
    "SolverError",
    "Unroll",
    "UnsupportedError",
    "ValidationLoss",
    "WindowError",
    "bilevel",
    "calibrated_cross_entropy",
    "check_hypergradient",
    "constraints",
    "from_any_start",
    "hypergradient",
    "interval",
    "positive",
    "real",
    "register_dynamics",
    "search_lr",
    "simplex",
    "start_weight_decay",
    "unit_interval",
]
__version__ = "0.1.0"
