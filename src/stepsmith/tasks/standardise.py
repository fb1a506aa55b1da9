"""Images brought to mean 0 and deviation 1, channel by channel.

Shape letters: N = images, K = channels, H = height, W = width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors, not a truth value
class Standardise:
    """(image - mean) / deviation, with one mean and one deviation a channel.

    Args:
        mean_K: (K,) in units of the images given later.
        deviation_K: (K,), above 0.

    Raises:
        ValueError: shapes that differ, or a deviation that is not above 0.
    """

    mean_K: Tensor
    deviation_K: Tensor

    def __post_init__(self) -> None:
        if self.mean_K.dim() != 1 or self.mean_K.shape != self.deviation_K.shape:
            raise ValueError(
                "Standardise: mean_K and deviation_K must be (K,) both, got "
                f"{tuple(self.mean_K.shape)} and {tuple(self.deviation_K.shape)}"
            )
        if not bool((self.deviation_K > 0).all()):
            raise ValueError(
                f"Standardise: deviations must be > 0, got {self.deviation_K.tolist()}"
            )

    @classmethod
    def of(cls, images_NKHW: Tensor) -> Standardise:
        """The statistics of these uint8 images over all images and pixels, in units of 0 to 1.

        A channel of one value throughout has deviation 1: it becomes zeros.
        """
        level = torch.arange(256, dtype=torch.float64) / 255
        moments = []
        for channel in range(images_NKHW.shape[1]):
            # Counting each of the 256 values is exact, and needs no copy in floating point.
            counts = torch.bincount(images_NKHW[:, channel].flatten(), minlength=256).cpu()
            share = counts / counts.sum().double()
            mean = (share * level).sum()
            variance = (share * (level - mean) ** 2).sum()
            constant = int((counts > 0).sum()) == 1
            moments.append((mean, torch.ones_like(variance) if constant else variance.sqrt()))
        mean_K, deviation_K = (torch.stack(part).float() for part in zip(*moments, strict=True))
        return cls(mean_K, deviation_K)

    def to(self, device: torch.device) -> Standardise:
        """The same on a device."""
        return Standardise(self.mean_K.to(device), self.deviation_K.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """(..., K, H, W) floating-point images, standardised."""
        return (images - self.mean_K[:, None, None]) / self.deviation_K[:, None, None]
