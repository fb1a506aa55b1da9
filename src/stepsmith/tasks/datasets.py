"""Image-classification data, held in memory as unsigned bytes.

A set comes from a local directory, from the Hugging Face hub or from the sample in this package.
A directory holds a set as parquet (``train*.parquet``, ``test*.parquet``), as idx
(``train-images-idx3-ubyte`` and its three companions, gzipped or not) or as a folder of images
(``train/CLASS/*.png``, ``test/CLASS/*.png``).

Shape letters: N = images, C = channels (1 grey, 3 RGB), H = height, W = width, in pixels.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepsmith.tasks.image_files import (
    DataError,
    Split,
    dimensions,
    holds_images,
    read_parquet,
    read_split,
)
from stepsmith.tasks.image_hub import KNOWN, HubUnavailable, read_hub

SOURCES = ("auto", "directory", "hub", "sample")

_SAMPLE_DIR = Path(__file__).resolve().parents[1] / "data"
_log = logging.getLogger("stepsmith")
_noticed: set[str] = set()  # sets whose sample has been announced in this process


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors, not a truth value
class ImageSet:
    """A labelled set of images of one shape, with its training and test split.

    Args:
        name: what the set was asked for as, in its known spelling where it has one.
        origin: where it came from: ``directory:PATH``, ``hub:OWNER/NAME`` or ``sample``.
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
    cache: bool = True,
) -> ImageSet:
    """Load an image-classification set into memory.

    Args:
        name: a known name (mnist, fashion_mnist, kmnist, cifar10, cifar100; dashes and capitals do
            not matter), ``owner/name`` on the hub, or the name of a folder in the data directory.
        source: ``"directory"``, ``"hub"`` and ``"sample"`` (10,000 training and 2,000 test images
            of mnist or fashion_mnist, in this package) read only there. ``"auto"`` takes the first
            that has the set, in that order, and logs one line where it comes down to the sample.
        data_dir: holds the set in a folder of its name, or holds its files directly; the
            environment variable ``STEPSMITH_DATA_DIR`` where not given. Not read for ``"hub"``
            and ``"sample"``.
        cache: keep the decoded set in this process and hand out the same tensors again: do not
            write to them.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: unknown `source`.
        DataError: unknown `name`, or the set is not found or not readable.

    Example:
        >>> digits = load_images("mnist", source="sample")
        >>> digits.train_images.shape, digits.num_classes
        (torch.Size([10000, 1, 28, 28]), 10)
    """
    if source not in SOURCES:
        raise ValueError(f"load_images: source must be one of {', '.join(SOURCES)}, got {source!r}")
    root = data_dir or os.environ.get("STEPSMITH_DATA_DIR") or None
    path = Path(root).expanduser().absolute() if root else None
    plain = re.sub(r"[-_ ]", "", name).lower()
    known = next((key for key in KNOWN if key.replace("_", "") == plain), name)
    return (_load_cached if cache else _load)(known, source, path)


def _load(name: str, source: str, root: Path | None) -> ImageSet:
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    folder = _find_folder(name, root)
    if name not in KNOWN and not is_hub_name and folder is None:
        raise DataError(_unknown(name, root))
    if source == "sample":
        return _load_sample(name)
    if source == "hub":
        return _build(name, *read_hub(name))
    missing = (
        f"{root} holds no {name} (looked for {name}/ with train*.parquet, "
        "train-images-idx3-ubyte or train/CLASS/*.png)"
        if root
        else "no data directory given (data_dir= or STEPSMITH_DATA_DIR)"
    )
    if source == "directory" and folder is None:
        raise DataError(f"{name}: {missing}; pass data_dir= the directory that holds {name}/")
    if folder is not None:
        return _build(
            name, f"directory:{folder}", read_split(folder, "train"), read_split(folder, "test")
        )
    try:
        return _build(name, *read_hub(name))
    except HubUnavailable as error:
        reason = str(error).removeprefix(f"{name}: ").partition(";")[0]
    if not (_SAMPLE_DIR / f"{name}_train.parquet").exists():
        raise DataError(
            f"{name}: {missing}; {reason}; no sample of it comes with this package; put its files "
            f"in DIR/{name}/ and pass data_dir=DIR, or connect (with pip install 'stepsmith[hub]')"
        )
    sample = _load_sample(name)
    if name not in _noticed:
        _noticed.add(name)
        _log.warning(
            "%s: using the bundled sample, %d training and %d test images (%s; %s); for the whole "
            "set pass data_dir=DIR or set STEPSMITH_DATA_DIR=DIR, where DIR/%s/ holds its files, "
            "or connect to the hub (with pip install 'stepsmith[hub]')",
            *(name, len(sample.train_labels), len(sample.test_labels), missing, reason, name),
        )
    return sample


_load_cached = functools.lru_cache(maxsize=8)(_load)


def _unknown(name: str, root: Path | None) -> str:
    local = [p.name for p in root.iterdir() if holds_images(p)] if root and root.is_dir() else []
    names = list(dict.fromkeys([*KNOWN, *sorted(local)]))
    near = difflib.get_close_matches(name.lower(), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    place = f"a folder in {root}" if root else "the name of a folder in data_dir"
    return f"unknown data set {name!r}: {guess}known are {', '.join(names)}, {place}, or OWNER/NAME"


def _find_folder(name: str, root: Path | None) -> Path | None:
    if root is None or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        return None
    for spelling in (name, name.replace("_", "-"), name.replace("-", "_")):
        if holds_images(root / spelling):
            return root / spelling
    # Files lying in mnist/ are not another known set, whatever they are asked for as.
    if root.name.replace("-", "_") in set(KNOWN) - {name}:
        return None
    return root if holds_images(root) else None


def _build(name: str, origin: str, train: Split, test: Split) -> ImageSet:
    classes = train[2] or test[2] or (KNOWN[name].classes if name in KNOWN else None)
    if train[2] and test[2] and list(train[2]) != list(test[2]):
        raise DataError(f"{origin}: training and test files name different classes")
    if classes is None:
        top = max(labels.max(initial=0) for labels in (train[1], test[1]))
        classes = [str(i) for i in range(top + 1)]
    arrays = (np.ascontiguousarray(a) for a in (*train[:2], *test[:2]))
    try:
        return ImageSet(name, origin, *map(torch.from_numpy, arrays), classes=tuple(classes))
    except ValueError as error:
        raise DataError(f"{origin}: {error}") from None


def _load_sample(name: str) -> ImageSet:
    if not (_SAMPLE_DIR / f"{name}_train.parquet").is_file():
        have = ", ".join(sorted(p.name[:-14] for p in _SAMPLE_DIR.glob("*_train.parquet")))
        raise DataError(f"{name}: no bundled sample, only of {have or 'no set'}; use other sources")
    pattern = f"{name}_{{}}.parquet"
    train = read_parquet(_SAMPLE_DIR, "train", pattern)
    return _build(name, "sample", train, read_parquet(_SAMPLE_DIR, "test", pattern))
