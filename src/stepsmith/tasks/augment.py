"""Variants of image sets by name: `mnist@1000@shift` is MNIST's first variant, then the second.

Random changes are made to training batches only, on their device; each copy's come from its own
generator, so that a seed sees the same images however many copies run beside it.

Shape letters: C = copies, B = examples of a batch, N = C * B, K = channels, H = height, W = width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepsmith.names import unknown
from stepsmith.tasks.datasets import ImageSet, load_images

Change = Callable[[Tensor, Sequence[torch.Generator]], Tensor]

SUBSET_SEED = 20_161_206
"""Which images a subset holds; a smaller one is part of a larger one."""


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
    moves_CB2 = torch.stack(moves).to(images.device)

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
    angle_N = (2 * torch.stack(drawn).to(images.device).reshape(-1) - 1) * math.radians(degrees)
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


AUGMENTATIONS: dict[str, Change] = {"shift": shift, "rotate": rotate, "noise": noise}
"""Random changes of training images, by the name they have in a variant."""

VARIANTS = (*AUGMENTATIONS, "invert")
"""Every variant but subsets, which are named by their number of training images."""


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


def load_variant(name: str, **options: Any) -> tuple[ImageSet, Augment | None]:
    """An image set with its variants.

    Args:
        name: a set's name, followed by variants, each after an `@`: `shift` (up to 2 pixels each
            way), `rotate` (up to 15 degrees), `noise` (standard deviation 0.1), `invert` (white
            becomes black, the test split too), or a number: that many training images, always the
            same ones, and the whole test split.
        options: as for `load_images`.

    Returns:
        The set, its name with the variants; and what is to be done to training batches, or None.

    Raises:
        ValueError: an unknown variant, the same twice, a subset of fewer than 2 images or of more
            than there are; or as `load_images`.

    >>> images, augment = load_variant("mnist@1000@shift", source="sample")
    >>> images.name, len(images.train_labels), augment
    ('mnist@1000@shift', 1000, Augment(names=('shift',)))
    """
    base, *variants = name.split("@")
    numbers = [variant for variant in variants if re.fullmatch(r"\d+", variant)]
    for variant in variants:
        if variant not in VARIANTS and variant not in numbers:
            raise unknown(f"variant of {base}", variant, (*VARIANTS, "a number of images"))
        if variants.count(variant) > 1 or len(numbers) > 1:
            kind = "subset" if variant in numbers else f"variant {variant!r}"
            raise ValueError(f"data set {name!r}: give one {kind}, not several")
    images = load_images(base, **options)
    if numbers:
        images = _subset(images, int(numbers[0]))
    if "invert" in variants:
        images = dataclasses.replace(
            images, train_images=255 - images.train_images, test_images=255 - images.test_images
        )
    names = tuple(variant for variant in variants if variant in AUGMENTATIONS)
    images = dataclasses.replace(images, name="@".join([images.name, *variants]))
    return images, Augment(names) if names else None


def _subset(images: ImageSet, size: int) -> ImageSet:
    count = len(images.train_labels)
    if not 2 <= size <= count:
        raise ValueError(
            f"{images.name}@{size}: a subset takes 2 to {count} training images, as many as "
            f"{images.name} has here ({images.origin.partition(':')[0]})"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED))
    chosen = order[:size]
    return dataclasses.replace(
        images, train_images=images.train_images[chosen], train_labels=images.train_labels[chosen]
    )
