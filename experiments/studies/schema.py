"""The schema of the studies: one dataclass each, which `configs/experiment/<name>.yaml` chooses.

`_target_` is the study's function `(config, folder, progress) -> summary`; `uses` names the groups
of the training loop that it reads besides (`task`, …), and every other one is refused. A
whole number, alone or in a list, is at least 1, but for `seeds` and where `least` says otherwise.
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
    least: ClassVar[dict[str, int]] = {"points": 2}
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
class CleaningConfig:
    """Data hyper-cleaning: one weight per training example, half of which have wrong labels."""

    _target_: str = "experiments.studies.cleaning.run"
    seeds: list[int] = field(  # splits, wrong labels; on 0 to 3 the settings were chosen
        default_factory=lambda: [4, 5, 6, 7, 8, 9]
    )
    data: list[str] = field(default_factory=lambda: ["fashion_mnist", "mnist"])
    images: list[int] = field(default_factory=lambda: [5000, 1250])  # test has twice as many
    noise: float = 0.5  # fraction of wrong labels
    steps: int = 200  # of the one run and of every final training
    lr: float = 0.01
    momentum: float = 0.95  # of the final training: as far as 4000 steps without
    window: int = 20  # steps from one online update to the next, all of them differentiated
    online_momentum: float = 0.9  # of the one run
    online_rate: float = 4.0  # of its outer rule, times n
    updates: int = 20  # of the nested scheme
    horizon: int = 50  # steps of its trainings
    nested_momentum: float = 0.8  # of these
    nested_rate: float = 1.0  # of its outer rule, times n
    root: str = "data"  # torchvision's folder
    archives: str = "/usr/share/datasets/fashion-mnist"  # unzipped into `root` if that lacks them


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
class InputsConfig:
    """One λ per input of linear models, and which inputs it switches off."""

    _target_: str = "experiments.studies.inputs.run"
    least: ClassVar[dict[str, int]] = {"artificial": 0, "folds": 2}
    seeds: list[int] = field(  # splits; on 0 to 4 the settings were chosen
        default_factory=lambda: [5, 6, 7, 8, 9, 10, 11, 12]
    )
    artificial: int = 10  # inputs that are shuffled copies of real ones
    folds: int = 5
    steps: int = 100  # iterations of HOAG
    tolerance: float = 1e-6  # of the inner problem and of the linear system
    points: int = 28  # of each search
    truncations: list[int] = field(default_factory=lambda: [3, 10, 30, 100, 300, 1000])
    truncated_at: float = 1.0  # every λ there


@dataclass
class MixingConfig:
    """The mixing weight α of clean and adversarial losses, learned; and one per example."""

    _target_: str = "experiments.studies.mixing.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    least: ClassVar[dict[str, int]] = {"update_every": 5}  # a window of the library
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


@dataclass
class ConstraintSetConfig:
    """(η, μ) kept in a box by projection and by transform."""

    _target_: str = "experiments.studies.constraint_set.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    least: ClassVar[dict[str, int]] = {"polish": 0}
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the split and the weights
    hidden: int = 16
    steps: int = 60  # T
    updates: int = 30  # trainings of a run
    points: int = 11  # along each axis of the surface
    polish: int = 100  # trainings of the search for the least E
    target: float = 1e-3  # of E, above the least, in nats


@dataclass
class ForwardReverseConfig:
    """Forward and reverse hypergradients: agreement, time and memory."""

    _target_: str = "experiments.studies.forward_reverse.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    least: ClassVar[dict[str, int]] = {"limit": 0}
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the split and the weights
    hidden: int = 30
    rate: float = 0.1  # η
    momentum: float = 0.9
    compare_up_to: int = 64  # T beyond which only cost is measured
    horizons: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256])
    counts: list[int] = field(default_factory=lambda: [1, 5, 50, 500])
    count_steps: int = 5  # T while m varies
    rounds: int = 3  # how often each is timed
    limit: int = 1000  # the most numbers that Forward is asked for


@dataclass
class RealTimeConfig:
    """η and μ in one run by forward mode in real time, by restarted trainings, and by a grid."""

    _target_: str = "experiments.studies.real_time.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of split, weights and batches
    hidden: int = 32
    steps: int = 400
    batch_size: int = 100
    rate: float = 0.003  # η at the start
    momentum: float = 0.5  # μ at the start
    decays: list[float] = field(default_factory=lambda: [1.0, 0.98, 0.9, 0.0])  # γ
    every: list[int] = field(default_factory=lambda: [5, 20])  # Δ
    restarts: int = 20  # trainings that are differentiated
    grid_rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3])
    grid_momenta: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.9, 0.98])


@dataclass
class SchedulesConfig:
    """A learning rate per step and layer, learned; beside searched constants and decays."""

    _target_: str = "experiments.studies.schedules.run"
    uses: ClassVar[tuple[str, ...]] = ("task",)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of split, weights and batches
    hidden: list[int] = field(default_factory=lambda: [50, 50])
    steps: int = 100  # T
    batch_size: int = 100
    momentum: float = 0.9
    start: float = 0.02  # η of every step before learning
    updates: int = 40  # trainings that are differentiated
    outer_rate: float = 0.1  # of Adam on log η
    rates: list[float] = field(default_factory=lambda: [0.01, 0.5])  # that are searched
    points: int = 13  # of the grid, for each shape
    fresh_starts: int = 5  # other weights and orders of batches


@dataclass
class DropoutTaskConfig:
    """A perceptron with dropout on few images: what the two studies on it share."""

    uses: ClassVar[tuple[str, ...]] = ("task",)
    least: ClassVar[dict[str, int]] = {"warm_up": 0}
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of split, weights, batches, noise
    hidden: int = 64  # units in each of two layers
    steps: int = 800
    batch_size: int = 50
    lr: float = 0.02
    validation_batch_size: int = 100  # of the outer losses
    evaluate_every: int = 20  # steps
    response_rate: float = 0.02  # of the self-tuning network's Adam on ρ
    warm_up: int = 50  # steps before it moves ρ
    input_rates: list[float] = field(default_factory=lambda: [0.05, 0.3, 0.5])  # of the grid
    hidden_rates: list[float] = field(default_factory=lambda: [0.05, 0.3, 0.5])


@dataclass
class SelfTuningConfig(DropoutTaskConfig):
    """Dropout rates and λ by a response network, by the hypergradient, and by a grid."""

    _target_: str = "experiments.studies.self_tuning.run"
    decays: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2])  # of the grid
    low: list[float] = field(default_factory=lambda: [0.05, 0.05, 1e-4])  # both rates and λ
    high: list[float] = field(default_factory=lambda: [0.7, 0.7, 3e-2])
    real_time_every: int = 20  # steps between outer updates of forward mode in real time


@dataclass
class BlackBoxConfig(DropoutTaskConfig):
    """Dropout through its sampling and shifts by whole pixels, by evolution strategies."""

    _target_: str = "experiments.studies.black_box.run"
    weight_decay: float = 1e-4
    input_rates: list[float] = field(default_factory=lambda: [0.05, 0.3])  # of the grid
    hidden_rates: list[float] = field(default_factory=lambda: [0.05, 0.3])
    shifts: list[float] = field(default_factory=lambda: [0.01, 0.2, 0.4, 0.6, 1.0])  # σ
    low: list[float] = field(default_factory=lambda: [0.05, 0.05, 0.2])  # both rates and σ
    high: list[float] = field(default_factory=lambda: [0.5, 0.5, 1.5])
    pairs: int = 4  # of particles
    scale: float = 0.3  # of their perturbations, in logits
    window: int = 10  # steps
    reset_every: int = 10  # windows after which PES's particles start anew


@dataclass
class CalibrationConfig:
    """λ judged by validation cross-entropy, or by the least one over all temperatures."""

    _target_: str = "experiments.studies.calibration.run"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of split, weights and batches
    rates: dict[str, list[float]] = field(  # η for each task of the benchmark
        default_factory=lambda: {
            "digits_noisy": [0.01, 0.03, 0.1],
            "breast_cancer": [0.003, 0.01, 0.03],
        }
    )
    decays: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0]
    )
    epochs: int | None = None  # None: the task's own
    windows: list[int] = field(default_factory=lambda: [5, 20, 60])  # K
    states: int = 8  # of a run, in which windows are differentiated
    factors: list[float] = field(  # λ of these runs, as a multiple of the best one
        default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0]
    )


STUDIES: dict[str, type] = {
    "black_box": BlackBoxConfig,
    "calibration": CalibrationConfig,
    "cleaning": CleaningConfig,
    "constraint_set": ConstraintSetConfig,
    "forward_reverse": ForwardReverseConfig,
    "hoag": HOAGConfig,
    "inputs": InputsConfig,
    "mixing": MixingConfig,
    "nielsen": NielsenConfig,
    "real_time": RealTimeConfig,
    "ridge": RidgeConfig,
    "schedules": SchedulesConfig,
    "self_tuning": SelfTuningConfig,
}
