"""Image-classification data, held in memory as unsigned bytes.

A set comes from a local directory, from the Hugging Face hub or from the sample in this package.
A directory holds a set as parquet (``train*.parquet``, ``test*.parquet``), as idx
(``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte`` and its three companions, gzipped or
not) or as a folder of images (``train/CLASS/*.png``, ``test/CLASS/*.png``). Classes that are all
numbers are sorted as numbers, others as text. Without a split called test, the one called
validation (valid, val) is tested on; beside it, it is not read. Images are PNG, JPEG, WebP or BMP,
turned upright as their EXIF data say. Hidden and system files, files of other formats and folders
within classes are left out, and the log says so.

Shape letters: N = images, C = channels (1 grey, 3 RGB), H = height, W = width, in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepsmith.tasks.files import DataError, DataNotFound, notice
from stepsmith.tasks.image_files import (
    Split,
    dimensions,
    holds_images,
    read_parquet,
    read_split,
    say_lacking,
)
from stepsmith.tasks.image_hub import KNOWN, read_hub
from stepsmith.tasks.sources import (
    Library,
    data_root,
    known_spelling,
    named_folders,
    plain,
    required_source,
)

_SAMPLE_DIR = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors, not a truth value
class ImageSet:
    """A labelled set of images of one shape, with its training and test split.

    Args:
        name: what the set was asked for as, in its known spelling where it has one.
        origin: where it came from: ``directory:PATH``, ``hub:OWNER/NAME@COMMIT`` or ``sample``.
        train_images: (N, C, H, W) uint8, 0 to 255.
        train_labels: (N,) int64, indices into `classes`.
        test_images: (N, C, H, W) uint8; C, H and W as in training.
        test_labels: (N,) int64.
        classes: the name of each class.
        standardised: whether batches of them are to have mean 0 and deviation 1 in each channel of
            the training images (see `stepsmith.tasks.standardise`); the bytes here have not.

    Raises:
        ValueError: shapes, dtypes or labels do not fit together.
    """

    name: str
    origin: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    standardised: bool = False

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images: Tensor = getattr(self, f"{split}_images")
            labels: Tensor = getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
                raise ValueError(
                    f"{self.name}: {split}_images must be uint8 of shape (N, 1 or 3, H, W), "
                    f"got {images.dtype} of shape {tuple(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.dim() != 1:
                raise ValueError(
                    f"{self.name}: {split}_labels must be int64 of shape (N,), "
                    f"got {labels.dtype} of shape {tuple(labels.shape)}"
                )
            if images.numel() == 0:
                raise ValueError(f"{self.name}: {split}_images holds no pixels")
            if len(images) != len(labels):
                raise ValueError(
                    f"{self.name}: {len(images)} {split} images but {len(labels)} labels"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{self.name}: {split}_labels must lie in 0..{self.num_classes - 1} "
                    f"(one per class), got {low}..{high}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: training images are {dimensions(self.train_images.shape[1:])} "
                f"but test images {dimensions(self.test_images.shape[1:])}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not each has an image."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with all its tensors on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return dataclasses.replace(self, **{n: getattr(self, n).to(device) for n in names})


def load_images(
    name: str,
    *,
    source: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache: bool = True,
) -> ImageSet:
    """Load an image-classification set into memory.

    A split may take 2 GiB; the environment variable ``STEPSMITH_DATA_LIMIT_GIB`` changes the limit.

    Args:
        name: a known name (mnist, fashion_mnist, kmnist, cifar10, cifar100; dashes and capitals do
            not matter), ``owner/name`` on the hub, or the name of a folder in the data directory.
        source: ``"directory"``, ``"hub"`` and ``"sample"`` (10,000 training and 2,000 test images
            of mnist or fashion_mnist, in this package) read only there. ``"auto"`` takes the first
            that has the set, in that order, and logs one line where it comes down to the sample.
        data_dir: holds the set in a folder of its name, or holds its files directly; the
            environment variable ``STEPSMITH_DATA_DIR`` where not given. With ``"auto"`` too, what
            is named here must be there. Not read for ``"hub"`` and ``"sample"``.
        revision: commit or branch of the set on the hub, which it then comes from; by default a
            known set's own, else the newest when the set was first loaded here.
        cache: keep the decoded set in this process and hand out the same tensors again: do not
            write to them.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: unknown `source`, an empty `data_dir`, or a `revision` of another source.
        DataError: unknown `name`, or the set is not found, not readable or above the limit.

    Example:
        >>> digits = load_images("mnist", source="sample")
        >>> digits.train_images.shape, digits.num_classes
        (torch.Size([10000, 1, 28, 28]), 10)
    """
    path = data_root("load_images", source, data_dir)
    source = required_source("load_images", source, revision)
    return (_load_cached if cache else _load)(known_spelling(name, KNOWN), source, path, revision)


def _find_folder(name: str, root: Path) -> Path | None:
    # torchvision keeps idx files in MNIST/raw.
    for folder in named_folders(root, name, KNOWN):
        for place in (folder, folder / "raw"):
            if holds_images(place):
                return place
    # Files lying in mnist/ are not another known set, whatever they are asked for as.
    own = root.parent if root.name == "raw" else root
    if plain(own.name) in {plain(key) for key in KNOWN} - {plain(name)}:
        return None
    return next((place for place in (root, root / "raw") if holds_images(place)), None)


def _read_folder(name: str, folder: Path) -> ImageSet:
    splits = (read_split(folder, split) for split in ("train", "test"))
    return _build(name, f"directory:{folder}", *splits)


def _build(name: str, origin: str, train: Split, test: Split) -> ImageSet:
    classes = train[2] or test[2] or (KNOWN[name].classes if name in KNOWN else None)
    if train[2] and test[2] and list(train[2]) != list(test[2]):
        raise DataError(f"{origin}: training and test files name different classes")
    if classes is None:
        top = max(int(labels.max(initial=0)) for labels in (train[1], test[1]))
        images = len(train[1]) + len(test[1])
        if top >= images:
            raise DataError(f"{origin}: labels go up to {top}, but there are {images} images")
        classes = [str(i) for i in range(top + 1)]
        say_lacking(f"{origin}/train", classes, train[1])
    arrays = (np.ascontiguousarray(a) for a in (*train[:2], *test[:2]))
    try:
        made = ImageSet(name, origin, *map(torch.from_numpy, arrays), classes=tuple(classes))
    except ValueError as error:
        raise DataError(f"{origin}: {error}") from None
    if made.num_classes == 1:
        notice(f"{origin}: has one class only ({made.classes[0]}), so there is nothing to learn")
    return made


def _has_sample(name: str) -> bool:
    return (_SAMPLE_DIR / f"{name}_train.parquet").is_file()


def _load_sample(name: str) -> ImageSet:
    if not _has_sample(name):
        have = ", ".join(sorted(p.name[:-14] for p in _SAMPLE_DIR.glob("*_train.parquet")))
        raise DataNotFound(
            f"{name}: no bundled sample, only of {have or 'no set'}; use other sources"
        )
    files = (_SAMPLE_DIR / f"{name}_{split}.parquet" for split in ("train", "test"))
    return _build(name, "sample", *(read_parquet([path], str(path)) for path in files))


def _load(name: str, source: str, root: Path | None, revision: str | None = None) -> ImageSet:
    def from_hub(name: str) -> ImageSet:
        return _build(name, *read_hub(name, revision))

    library = dataclasses.replace(_LIBRARY, read_hub=from_hub) if revision else _LIBRARY
    return library.load(name, source, root)


_load_cached = functools.lru_cache(maxsize=8)(_load)

_LIBRARY = Library[ImageSet](
    what="data set",
    unit="images",
    looks_for="train*.parquet, train-images-idx3-ubyte or train/CLASS/*.png",
    known=KNOWN,
    holds=holds_images,
    find=_find_folder,
    folder=lambda name: name,
    read_folder=_read_folder,
    read_hub=lambda name: _build(name, *read_hub(name)),
    read_sample=_load_sample,
    has_sample=_has_sample,
    counts=lambda images: (len(images.train_labels), len(images.test_labels)),
    origin=lambda images: images.origin,
)
