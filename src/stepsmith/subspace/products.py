"""P^T c and P g, differentiable, each in one pass over P, for one basis or a choice of several.

Shape letters: D = directions, N = numbers of all tensors, X = any leading axes, C = copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK = {"cpu": 2**18}
"""Numbers of P converted at once where it is stored in another dtype than it is multiplied in: so
few that they stay in the cache, and P itself is read from memory once."""
CHUNK_ELSEWHERE = 2**22

Blocks = Sequence[Tensor]
"""The blocks of a block-diagonal P, from the first rows and columns to the last."""


def lifted(blocks: Blocks, c_XD: Tensor) -> Tensor:
    """P^T c: (..., D) to (..., N), in c's dtype."""
    parts = c_XD.split([len(block) for block in blocks], dim=-1)
    made = [_times(part, block) for part, block in zip(parts, blocks, strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def projected(blocks: Blocks, g_XN: Tensor) -> Tensor:
    """P g: (..., N) to (..., D), in g's dtype."""
    parts = g_XN.split([block.shape[1] for block in blocks], dim=-1)
    made = [_onto(part, block) for part, block in zip(parts, blocks, strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _chunks(block_DN: Tensor) -> list[slice]:
    rows, columns = block_DN.shape
    step = max(1, CHUNK.get(block_DN.device.type, CHUNK_ELSEWHERE) // rows)
    return [slice(start, start + step) for start in range(0, columns, step)]


def _times(c_XD: Tensor, block_DN: Tensor) -> Tensor:
    if block_DN.dtype == c_XD.dtype:
        return c_XD @ block_DN
    out_XN = c_XD.new_empty(*c_XD.shape[:-1], block_DN.shape[1])
    for span in _chunks(block_DN):
        out_XN[..., span] = c_XD @ block_DN[:, span].to(c_XD.dtype)
    return out_XN


def _onto(g_XN: Tensor, block_DN: Tensor) -> Tensor:
    if block_DN.dtype == g_XN.dtype:
        return g_XN @ block_DN.t()
    out_XD = g_XN.new_zeros(*g_XN.shape[:-1], len(block_DN))
    for span in _chunks(block_DN):
        out_XD += g_XN[..., span] @ block_DN[:, span].to(g_XN.dtype).t()
    return out_XD


class _Lift(Function):
    """P_k^T c for the basis `index` chooses; its gradient is `_Project`, and the other way round.

    One function in place of plain products, so that the backward pass keeps no converted P, and so
    that copies stacked by `vmap`, each with a basis of its own, share them.
    """

    @staticmethod
    def forward(c_XD: Tensor, index: Tensor | None, bases: tuple[Blocks, ...]) -> Tensor:
        return lifted(_chosen(index, bases), c_XD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.index, ctx.bases = inputs

    @staticmethod
    def backward(ctx: Any, g_XN: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Project.apply(g_XN, ctx.index, ctx.bases), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _over_copies(_Lift, info, in_dims, *args), 0


class _Project(Function):
    """P_k g for the basis `index` chooses."""

    @staticmethod
    def forward(g_XN: Tensor, index: Tensor | None, bases: tuple[Blocks, ...]) -> Tensor:
        return projected(_chosen(index, bases), g_XN)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.index, ctx.bases = inputs

    @staticmethod
    def backward(ctx: Any, c_XD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Lift.apply(c_XD, ctx.index, ctx.bases), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _over_copies(_Project, info, in_dims, *args), 0


def _chosen(index: Tensor | None, bases: tuple[Blocks, ...]) -> Blocks:
    return bases[0 if index is None else int(index)]


def _over_copies(
    function: type[Function], info: Any, in_dims: Any, value: Tensor, index: Any, bases: Any
) -> Tensor:
    """`function` on (C, ..., K): one pass over each basis that any copy has."""
    dim = in_dims[0]
    value = (
        value.movedim(dim, 0) if dim is not None else value.expand(info.batch_size, *value.shape)
    )
    if index is None or in_dims[1] is None:
        return function.apply(value, index, bases)
    found, parts = index.unique(), []
    order = index.argsort(stable=True)
    for chosen in found:
        rows = order[index[order] == chosen]
        parts.append(function.apply(value[rows], None, (bases[int(chosen)],)))
    return torch.cat(parts)[order.argsort()]


def lift(c_XD: Tensor, bases: Sequence[Blocks], index: Tensor | None = None) -> Tensor:
    """P^T c by one of several bases of the same sizes: differentiable, any number of times.

    Args:
        c_XD: (..., D) coefficients.
        bases: the blocks of each basis.
        index: (), int64, which basis; None is the first.

    Returns:
        (..., N), dtype of c. Its gradient is P g, in one pass over P.
    """
    return _Lift.apply(c_XD, index, tuple(bases))


def project(g_XN: Tensor, bases: Sequence[Blocks], index: Tensor | None = None) -> Tensor:
    """P g, (..., N) to (..., D), by one of several bases; as `lift`."""
    return _Project.apply(g_XN, index, tuple(bases))
