"""The models: shapes, and torchvision beside a torch that its wheel was not built for."""

import pytest
import torch

from experiments.models import MLP, SmallCNN, resnet18
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


def test_torchvision_imports_more_than_once():
    assert torchvision() is torchvision()
