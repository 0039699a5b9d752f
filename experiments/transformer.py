"""Small transformers: over characters, and over the patches of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from experiments.config_errors import ConfigError

SPREAD = 0.02  # standard deviation of the initial embeddings


class CharacterTransformer(nn.Module):
    """Embeddings, blocks of attention and perceptron with LayerNorm before each, and one readout.

    Args:
        shape: `(context,)`, the characters of an example.
        classes: different characters.
        width: of the residual stream.
        heads: of the attention; they divide `width`.
        layers: blocks.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, width: int = 64, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.position = nn.Parameter(SPREAD * torch.randn(shape[0], width))
        nn.init.normal_(self.embedding.weight, std=SPREAD)
        self.stream = stream(width, heads, layers, causal=True)
        self.readout = nn.Linear(width, classes)

    def forward(self, characters: Tensor) -> Tensor:
        """The logits of each next character, `(n, classes, context)`.

        Args:
            characters: their numbers, `(n, context)`.
        """
        x = self.embedding(characters) + self.position[: characters.shape[1]]
        logits: Tensor = self.readout(self.stream(x))
        return logits.transpose(1, 2)


class PatchTransformer(nn.Module):
    """Patches of an image, embedded; blocks, LayerNorm, the mean over patches, and one readout.

    Args:
        image_shape: channels, height, width.
        classes: number of outputs.
        patch: its height and width, which divide the image's.
        width, heads, layers: as in `CharacterTransformer`.

    Raises:
        ConfigError: the patches do not tile the image.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        patch: int = 2,
        width: int = 48,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        channels, *sides = image_shape
        if patch < 1 or any(side % patch for side in sides):
            raise ConfigError(
                f"`model.patch` must divide the image. Got {patch} for "
                f"{sides[0]}×{sides[1]} pixels. Choose another number."
            )
        count = (sides[0] // patch) * (sides[1] // patch)
        self.patches = nn.Unfold(patch, stride=patch)
        self.embedding = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(SPREAD * torch.randn(count, width))
        self.stream = stream(width, heads, layers, causal=False)
        self.readout = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, `(n, classes)`.

        Args:
            images: `(n, channels, height, width)`.
        """
        x = self.embedding(self.patches(images).transpose(1, 2)) + self.position
        logits: Tensor = self.readout(self.stream(x).mean(1))
        return logits


def stream(width: int, heads: int, layers: int, causal: bool) -> nn.Sequential:
    """Blocks, and LayerNorm after the last."""
    return nn.Sequential(*(Block(width, heads, causal) for _ in range(layers)), nn.LayerNorm(width))


class Block(nn.Module):
    """x + attention(norm x), then x + perceptron(norm x).

    Args:
        width: of the residual stream.
        heads: of the attention.
        causal: whether the attention sees the past alone.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the block, `(n, context, width)`.

        Args:
            x: the stream before it.
        """
        x = x + self.out(self._attention(self.norms[0](x)))
        return x + self.perceptron(self.norms[1](x))

    def _attention(self, x: Tensor) -> Tensor:
        n, context, width = x.shape
        parts = self.query_key_value(x).view(n, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(n, context, width)
