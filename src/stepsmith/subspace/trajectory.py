"""The subspace in which a network was trained: the principal components of its snapshots.

The components come from the small Gram matrix of the snapshots; neither they nor an N x N matrix
are ever in memory at once, so the snapshots of a big network may stay on disk.

Shape letters: M = snapshots, D = directions, N = numbers of all tensors, B = columns of a part.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepsmith.rules.base import require_flag, require_kind
from stepsmith.subspace.basis import (
    Subspace,
    not_finite,
    require_counts,
    require_room,
    require_stored,
)
from stepsmith.subspace.checkpoints import Checkpoint, Piece, Source, as_checkpoints
from stepsmith.subspace.layout import TypedLayout, trainable, unwrapped
from stepsmith.subspace.orthonormal import Part, orthonormal
from stepsmith.subspace.snapshots import Snapshots

BLOCK = 2**18
"""Columns read at a time: with 60 snapshots some 130 MB in float64."""

Trajectory = Snapshots | str | Path | Iterable[Source]
"""Snapshots in order of time: a recorder, its folder, or state dicts and paths of safetensors
files."""


def from_trajectory(
    checkpoints: Trajectory,
    d: int,
    *,
    params: nn.Module | Iterable[str] | None = None,
    origin: Source | None = None,
    centred: bool = True,
    dtype: torch.dtype | None = None,
    block: int = BLOCK,
    source: str = "",
) -> Subspace:
    """The d principal components of a training run's parameters (DLDR).

    Directions are in order of the variance they explain; each points so that the last snapshot's
    coefficient, relative to the first snapshot, is not negative.

    Args:
        checkpoints: in order of time; files are streamed, state dicts stay where they are.
        d: directions; at most one fewer than the snapshots.
        params: which tensors are parameters: a model's trainable ones, or names. By default all a
            snapshot says are, or all there is in a state dict.
        origin: theta_0, where training in the subspace starts; by default the first checkpoint.
        centred: subtract the snapshots' mean first, as in the paper; otherwise the components of
            the parameters themselves, of which there may be as many as snapshots.
        dtype: to hold the basis in; by default float32, or float64 where a parameter is.
        block: columns read at a time; memory above the basis is about 10 * M * block bytes.
        source: where the snapshots come from, kept in `info`.

    Returns:
        The subspace, on the CPU; `explained` says how much of the variance each direction explains.
        The network's buffers at the origin come with it where the checkpoint has them and says so.

    Raises:
        ValueError: too few checkpoints, more directions than their rank, checkpoints that are not
            finite, of different networks or all the same, or that hold more than parameters.
        CheckpointError: a file that cannot be read.
        TypeError: checkpoints or params of another kind.

    Source: Li et al. 2022, arXiv:2103.11154, algorithm 1.
    """
    require_counts("from_trajectory", d=d)
    d = int(d)
    run = Run(checkpoints, params, origin, "from_trajectory")
    require_room("from_trajectory", d, run.layout)
    return run.subspace(
        [run.layout.names], d, centred=centred, dtype=dtype, block=block, source=source
    )


class Run:
    """The snapshots of one training run, and the layout of their parameters.

    Args:
        checkpoints, params, origin: as in `from_trajectory`.
        owner: who asks, for messages.
    """

    def __init__(
        self,
        checkpoints: Trajectory,
        params: nn.Module | Iterable[str] | None,
        origin: Source | None,
        owner: str,
    ):
        self.owner = owner
        kinds = Snapshots | str | Path | Iterable
        require_kind(owner, "checkpoints", checkpoints, kinds, "state dicts or paths, in order")
        self.checkpoints = as_checkpoints(checkpoints)
        if len(self.checkpoints) < 2:
            raise ValueError(
                f"{owner}: a trajectory needs at least 2 checkpoints, got {len(self.checkpoints)}"
            )
        first = self.checkpoints[0]
        names = _names(first, params, owner)
        for name in names:
            if name not in first.forms:
                raise ValueError(f"{owner}: {first.label} has no tensor {name!r}")
        self.layout = TypedLayout(
            tuple(names),
            tuple(first.forms[name][0] for name in names),
            tuple(first.forms[name][1] for name in names),
        )
        self.origin = first if origin is None else Checkpoint(origin, "the origin")
        for checkpoint in [*self.checkpoints, self.origin]:
            checkpoint.require(self.layout)
        if origin is not None:  # the first checkpoint is looked at with the others
            bad = not_finite(self.origin.tensors(self.layout.names))
            if bad is not None:
                raise ValueError(
                    f"{owner}: {self.origin.label} is not finite (nan or infinity in {bad!r}); "
                    "give one that is"
                )
        if isinstance(params, nn.Module):
            buffers = [name for name, _ in unwrapped(params).named_buffers()]
        else:
            buffers = self.origin.manifest.get("buffers", [])
        self._buffers = [name for name in buffers if name in self.origin.forms]

    def subspace(
        self,
        groups: Sequence[Sequence[str]],
        d: int,
        *,
        centred: bool,
        dtype: torch.dtype | None,
        block: int,
        source: str,
    ) -> Subspace:
        """A block of at most d directions for each group of tensors; the groups share the names."""
        begun = time.perf_counter()
        require_counts(self.owner, block=block)
        require_stored(self.owner, dtype)
        require_kind(self.owner, "source", source, str)
        centred = require_flag(self.owner, "centred", centred)
        count = len(self.checkpoints)
        if d > count - centred:
            needs = "centred, d + 1" if centred else "d"
            raise ValueError(
                f"{self.owner}: {count} checkpoints are too few for d = {d} directions, which need "
                f"at least {d + centred} ({needs}); take more snapshots, or lower d to "
                f"{count - centred}"
            )
        order = [name for names in groups for name in names]
        place = {name: i for i, name in enumerate(self.layout.names)}
        layout = TypedLayout(
            tuple(order),
            tuple(self.layout.shapes[place[name]] for name in order),
            tuple(self.layout.dtypes[place[name]] for name in order),
        )
        dims = [sum(_numel(layout, name) for name in names) for names in groups]
        pieces = [list(_cut(names, layout, block)) for names in groups]
        grams, squares = self._grams(pieces, centred)
        combinations, shares = [], []
        for names, gram, square, size in zip(groups, grams, squares, dims, strict=True):
            eps = max(torch.finfo(layout.dtypes[order.index(name)]).eps for name in names)
            whose = f" in {', '.join(names)}" if len(groups) > 1 else ""
            mixed, share = self._principal(gram, square * eps**2, min(d, size), centred, whose)
            combinations.append(mixed)
            shares.append(share)

        def parts() -> Iterator[Part]:
            for place, columns, rows_MB in self._rows(pieces, centred):
                yield place, columns, combinations[place] @ rows_MB

        shapes = [(len(mixed), size) for mixed, size in zip(combinations, dims, strict=True)]
        blocks = orthonormal(parts, shapes, dtype or layout.wide)
        info: dict[str, Any] = {
            "kind": "trajectory", "centred": centred, "snapshots": count, "source": source,
            "explained": shares, "seconds": time.perf_counter() - begun,
        }  # fmt: skip
        origin = layout.flatten(self.origin.tensors(layout.names))
        return Subspace(blocks, origin, layout, self.origin.tensors(self._buffers), info)

    def _rows(
        self, pieces: Sequence[Sequence[list[Piece]]], centred: bool
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Group, columns within it, and all snapshots there: (M, B), float64.

        Where the mean is to go, they are taken relative to the first: the Gram matrix then sees the
        small differences, not the large common part.
        """
        for group, cuts in enumerate(pieces):
            start = 0
            for cut in cuts:
                width = _width(cut)
                rows_MB = torch.empty(len(self.checkpoints), width, dtype=torch.float64)
                for row_B, checkpoint in zip(rows_MB, self.checkpoints, strict=True):
                    checkpoint.read(cut, row_B)
                    if not bool(row_B.isfinite().all()):
                        raise ValueError(
                            f"{self.owner}: {checkpoint.label} is not finite (nan or infinity in "
                            f"{_culprit(cut, row_B)!r}); leave it out"
                        )
                if centred:
                    rows_MB[1:] -= rows_MB[0]
                    rows_MB[0] = 0
                yield group, slice(start, start + width), rows_MB
                start += width

    def _grams(
        self, pieces: Sequence[Sequence[list[Piece]]], centred: bool
    ) -> tuple[list[Tensor], list[float]]:
        """Each group's Gram matrix (M, M), and the squared norm of its largest snapshot."""
        count = len(self.checkpoints)
        grams = [torch.zeros(count, count, dtype=torch.float64) for _ in pieces]
        for group, _, rows_MB in self._rows(pieces, centred):
            grams[group] += rows_MB @ rows_MB.t()
        squares = [float(gram.diagonal().max()) for gram in grams]
        if centred:
            # Differences say nothing about how finely the parameters themselves are rounded.
            for group, cuts in enumerate(pieces):
                for cut in cuts:
                    start_B = torch.empty(_width(cut), dtype=torch.float64)
                    self.checkpoints[0].read(cut, start_B)
                    squares[group] += float(start_B @ start_B)
        return grams, squares

    def _principal(
        self, gram_MM: Tensor, floor: float, d: int, centred: bool, whose: str
    ) -> tuple[Tensor, list[float]]:
        """(d, M) combinations of the snapshots that are its leading components, unit rows, and the
        share of the variance of each.

        Args:
            gram_MM: of the snapshots, relative to the first where `centred`.
            floor: squares that the snapshots' own rounding explains.
        """
        count = len(gram_MM)
        centre = torch.eye(count, dtype=torch.float64)
        if centred:
            centre -= 1 / count
        values, vectors = torch.linalg.eigh(centre @ gram_MM @ centre)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        eps = torch.finfo(torch.float64).eps
        tolerance = max(floor / 4, 8 * count * eps * float(values[0]))
        rank = int((values > tolerance).sum())
        if rank == 0:
            hint = ""
            if any(self.checkpoints[0].shares(other) for other in self.checkpoints[1:]):
                whose = ""
                hint = "; state_dict() gives the live tensors: copy them, or use Snapshots"
            elif whose:
                hint = "; a bias before a normalisation never moves: join it with others"
            raise ValueError(
                f"{self.owner}: the checkpoints are all the same{whose} (rank 0); keep them along "
                f"a run that moves the parameters{hint}"
            )
        if d > rank:
            raise ValueError(
                f"{self.owner}: d = {d} directions asked for, but {count} checkpoints span only "
                f"{rank}{whose} (their rank); lower d to {rank}, or take snapshots further apart"
            )
        mixed_DM = (centre @ vectors[:, :d] / values[:d].sqrt()).t()
        # Relative to the first snapshot in both cases.
        last_D = mixed_DM @ (gram_MM[:, -1] - gram_MM[:, 0])
        mixed_DM = torch.where(last_D[:, None] < 0, -mixed_DM, mixed_DM)
        return mixed_DM, (values[:d] / values.sum()).tolist()


def _names(first: Checkpoint, params: nn.Module | Iterable[str] | None, owner: str) -> list[str]:
    if params is None:
        return first.parameter_names()
    if isinstance(params, nn.Module):
        return list(trainable(params))
    require_kind(owner, "params", params, Iterable, "pass params=model")
    names = [params] if isinstance(params, str) else list(params)
    other = next((name for name in names if not isinstance(name, str)), None)
    if isinstance(params, str) or other is not None:
        kind = "one text" if other is None else f"a {type(other).__name__} among them"
        raise TypeError(
            f"{owner}: params must be a model or the names of its parameters, got {kind}; pass "
            "params=model"
        )
    return names


def _numel(layout: TypedLayout, name: str) -> int:
    return layout.sizes[layout.names.index(name)]


def _cut(names: Sequence[str], layout: TypedLayout, block: int) -> Iterator[list[Piece]]:
    """Pieces of tensors that make up at most `block` columns at a time."""
    cut: list[Piece] = []
    room = block
    for name in names:
        size, start = _numel(layout, name), 0
        while start < size:
            stop = min(size, start + room)
            cut.append((name, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield cut
                cut, room = [], block
    if cut:
        yield cut


def _width(cut: Sequence[Piece]) -> int:
    return sum(span.stop - span.start for _, span in cut)


def _culprit(cut: Sequence[Piece], row_B: Tensor) -> str:
    end, bad = 0, int((~row_B.isfinite()).nonzero()[0])
    for name, span in cut:
        end += span.stop - span.start
        if bad < end:
            return name
    raise AssertionError("the bad number lies in one of the pieces")
