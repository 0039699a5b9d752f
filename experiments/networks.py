"""Small networks of many kinds for images of 8×8 pixels, as people build them.

None has been chosen for being easy to train: deep ones lie on plateaus, recurrent ones read rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiments.config_errors import ConfigError, did_you_mean
from experiments.transformer import SPREAD

WIDTH, CHANNELS = 64, 16


def network(image_shape: Sequence[int], classes: int, kind: str) -> nn.Module:
    """A network of a kind, with torch's own initial weights.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
        kind: a key of `KINDS`.

    Returns:
        The model.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"`model.kind`: there is no `{kind}`.{did_you_mean(kind, KINDS)}")
    return KINDS[kind](image_shape, classes)


def perceptron(
    image_shape: Sequence[int],
    classes: int,
    hidden: Sequence[int],
    between: Callable[[int], Sequence[nn.Module]],
) -> nn.Sequential:
    """Linear layers, and after each but the last what `between` returns for its width."""
    widths = [math.prod(image_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *between(outputs)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def plain_cnn(image_shape: Sequence[int], classes: int) -> nn.Sequential:
    """Three 3×3 convolutions, the last two of stride 2, without normalisation."""
    first, second = CHANNELS, 2 * CHANNELS
    side = math.ceil(math.ceil(image_shape[1] / 2) / 2)
    return nn.Sequential(
        nn.Conv2d(image_shape[0], first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(second, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * side**2, classes),
    )


class ResNet(nn.Module):
    """Two residual blocks before the mean over pixels.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
        norm: for so many channels, before each ReLU.
    """

    def __init__(
        self, image_shape: Sequence[int], classes: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList([self._block(norm) for _ in range(2)])
        self.readout = nn.Linear(CHANNELS, classes)

    def _block(self, norm: Callable[[int], nn.Module]) -> nn.Sequential:
        parts = [
            (norm(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
            for _ in range(2)
        ]
        return nn.Sequential(*itertools.chain(*parts))

    def forward(self, images: Tensor) -> Tensor:
        """The logits, `(n, classes)`, of images `(n, channels, height, width)`."""
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.readout(x.relu().mean((2, 3)))
        return logits


class RowReader(nn.Module):
    """A recurrent network over the rows of an image, and a readout of its last state.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
        cell: `nn.LSTM` or `nn.GRU`, or another that reads batches first.
    """

    def __init__(
        self, image_shape: Sequence[int], classes: int, cell: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.cell = cell(image_shape[0] * image_shape[2], WIDTH, batch_first=True)
        self.readout = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, `(n, classes)`, of images `(n, channels, height, width)`."""
        states, _ = self.cell(images.transpose(1, 2).flatten(2))
        logits: Tensor = self.readout(states[:, -1])
        return logits


class RowTransformer(nn.Module):
    """torch's own transformer layers over the rows of an image, with its dropout.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
        norm_first: LayerNorm before attention and perceptron; else after them.
    """

    def __init__(self, image_shape: Sequence[int], classes: int, norm_first: bool) -> None:
        super().__init__()
        width = 48
        self.embedding = nn.Linear(image_shape[0] * image_shape[2], width)
        self.position = nn.Parameter(SPREAD * torch.randn(image_shape[1], width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=norm_first
        )
        self.stream = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.readout = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, `(n, classes)`, of images `(n, channels, height, width)`."""
        x = self.embedding(images.transpose(1, 2).flatten(2)) + self.position
        logits: Tensor = self.readout(self.stream(x).mean(1))
        return logits


class Mixer(nn.Module):
    """An MLP-mixer over patches of 2×2 pixels.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
    """

    def __init__(self, image_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        count, size = (height // 2) * (width // 2), 32
        self.patches = nn.Unfold(2, stride=2)
        self.embedding = nn.Linear(4 * channels, size)
        self.across = nn.ModuleList([_mixing(count) for _ in range(2)])
        self.within = nn.ModuleList([_mixing(size) for _ in range(2)])
        self.readout = nn.Linear(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, `(n, classes)`, of images `(n, channels, height, width)`."""
        x = self.embedding(self.patches(images).transpose(1, 2))
        for across, within in zip(self.across, self.within, strict=True):
            x = x + across(x.transpose(1, 2)).transpose(1, 2)
            x = x + within(x)
        logits: Tensor = self.readout(x.mean(1))
        return logits


def _mixing(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


#: By name, a function of image shape and number of classes.
KINDS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "deep": lambda s, c: perceptron(s, c, [WIDTH] * 6, lambda _: [nn.ReLU()]),
    "tanh": lambda s, c: perceptron(s, c, [WIDTH] * 6, lambda _: [nn.Tanh()]),
    "sigmoid": lambda s, c: perceptron(s, c, [WIDTH] * 3, lambda _: [nn.Sigmoid()]),
    "layer_norm": lambda s, c: perceptron(
        s, c, [2 * WIDTH] * 2, lambda width: [nn.LayerNorm(width), nn.ReLU()]
    ),
    "dropout": lambda s, c: perceptron(
        s, c, [4 * WIDTH] * 2, lambda _: [nn.ReLU(), nn.Dropout(0.5)]
    ),
    "cnn": plain_cnn,
    "resnet": lambda s, c: ResNet(s, c, nn.BatchNorm2d),
    "resnet_bare": lambda s, c: ResNet(s, c, lambda _: nn.Identity()),
    "lstm": lambda s, c: RowReader(s, c, nn.LSTM),
    "gru": lambda s, c: RowReader(s, c, nn.GRU),
    "pre_norm": lambda s, c: RowTransformer(s, c, norm_first=True),
    "post_norm": lambda s, c: RowTransformer(s, c, norm_first=False),
    "mixer": Mixer,
}
