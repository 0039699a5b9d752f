"""The schema of the studies: one dataclass each, which `configs/experiment/<name>.yaml` chooses.

`_target_` is the study's function `(config, folder, progress) -> summary`; `uses` names the groups
of the training loop that it reads besides (`task`, …), and every other one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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


STUDIES: dict[str, type] = {"hoag": HOAGConfig, "ridge": RidgeConfig}
