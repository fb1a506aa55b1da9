"""Variants of image sets by name: `mnist@1000@shift` is MNIST's first variant, then the second.

Shape letters: N = images, K = channels, H = height, W = width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepsmith.names import unknown
from stepsmith.tasks.augment import AUGMENTATIONS, Augment
from stepsmith.tasks.datasets import ImageSet, load_images
from stepsmith.tasks.image_files import dimensions

SUBSET_SEED = 20_161_206
"""Which images a subset holds; a smaller one is part of a larger one."""

SIDE = 32
"""Height and width in pixels of what `rgb32` makes."""

_CLASSES = re.compile(r"classes(\d+)-(\d+)")
_TEST = re.compile(r"test(\d+)")


def load_variant(name: str, **options: Any) -> tuple[ImageSet, Augment | None]:
    """An image set with its variants.

    Args:
        name: a set's name, followed by variants, each after an `@`, made one after another.
            Of both splits: `classes0-4` (images of these classes, renumbered from 0), `invert`
            (white becomes black), `rgb32` (a border of zeros up to 32x32 pixels, a grey channel
            three times), `standardised` (mean 0 and deviation 1 in each channel, by the statistics
            of the training images as the other variants of this kind leave them).
            Of the training split: a number (that many images, always the same ones); of the test
            split `test4000` likewise.
            Of training batches, anew each time: `shift` (up to 2 pixels each way, the border's
            pixels in the gap), `crop` (up to 4 pixels each way, zeros in the gap), `flip` (left and
            right exchanged in half of the images), `rotate` (up to 15 degrees), `noise` (standard
            deviation 0.1). Wherever it is named, standardising comes last, after these: the zeros
            of `crop` and `rgb32` are black, and `noise` is on the scale from 0 to 1.
        options: as for `load_images`.

    Returns:
        The set, its name with the variants; and what is to be done to training batches, or None.

    Raises:
        ValueError: an unknown variant, the same twice, a subset of fewer than 2 images or of more
            than there are, fewer than 2 classes or some that are not there, images too large for
            `rgb32`; or as `load_images`.

    >>> images, augment = load_variant("mnist@classes0-4@1000@shift", source="sample")
    >>> images.name, images.num_classes, len(images.train_labels), augment
    ('mnist@classes0-4@1000@shift', 5, 1000, Augment(names=('shift',)))
    """
    base, *variants = name.split("@")
    kinds = [_kind(base, variant) for variant in variants]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"data set {name!r}: give one {kind}, not several")
    images = load_images(base, **options)
    for variant in variants:
        images = dataclasses.replace(_changed(images, variant), name=f"{images.name}@{variant}")
    names = tuple(variant for variant in variants if variant in AUGMENTATIONS)
    return images, Augment(names) if names else None


def _kind(base: str, variant: str) -> str:
    """What there may be one of in a name."""
    if re.fullmatch(r"\d+", variant):
        return "subset"
    if _TEST.fullmatch(variant):
        return "subset of the test images"
    if _CLASSES.fullmatch(variant):
        return "range of classes"
    if variant not in AUGMENTATIONS and variant not in _CHANGES:
        raise unknown(f"variant of {base}", variant, (*VARIANTS, "a number of images"))
    return f"variant {variant!r}"


def _changed(images: ImageSet, variant: str) -> ImageSet:
    if variant in _CHANGES:
        return _CHANGES[variant](images)
    if found := _CLASSES.fullmatch(variant):
        return _classes(images, int(found[1]), int(found[2]))
    if found := _TEST.fullmatch(variant):
        return _subset(images, int(found[1]), "test", variant)
    return images if variant in AUGMENTATIONS else _subset(images, int(variant), "train", variant)


def _subset(images: ImageSet, size: int, split: str, variant: str) -> ImageSet:
    labels_N: Tensor = getattr(images, f"{split}_labels")
    count = len(labels_N)
    if not 2 <= size <= count:
        what = {"train": "training", "test": "test"}[split]
        raise ValueError(
            f"{images.name}@{variant}: a subset takes 2 to {count} {what} images, as many as "
            f"{images.name} has here ({images.origin.partition(':')[0]})"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED))
    chosen = order[:size]
    parts: dict[str, Tensor] = {
        f"{split}_images": getattr(images, f"{split}_images")[chosen],
        f"{split}_labels": labels_N[chosen],
    }
    return dataclasses.replace(images, **parts)


def _classes(images: ImageSet, first: int, last: int) -> ImageSet:
    if not first < last < images.num_classes:
        raise ValueError(
            f"{images.name}@classes{first}-{last}: a range of classes is two numbers in rising "
            f"order, at most {images.num_classes - 1}: {images.name} has {images.num_classes} "
            "classes, numbered from 0"
        )
    parts: dict[str, Tensor] = {}
    for split in ("train", "test"):
        labels_N: Tensor = getattr(images, f"{split}_labels")
        kept_N = (labels_N >= first) & (labels_N <= last)
        parts[f"{split}_images"] = getattr(images, f"{split}_images")[kept_N]
        parts[f"{split}_labels"] = labels_N[kept_N] - first
    return dataclasses.replace(images, classes=images.classes[first : last + 1], **parts)


def _invert(images: ImageSet) -> ImageSet:
    return _of_both(images, lambda images_NKHW: 255 - images_NKHW)


def _rgb32(images: ImageSet) -> ImageSet:
    high, wide = images.train_images.shape[-2:]
    if max(high, wide) > SIDE:
        raise ValueError(
            f"{images.name}@rgb{SIDE}: takes images of up to {SIDE}x{SIDE} pixels, to which it "
            f"adds a border; these are {dimensions((high, wide))}"
        )
    top, left = (SIDE - high) // 2, (SIDE - wide) // 2
    border = (left, SIDE - wide - left, top, SIDE - high - top)
    return _of_both(
        images,
        # Contiguous, as rows are copied out of it batch after batch.
        lambda images_NKHW: F.pad(images_NKHW, border).expand(-1, 3, -1, -1).contiguous(),
    )


def _standardised(images: ImageSet) -> ImageSet:
    return dataclasses.replace(images, standardised=True)


def _of_both(images: ImageSet, change: Callable[[Tensor], Tensor]) -> ImageSet:
    return dataclasses.replace(
        images, train_images=change(images.train_images), test_images=change(images.test_images)
    )


_CHANGES: dict[str, Callable[[ImageSet], ImageSet]] = {
    "invert": _invert, "rgb32": _rgb32, "standardised": _standardised,
}  # fmt: skip

VARIANTS = (*AUGMENTATIONS, *_CHANGES, "classesA-B", "testN")
"""Every variant but subsets, which are named by their number of training images; `classesA-B`
stands for ranges such as `classes0-4`, `testN` for `test4000`."""
