"""Random directions, the plainest basis there is.

Shape letters: D = directions, B = columns of a part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from stepsmith.rules.base import require_kind
from stepsmith.subspace.basis import (
    Subspace,
    buffers_of,
    require_counts,
    require_room,
    require_stored,
)
from stepsmith.subspace.layout import NamedParams, TypedLayout, named, trainable
from stepsmith.subspace.orthonormal import Part, orthonormal

BLOCK = 2**18
"""Columns drawn at a time; part of what a seed means."""


def random(
    model: NamedParams,
    d: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    source: str = "",
) -> Subspace:
    """A uniformly random subspace of d directions through a model's present weights.

    Args:
        model: a module, whose parameters that require gradients it is made of, or parameters by
            name: a mapping, or `model.named_parameters()`.
        d: directions.
        generator: decides the directions.
        dtype: to hold the basis in; by default float32, or float64 where a parameter is.
        source: kept in `info`.

    Returns:
        The subspace, on the CPU; a module's buffers come with it.

    Raises:
        ValueError: d no whole number from 1 to the number of parameters, no trainable parameter, or
            weights that are not finite.
        TypeError: parameters without names, or no `torch.Generator`.

    >>> random(nn.Linear(5, 2), 3, generator=torch.Generator().manual_seed(0))
    Subspace(random, 3 directions of 12 numbers in 2 tensors, float32)
    """
    require_counts("random", d=d)
    d = int(d)
    given = model if isinstance(model, nn.Module) else named(model)
    layout = TypedLayout.of(start_of(given))
    require_room("random", d, layout)
    return drawn(
        "random", given, [layout.names], d, generator=generator, dtype=dtype, source=source
    )


def start_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters a random subspace of a model is made of."""
    return trainable(model) if isinstance(model, nn.Module) else dict(model)


def drawn(
    owner: str,
    model: nn.Module | Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    d: int,
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    source: str,
) -> Subspace:
    """A block of d random directions, or as many as it has numbers, for each group of tensors."""
    begun = time.perf_counter()
    require_stored(owner, dtype)
    require_kind(owner, "source", source, str)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{owner}: generator must be a torch.Generator, got {generator!r}; "
            "torch.Generator().manual_seed(0) is one"
        )
    params = start_of(model)
    layout = TypedLayout.of({name: params[name] for names in groups for name in names})
    dims = [sum(params[name].numel() for name in names) for names in groups]
    shapes = [(min(d, size), size) for size in dims]
    device = None if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))

    def parts() -> Iterator[Part]:
        # Drawn again at every pass: nothing is held but what is asked for.
        own = torch.Generator().manual_seed(seed)
        for place, (rows, size) in enumerate(shapes):
            for start in range(0, size, BLOCK):
                width = min(BLOCK, size - start)
                part_DB = torch.randn(rows, width, generator=own).double()
                yield place, slice(start, start + width), part_DB

    blocks = orthonormal(parts, shapes, dtype or layout.wide)
    origin = layout.flatten(params).cpu()
    if not bool(origin.isfinite().all()):
        raise ValueError(f"{owner}: the model's weights are not finite; start from ones that are")
    buffers = buffers_of(model) if isinstance(model, nn.Module) else {}
    info = {"kind": "random", "source": source, "seconds": time.perf_counter() - begun}
    return Subspace(blocks, origin, layout, {k: v.cpu() for k, v in buffers.items()}, info)
