"""A recurrent network that reads an image row by row.

Shape letters: B = batch, X = input channels, R = rows, U = units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowGRU(nn.Module):
    """A GRU over an image's rows, all channels of a row at once; linear on its last state.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.
        units: U.
    """

    def __init__(self, shape: torch.Size, classes: int, units: int = 32):
        super().__init__()
        channels, _, width = shape
        self.gru = nn.GRU(channels * width, units)
        self.head = nn.Linear(units, classes)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        rows_RBU, _ = self.gru(images_BXHW.permute(2, 0, 1, 3).flatten(2))
        return self.head(rows_RBU[-1])


def gru_rows(shape: torch.Size, classes: int) -> RowGRU:
    """A GRU of 32 units."""
    return RowGRU(shape, classes)
