"""A few directions for every layer: a block-diagonal P."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from stepsmith.subspace.basis import Subspace, require_counts
from stepsmith.subspace.checkpoints import Source
from stepsmith.subspace.gaussian import drawn, start_of
from stepsmith.subspace.layout import TypedLayout
from stepsmith.subspace.trajectory import BLOCK, Run, Trajectory

By = Literal["layer", "tensor"] | Callable[[str], str]


def per_layer(
    of: nn.Module | Trajectory,
    d: int,
    *,
    by: By = "layer",
    params: nn.Module | Iterable[str] | None = None,
    origin: Source | None = None,
    centred: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    block: int = BLOCK,
    source: str = "",
) -> Subspace:
    """d directions for every layer: from the layer's own part of a trajectory, or random.

    Only the diagonal blocks of P are stored and multiplied: d numbers a parameter, as for a dense P
    of d rows, with d coefficients a layer in place of d in all.

    Args:
        of: snapshots, as for `from_trajectory`; or a model, for random directions.
        d: directions of each layer; a layer of fewer numbers gets as many as it has.
        by: what counts as a layer: `"layer"` the tensors of one module (a weight and its bias),
            `"tensor"` each tensor, or a function from a tensor's name to its layer's.
        params, origin, centred, block: of a trajectory, as in `from_trajectory`.
        generator: of random directions, as in `random`.
        dtype: to hold the basis in; by default float32, or float64 where a parameter is.
        source: where it comes from, kept in `info`.

    Returns:
        The subspace, on the CPU. Its tensors are in the order of their layers.

    Raises:
        ValueError: as `from_trajectory` and `random`; names the layer where its part of the
            trajectory has too low a rank.

    >>> model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    >>> per_layer(model, 8).dim  # the second layer has five numbers
    13
    """
    require_counts("per_layer", d=d)
    d = int(d)
    if isinstance(of, nn.Module):
        if params is not None or origin is not None or not centred or block != BLOCK:
            raise ValueError(
                "per_layer: params, origin, centred and block belong to a trajectory, not to a "
                "model, whose directions are random"
            )
        groups = _groups(TypedLayout.of(start_of(of)), by)
        return drawn("per_layer", of, groups, d, generator=generator, dtype=dtype, source=source)
    if generator is not None:
        raise ValueError(
            "per_layer: a generator decides random directions; a trajectory needs none"
        )
    run = Run(of, params, origin, "per_layer")
    return run.subspace(
        _groups(run.layout, by), d, centred=centred, dtype=dtype, block=block, source=source
    )


def _groups(layout: TypedLayout, by: By) -> list[list[str]]:
    """Names by layer, layers in order of their first tensor; empty tensors join the first."""
    if by not in ("layer", "tensor") and not callable(by):
        raise ValueError(f"per_layer: by must be 'layer', 'tensor' or a function, got {by!r}")
    groups: dict[str, list[str]] = {}
    empty = []
    for name, size in zip(layout.names, layout.sizes, strict=True):
        if size == 0:
            empty.append(name)
            continue
        key = by(name) if callable(by) else name if by == "tensor" else name.rpartition(".")[0]
        groups.setdefault(key, []).append(name)
    if not groups:
        raise ValueError(f"per_layer: all tensors are empty: {', '.join(empty)}")
    first, *others = groups.values()
    return [[*first, *empty], *others]
