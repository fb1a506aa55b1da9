"""Random changes of training images.

They are made to training batches only, on their device; each copy's come from its own
generator, so that a seed sees the same images however many copies run beside it.

Shape letters: C = copies, B = examples of a batch, N = C * B, K = channels, H = height, W = width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepsmith.tasks.base import onto

Change = Callable[[Tensor, Sequence[torch.Generator]], Tensor]


def shift(images: Tensor, generators: Sequence[torch.Generator], pixels: int = 2) -> Tensor:
    """Move each image by up to `pixels` each way; its border's pixels fill the gap.

    Args:
        images: (C, B, K, H, W).
        generators: C of them.
        pixels: largest shift.
    """
    high, wide = images.shape[-2:]
    moves = [
        torch.randint(-pixels, pixels + 1, (images.shape[1], 2), generator=g, device=g.device)
        for g in generators
    ]
    moves_CB2 = onto(torch.stack(moves), images.device)

    def places(size: int, axis: int) -> Tensor:
        line = torch.arange(size, device=images.device)
        return (line - moves_CB2[..., axis, None]).clamp(0, size - 1)

    rows_CBH, columns_CBW = places(high, 0), places(wide, 1)
    moved = images.gather(-2, rows_CBH[:, :, None, :, None].expand(images.shape))
    return moved.gather(-1, columns_CBW[:, :, None, None, :].expand(images.shape))


def rotate(images: Tensor, generators: Sequence[torch.Generator], degrees: float = 15.0) -> Tensor:
    """Turn each image about its centre by up to `degrees` either way, bilinearly; its border's
    pixels fill the corners.

    Args:
        images: (C, B, K, H, W) floating-point.
        generators: C of them.
        degrees: largest angle.
    """
    high, wide = images.shape[-2:]
    drawn = [torch.rand(images.shape[1], generator=g, device=g.device) for g in generators]
    angle_N = (2 * onto(torch.stack(drawn), images.device).reshape(-1) - 1) * math.radians(degrees)
    cos_N, sin_N = angle_N.cos(), angle_N.sin()
    zero_N = torch.zeros_like(angle_N)
    # Grid coordinates run from -1 to 1 along both sides, whatever their lengths.
    turn_N23 = torch.stack(
        [
            torch.stack([cos_N, -sin_N * high / wide, zero_N], -1),
            torch.stack([sin_N * wide / high, cos_N, zero_N], -1),
        ], 1,
    )  # fmt: skip
    flat = images.flatten(0, 1)
    grid = F.affine_grid(turn_N23.to(images.dtype), list(flat.shape), align_corners=False)
    turned = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
    return turned.view(images.shape)


def noise(images: Tensor, generators: Sequence[torch.Generator], deviation: float = 0.1) -> Tensor:
    """Add Gaussian noise to every pixel (of images from 0 to 1).

    Args:
        images: (C, B, K, H, W) floating-point.
        generators: C of them.
        deviation: its standard deviation.
    """
    added = torch.empty_like(images)
    for copy, generator in enumerate(generators):
        # So many numbers are drawn where they are used; only their seed is the copy's.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        added[copy].normal_(
            0, deviation, generator=torch.Generator(images.device).manual_seed(seed)
        )
    return images + added


def crop(images: Tensor, generators: Sequence[torch.Generator], padding: int = 4) -> Tensor:
    """Surround each image by zeros and cut an image of its size out of that, all places being
    equally likely: a move of up to `padding` each way, with black in the gap.

    Args:
        images: (C, B, K, H, W), black being 0.
        generators: C of them.
        padding: rows and columns of zeros on each side.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2.
    """
    high, wide = images.shape[-2:]
    places = [
        torch.randint(2 * padding + 1, (images.shape[1], 2), generator=g, device=g.device)
        for g in generators
    ]
    top_N, left_N = onto(torch.stack(places), images.device).view(-1, 2).unbind(1)
    padded = F.pad(images.flatten(0, 1), (padding,) * 4)
    # (N, places down, places right, K, H, W), all of it views of the one padded tensor.
    cuts = padded.unfold(2, high, 1).unfold(3, wide, 1).movedim(1, 3)
    return cuts[torch.arange(len(cuts), device=images.device), top_N, left_N].view(images.shape)


def flip(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Exchange left and right in each image with probability 1/2.

    Args:
        images: (C, B, K, H, W).
        generators: C of them.
    """
    drawn = [torch.rand(images.shape[1], generator=g, device=g.device) < 0.5 for g in generators]
    flipped_CB = onto(torch.stack(drawn), images.device)
    return torch.where(flipped_CB[:, :, None, None, None], images.flip(-1), images)


AUGMENTATIONS: dict[str, Change] = {
    "shift": shift, "rotate": rotate, "noise": noise, "crop": crop, "flip": flip,
}  # fmt: skip
"""Random changes of training images, by the name they have in a variant."""


@dataclass(frozen=True)
class Augment:
    """Changes made to a batch one after another.

    Args:
        names: keys of `AUGMENTATIONS`.
    """

    names: tuple[str, ...]

    def __call__(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(C, B, K, H, W) images from (C, B, K, H, W) ones."""
        for name in self.names:
            images = AUGMENTATIONS[name](images, generators)
        return images
