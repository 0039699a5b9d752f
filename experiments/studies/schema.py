"""The schema of the studies: one dataclass each, which `configs/experiment/<name>.yaml` chooses.

`_target_` is the study's function `(config, folder, progress) -> summary`; `uses` names the groups
of the training loop that it reads besides (`task`, …), and every other one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class RidgeConfig:
    """Validation error of ridge and lasso regression against λ, on the diabetes data."""

    _target_: str = "experiments.studies.ridge.run"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])  # each a split of its own
    points: int = 121  # λ on each curve and in the grid of cross-validation
    window: int = 300  # steps, long enough for a root without bias
    updates: int = 30  # outer updates of each run
    momentum: float = 0.9
    short_windows: list[int] = field(default_factory=lambda: [1, 3, 10, 30, 100])
    update_every: int = 100  # steps between outer updates with a short window


@dataclass
class NielsenConfig:
    """λ and η of Nielsen's sigmoid network by gradient descent, and by brute force."""

    _target_: str = "experiments.studies.nielsen.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the split and the weights
    hidden: int = 30
    steps: int = 150  # of one training; all of them are differentiated together
    updates: int = 25  # outer updates of each path
    points: int = 17  # along each axis of the surface
    joint_steps: int = 600  # of the run that learns λ on the training cost
    joint_rate: float = 0.05  # its outer learning rate
    long_decay: float = 3.0  # λ of the slice over η
    long_points: int = 7
    long_steps: list[int] = field(default_factory=lambda: [30, 100, 300, 1000, 3000, 10000])


@dataclass
class HOAGConfig:
    """HOAG against search and unrolling on four data sets."""

    _target_: str = "experiments.studies.hoag.run"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # splits, starts, random choices
    steps: int = 30  # iterations of HOAG, outer updates of unrolling
    evaluations: int = 36  # of each search
    search_tolerance: float = 1e-4  # of the inner problem, relative to its first gradient
    window: int = 100  # steps of gradient descent that are unrolled together
    limit: float = 8.0  # seconds after which a method is stopped
    points: int = 25  # of the grid on which the least f is looked for first
    target: float = 1e-3  # of f / least f − 1
    images: int = 1000  # of Fashion-MNIST, for training and for validation each
    root: str = "data"  # torchvision's folder
    archives: str = "/usr/share/datasets/fashion-mnist"  # unzipped into `root` if that lacks them


@dataclass
class MixingConfig:
    """The mixing weight α of clean and adversarial losses, learned; and one per example."""

    _target_: str = "experiments.studies.mixing.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of split, weights and batches
    attack: float = 0.1  # ε, as a fraction of the range of the pixels
    hidden: int = 64
    steps: int = 600
    batch_size: int = 100
    lr: float = 0.05
    grid: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    trace_every: int = 10  # steps between the points of a learned α in the figure
    many_examples: int = 500  # of training, each with an α of its own
    many_batch_size: int = 250
    few_images: int = 100  # of validation, on which these are learned
    update_every: int = 10  # steps between outer updates there


STUDIES: dict[str, type] = {
    "hoag": HOAGConfig,
    "mixing": MixingConfig,
    "nielsen": NielsenConfig,
    "ridge": RidgeConfig,
}
