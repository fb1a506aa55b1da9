"""Networks on patches: a small vision transformer and a small MLP-mixer.

Shape letters: B = batch, X = input channels, S = patches, W = width, H = heads, D = W / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 4
"""Patches along each side of an image: 7x7 pixels each for 28x28, 8x8 for 32x32."""


class Patches(nn.Module):
    """Cut images into `GRID` x `GRID` patches and map each to W numbers.

    An image whose sides are no multiples of `GRID` is padded with zeros at the right and bottom.
    """

    def __init__(self, shape: torch.Size, width: int):
        super().__init__()
        channels, height, width_pixels = shape
        self.rows, self.columns = -(-height // GRID), -(-width_pixels // GRID)
        self.padding = (0, GRID * self.columns - width_pixels, 0, GRID * self.rows - height)
        self.embed = nn.Linear(channels * self.rows * self.columns, width)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) to (B, S, W)."""
        if any(self.padding):
            images_BXHW = F.pad(images_BXHW, self.padding)
        cut = images_BXHW.unflatten(3, (GRID, self.columns)).unflatten(2, (GRID, self.rows))
        # (B, X, GRID, rows, GRID, columns): the patch's place first, then its pixels.
        return self.embed(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class Attention(nn.Module):
    """Multi-head self-attention, in plain operations, so that copies of it can be stacked.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        # Three maps: to take apart one of three times the width costs a copy in the backward pass.
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, hidden_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        query_BHSD, key_BHSD, value_BHSD = (
            part(hidden_BSW).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores_BHSS = query_BHSD / query_BHSD.shape[-1] ** 0.5 @ key_BHSD.transpose(2, 3)
        mixed_BHSD = scores_BHSS.softmax(-1) @ value_BHSD
        return self.output(mixed_BHSD.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with a GELU layer of twice the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = _two_layers(width, 2 * width)

    def forward(self, hidden_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        hidden_BSW = hidden_BSW + self.attention(self.attention_norm(hidden_BSW))
        return hidden_BSW + self.mlp(self.mlp_norm(hidden_BSW))


class MixerBlock(nn.Module):
    """Two MLPs with shortcuts: one across the patches, one across the numbers of each.

    Source: Tolstikhin et al. 2021, arXiv:2105.01601, section 2.
    """

    def __init__(self, width: int):
        super().__init__()
        self.patch_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = _two_layers(GRID * GRID, 2 * GRID * GRID)
        self.mlp = _two_layers(width, 2 * width)

    def forward(self, hidden_BSW: Tensor) -> Tensor:
        """(B, S, W) to (B, S, W)."""
        mixed_BWS = self.across(self.patch_norm(hidden_BSW).transpose(1, 2))
        hidden_BSW = hidden_BSW + mixed_BWS.transpose(1, 2)
        return hidden_BSW + self.mlp(self.mlp_norm(hidden_BSW))


class PatchNet(nn.Module):
    """Patches, blocks, a last normalisation, mean over patches, linear.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.
        width: W.
        blocks: the blocks, (B, S, W) to (B, S, W).
        places: add a learned vector to each patch, N(0, 0.02^2) at first.
    """

    def __init__(
        self, shape: torch.Size, classes: int, width: int, blocks: list[nn.Module], places: bool
    ):
        super().__init__()
        self.patches = Patches(shape, width)
        self.places = nn.Parameter(0.02 * torch.randn(GRID * GRID, width)) if places else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        hidden_BSW = self.patches(images_BXHW)
        if self.places is not None:
            hidden_BSW = hidden_BSW + self.places
        return self.head(self.norm(self.blocks(hidden_BSW)).mean(1))


def _two_layers(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def vit_small(shape: torch.Size, classes: int) -> PatchNet:
    """A vision transformer: 16 patches, two blocks of width 32 with four heads, no dropout.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; with the mean of the patches in
    place of a class token.
    """
    blocks: list[nn.Module] = [TransformerBlock(32, 4) for _ in range(2)]
    return PatchNet(shape, classes, 32, blocks, places=True)


def mixer_small(shape: torch.Size, classes: int) -> PatchNet:
    """An MLP-mixer: 16 patches, two blocks of width 32."""
    blocks: list[nn.Module] = [MixerBlock(32) for _ in range(2)]
    return PatchNet(shape, classes, 32, blocks, places=False)
