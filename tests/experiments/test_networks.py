"""The models: shapes, and torchvision beside a torch that its wheel was not built for."""

import pytest
import torch

from experiments.band.config import load_tasks
from experiments.config_errors import ConfigError
from experiments.models import MLP, SmallCNN, resnet18
from experiments.networks import KINDS, network
from experiments.vision import torchvision


@pytest.mark.parametrize(
    "model",
    [
        MLP((1, 8, 8), 10, [16, 16]),
        SmallCNN((1, 8, 8), 10, [4, 8]),
        pytest.param(lambda x: resnet18((1, 8, 8), 10)(x), id="resnet18"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_maps_images_to_one_logit_per_class(model):
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_answers_each_image_for_itself(kind):
    model, images = network((1, 8, 8), 10, kind).eval(), torch.randn(3, 1, 8, 8)
    together = model(images)
    assert together.shape == (3, 10)
    alone = torch.cat([model(images[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(together, alone)
    assert (together[0] - together[1]).abs().max() > 0  # and what it sees counts
    together.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_kind_of_network_is_a_task_of_the_tier():
    tasks = load_tasks(["tier=networks"])
    kinds = {task.model.kind for name, task in tasks.items() if name != "digits_patches"}
    assert kinds == set(KINDS)
    assert all(name == f"digits_{t.model.get('kind', 'patches')}" for name, t in tasks.items())


def test_an_unknown_kind_is_refused_with_a_name_that_is_like_it():
    with pytest.raises(ConfigError, match="Did you mean `lstm`"):
        network((1, 8, 8), 10, "lstn")


def test_torchvision_imports_more_than_once():
    assert torchvision() is torchvision()
