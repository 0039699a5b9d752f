"""The benchmark's own data and model: Fourier features, the King James text, a transformer."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.config_errors import ConfigError
from experiments.evaluation import evaluate
from experiments.fourier_features import breast_cancer
from experiments.king_james import king_james, read_text
from experiments.loaders import Examples
from experiments.transformer import CharacterTransformer, PatchTransformer

VERSES = "Ge1:1 In the beginning\nGe1:2 And the earth\nRe22:21 Amen.\n"


def test_random_features_approach_the_gaussian_kernel():
    few, many = (breast_cancer(features=n, width=12.0) for n in (200, 40_000))
    x = many.validation.x[:20].double()
    kernel = x @ x.t() / 40_000
    assert torch.diagonal(kernel) == pytest.approx(1.0, abs=0.03)  # 3/√features
    assert 0.1 < kernel.min() < 0.9
    rough = few.validation.x[:20].double()
    assert (rough @ rough.t() / 200 - kernel).abs().max() < 0.4  # the same kernel, more noise


def test_label_noise_stays_in_the_training_labels():
    clean, noisy = breast_cancer(label_noise=0.0), breast_cancer(label_noise=0.2)
    assert (clean.train.y != noisy.train.y).sum() == 40
    assert torch.equal(clean.validation.y, noisy.validation.y)
    assert torch.equal(clean.test.y, noisy.test.y)
    assert len(clean.train.y) + len(clean.validation.y) + len(clean.test.y) == 569


def test_a_split_that_leaves_nothing_to_test_on_is_refused():
    with pytest.raises(ConfigError, match="569 examples"):
        breast_cancer(train_size=500, validation_size=69)


@pytest.mark.parametrize(
    ("load", "name", "size"),
    [
        (breast_cancer, "train_size", -5),
        (breast_cancer, "train_size", 0),
        (breast_cancer, "validation_size", 0),
        (breast_cancer, "features", 0),
        (king_james, "train_size", 0),
        (king_james, "validation_size", -1),
        (king_james, "test_size", 0),
        (king_james, "context", 0),
    ],
)
def test_a_part_without_examples_is_refused(tmp_path, load, name, size):
    root = {"root": str(tmp_path)} if load is king_james else {}
    with pytest.raises(ConfigError) as caught:
        load(**root, **{name: size})
    assert str(caught.value) == f"`task.{name}` is too small. Got {size}. Choose 1 or more."


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A program that prints verses as Debian's `bible` does."""
    program = tmp_path / "bin" / "bible"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{VERSES}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    return program


def test_the_text_loses_its_references_and_is_kept(tmp_path, reader):
    text = "In the beginning\nAnd the earth\nAmen.\n"
    assert read_text(tmp_path / "data") == text
    reader.unlink()
    assert read_text(tmp_path / "data") == text


def test_two_processes_may_read_the_text_at_once(tmp_path, reader, monkeypatch):
    """The other one begins and ends while this one keeps the text."""
    write, root = Path.write_text, tmp_path / "data"
    script = "import sys; from experiments.king_james import *; read_text(Path(sys.argv[1]))"

    def written(path, text):
        write(path, text)
        subprocess.run([sys.executable, "-c", script, str(root)], check=True, timeout=120)

    monkeypatch.setattr(Path, "write_text", written)
    assert read_text(root) == "In the beginning\nAnd the earth\nAmen.\n"
    assert [file.name for file in root.iterdir()] == ["king_james.txt"]


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="package `bible-kjv-text`"):
        read_text(tmp_path)


def test_pieces_are_shifted_by_one_and_do_not_overlap(tmp_path, reader):
    task = king_james(str(tmp_path), 4, train_size=3, validation_size=2, test_size=2)
    characters = sorted(set("In the beginning\nAnd the earth\nAmen.\n"))
    assert task.classes == len(characters)
    pieces = set()
    for part in (task.train, task.validation, task.test):
        assert torch.equal(part.x[:, 1:], part.y[:, :-1])
        whole = torch.cat([part.x, part.y[:, -1:]], 1).tolist()
        pieces |= {"".join(characters[i] for i in piece) for piece in whole}
    text = "In the beginning\nAnd the earth\nAmen.\n"
    assert pieces == {text[i : i + 5] for i in range(0, 35, 5)}
    with pytest.raises(ConfigError, match="there are 7"):
        king_james(str(tmp_path), 4, train_size=6, validation_size=1, test_size=1)


def test_the_transformer_sees_only_the_past():
    model = CharacterTransformer((6,), classes=5, width=8, heads=2).double()
    x = torch.randint(5, (3, 6))
    changed = x.clone()
    changed[:, 4] = (x[:, 4] + 1) % 5
    before, after = model(x), model(changed)
    assert before.shape == (3, 5, 6)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4], after[:, :, 4])


def test_every_patch_of_an_image_counts_and_knows_its_place():
    model = PatchTransformer((2, 4, 6), classes=5, patch=2, width=8, heads=2).double()
    image = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    logits = model(image)
    assert logits.shape == (1, 5)
    (slope,) = torch.autograd.grad(logits[0, 0], image)
    assert (slope != 0).all()
    assert not torch.allclose(model(image.roll(2, dims=3)), logits)  # the patches, moved
    with pytest.raises(ConfigError, match=r"must divide the image. Got 4 for 4×6 pixels"):
        PatchTransformer((2, 4, 6), classes=5, patch=4)


def test_accuracy_counts_every_character():
    model = CharacterTransformer((6,), classes=5, width=8, heads=2)
    x, y = torch.randint(5, (2, 40, 6))
    loss, accuracy = evaluate(model, Examples(x, y))
    assert accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
