"""Orthonormal rows from rows that are only given block of columns by block of columns.

Shape letters: D = directions, N = numbers of all tensors, B = columns of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Part = tuple[int, slice, Tensor]
"""Which block, which of its columns, and the rows there: (D, B), float64."""

_ROUNDS = 3


def orthonormal(
    parts: Callable[[], Iterator[Part]],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Orthonormal rows that span what the given rows span, the first k of them the first k's.

    Cholesky QR: rows <- L^-1 rows, with L L^T their Gram matrix in float64, again until they are
    orthonormal to the rounding of `dtype`. Whatever its size, a block is gone through at most four
    times, part by part, and nothing but the result is held.

    Args:
        parts: called for every pass; yields the same parts each time.
        shapes: (D, N) of each block.
        dtype: of the result.

    Returns:
        The blocks, (D, N) each.

    Raises:
        ValueError: rows that are linearly dependent.
    """
    eyes = [torch.eye(rows, dtype=torch.float64) for rows, _ in shapes]
    factors = [eye.clone() for eye in eyes]
    close = 1e-13 if dtype == torch.float64 else 1e-9
    for _ in range(_ROUNDS):
        grams = [torch.zeros_like(eye) for eye in eyes]
        for block, _, part_DB in parts():
            rows_DB = factors[block] @ part_DB
            grams[block] += rows_DB @ rows_DB.t()
        off = max(float((g - eye).abs().max()) for g, eye in zip(grams, eyes, strict=True))
        if off <= close:
            break
        for block, gram in enumerate(grams):
            lower, failed = torch.linalg.cholesky_ex(gram)
            if int(failed):
                raise ValueError(
                    f"subspace: only {int(failed) - 1} of {len(gram)} directions are independent; "
                    "lower d"
                )
            factors[block] = torch.linalg.solve_triangular(lower, factors[block], upper=False)
    blocks = tuple(torch.empty(shape, dtype=dtype) for shape in shapes)
    for block, columns, part_DB in parts():
        blocks[block][:, columns] = (factors[block] @ part_DB).to(dtype)
    return blocks
