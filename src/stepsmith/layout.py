"""Many tensors as one flat vector.

Shape letters: P = numbers of all tensors, flattened and joined; X = any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat vector of P numbers.

    Args:
        names: in the order in which they are joined.
        shapes: of each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors, in their order."""
        return cls(tuple(tensors), tuple(tuple(value.shape) for value in tensors.values()))

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    @cached_property
    def total(self) -> int:
        """P."""
        return sum(self.sizes)

    @cached_property
    def spans(self) -> list[slice]:
        """The slice of each tensor in the flat vector."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors of these names into (P,)."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def views(self, flat_XP: Tensor) -> dict[str, Tensor]:
        """Split (..., P) into tensors of shape (..., *shape), without a copy."""
        lead = flat_XP.shape[:-1]
        parts = flat_XP.split(self.sizes, dim=-1)
        return {
            name: part.reshape((*lead, *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
