"""The schema of `configs/band/`: what a task, a base optimizer and a tier are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from experiments.schema import CNNConfig, DigitsConfig, FashionMNISTConfig, MLPConfig


@dataclass
class BreastCancerConfig:
    """scikit-learn's breast_cancer: 569 tumours, 30 measurements in random Fourier features."""

    _target_: str = "experiments.fourier_features.breast_cancer"
    features: int = 200
    width: float = 6.0  # of the Gaussian kernel, in standard deviations of a measurement
    train_size: int = 200
    validation_size: int = 120
    label_noise: float = 0.1
    split_seed: int = 0


@dataclass
class KingJamesConfig:
    """The King James Bible, for a model that predicts the next character."""

    _target_: str = "experiments.king_james.king_james"
    root: str = "data"
    context: int = 64  # characters that are predicted in one example
    train_size: int = 20_000
    validation_size: int = 200
    test_size: int = 1000
    split_seed: int = 0


@dataclass
class TransformerConfig:
    """A small causal transformer over characters."""

    _target_: str = "experiments.transformer.CharacterTransformer"
    width: int = 64
    heads: int = 4
    layers: int = 2


@dataclass
class PatchTransformerConfig(TransformerConfig):
    """A small transformer over the patches of an image."""

    _target_: str = "experiments.transformer.PatchTransformer"
    patch: int = 2
    width: int = 48


@dataclass
class NetworkConfig:
    """A small network of one of many kinds."""

    _target_: str = "experiments.networks.network"
    kind: str = MISSING  # of `experiments.networks.KINDS`


@dataclass
class TaskConfig:
    """Data, model and length of a run; all methods share them."""

    name: str = MISSING
    data: Any = MISSING
    model: Any = MISSING
    batch_size: int = 100
    epochs: int = 30
    evaluations: int = 30  # of the validation set, equally spaced, beside the one at the start
    bases: list[str] = field(default_factory=lambda: ["sgd", "adamw"])
    together: int = 1  # fixed runs that train in one stack, where the model is a perceptron


@dataclass
class GridConfig:
    """The box that grid, random search and TPE search for one base optimizer."""

    lr: list[float] = MISSING
    weight_decay: list[float] = MISSING


def _sgd_grid() -> GridConfig:
    return GridConfig(
        lr=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
        weight_decay=[1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    )


def _adamw_grid() -> GridConfig:
    return GridConfig(
        lr=[1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        weight_decay=[1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0],
    )


@dataclass
class SizeConfig:
    """How much of everything is run on one task."""

    seeds: list[int] = MISSING
    start_lr: list[float] = MISSING  # η₀
    start_weight_decay: list[float] = MISSING  # λ₀
    grid_every: int = 1  # 2 takes every other η and λ of the grid
    random: int = 0  # runs of random search
    tpe: int = 0  # runs of Optuna's TPE
    schedules: list[str] = field(default_factory=lambda: ["constant", "linear", "cosine"])


@dataclass
class TierConfig:
    """Which tasks and methods, and how much of each."""

    name: str = MISSING
    tasks: list[str] = MISSING
    methods: list[str] = MISSING
    bases: list[str] = MISSING
    size: SizeConfig = field(default_factory=SizeConfig)
    smaller: dict[str, Any] = field(default_factory=dict)  # by task: fields of `size` that differ


@dataclass
class BandConfig:
    """One call of `python -m experiments.band`."""

    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"tier": "quick"},
            {"task": None},
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
        ]
    )
    tier: Any = MISSING
    task: Any = None  # None: all of the tier
    sgd: GridConfig = field(default_factory=_sgd_grid)
    adamw: GridConfig = field(default_factory=_adamw_grid)
    methods: list[str] | None = None  # None: all of the tier
    report: list[str] | None = None  # run nothing; the library's own rows are of these codes
    workers: int = 2
    root: str = "runs/band"


CHOICES: dict[str, dict[str, type]] = {
    "tier": {"tier": TierConfig},
    "task": {"task": TaskConfig},
    "task/data": {
        "breast_cancer": BreastCancerConfig,
        "digits": DigitsConfig,
        "fashion_mnist": FashionMNISTConfig,
        "king_james": KingJamesConfig,
    },
    "task/model": {
        "cnn": CNNConfig,
        "mlp": MLPConfig,
        "network": NetworkConfig,
        "patches": PatchTransformerConfig,
        "transformer": TransformerConfig,
    },
}
_CHOSEN = [node for choices in CHOICES.values() for node in choices.values()]
NODES: list[type] = [BandConfig, GridConfig, SizeConfig, *_CHOSEN]
