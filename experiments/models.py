"""The models: a perceptron, a small convolutional network, and torchvision's ResNet-18."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from experiments.config_errors import ConfigError
from experiments.vision import torchvision


class MLP(nn.Sequential):
    """Flatten, then linear layers with ReLU between them.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
        hidden: width of each hidden layer.

    Raises:
        ConfigError: for a width below 1.
    """

    def __init__(self, image_shape: Sequence[int], classes: int, hidden: Sequence[int]) -> None:
        _check_widths("hidden", hidden)
        widths = [math.prod(image_shape), *hidden, classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


class SmallCNN(nn.Sequential):
    """Blocks of 3×3 convolution, BatchNorm, ReLU and 2×2 max pooling, then one linear layer.

    Args:
        image_shape: channels, height, width; each block halves height and width.
        classes: number of outputs.
        channels: output channels of each block.

    Raises:
        ConfigError: for no block, one of less than 1 channel, or more than the image can be halved.
    """

    def __init__(self, image_shape: Sequence[int], classes: int, channels: Sequence[int]) -> None:
        _check_widths("channels", channels)
        most = min(image_shape[1:]).bit_length() - 1
        if not 1 <= len(channels) <= most:
            raise ConfigError(
                f"`model.channels` does not fit the images. Got {list(channels)} for "
                f"{image_shape[1]}×{image_shape[2]} pixels. Name from 1 to {most} numbers."
            )
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([image_shape[0], *channels]):
            layers += _block(inputs, outputs)
        height, width = (side >> len(channels) for side in image_shape[1:])
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, classes))


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if any(width < 1 for width in widths):
        raise ConfigError(
            f"`model.{name}` must be positive. Got {list(widths)}. Choose numbers from 1 on."
        )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


def resnet18(image_shape: Sequence[int], classes: int) -> nn.Module:
    """torchvision's ResNet-18 for small images: a 3×3 stem of stride 1, and no max pooling.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.

    Returns:
        The model with fresh weights.
    """
    torchvision()
    from torchvision.models import resnet18 as build

    model: nn.Module = build(num_classes=classes)
    model.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
