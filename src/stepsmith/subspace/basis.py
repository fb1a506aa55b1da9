"""A subspace of a model's parameters: theta = origin + P^T c, P of d orthonormal rows.

Shape letters: D = directions, N = numbers of all tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepsmith import store
from stepsmith.rules.base import require_kind, set_checked
from stepsmith.store import CheckpointError
from stepsmith.subspace import products
from stepsmith.subspace.layout import NamedParams, TypedLayout, named, unwrapped
from stepsmith.version import __version__

STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes a basis may be stored in."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """d orthonormal directions through a start, over named tensors.

    Sums are taken in float32 (float64 where a parameter is), whatever the basis is stored in.

    Args:
        blocks: the diagonal blocks of P, (d_k, n_k) each; one dense one, or one a layer. They are
            never written to, and copies share them.
        origin: (N,) the start theta_0, all tensors joined, of dtype `layout.wide`.
        layout: names, shapes and dtypes of the tensors, in the order in which they are joined.
        buffers: the network's buffers at the start, such as batch-norm's statistics, by name; may
            be empty.
        info: JSON-able, how it was made: `kind` (`trajectory` or `random`), `explained` (for every
            block the share of variance each direction explains, empty where unknown), `centred`,
            `snapshots` (how many), `source`, `seconds` it took to make.

    Raises:
        ValueError: blocks that do not cover the tensors, tensors of the wrong dtype or device, or a
            basis or origin that is not finite.
        TypeError: an argument of another type.

    Source: Li et al. 2022, "Low Dimensional Trajectory Hypothesis is True" (DLDR),
    arXiv:2103.11154; Chen et al., "Scalable Learning to Optimize", ECCV 2022.
    """

    blocks: tuple[Tensor, ...]
    origin: Tensor
    layout: TypedLayout
    buffers: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_kind("Subspace", "blocks", self.blocks, tuple | list, "of matrices")
        for part in (*self.blocks, self.origin):
            require_kind("Subspace", "each of blocks and origin", part, Tensor)
        require_kind("Subspace", "layout", self.layout, TypedLayout)
        require_kind("Subspace", "buffers", self.buffers, dict)
        require_kind("Subspace", "info", self.info, dict)
        set_checked(self, blocks=tuple(self.blocks))
        sizes = [tuple(block.shape) for block in self.blocks]
        if not sizes or any(len(size) != 2 or 0 in size for size in sizes):
            raise ValueError(
                f"Subspace: blocks must be (directions, numbers) matrices, got {sizes}"
            )
        columns = sum(size[1] for size in sizes)
        if columns != self.layout.total or tuple(self.origin.shape) != (self.layout.total,):
            raise ValueError(
                f"Subspace: the blocks have {columns} columns and the origin shape "
                f"{tuple(self.origin.shape)}, but the tensors hold {self.layout.total} numbers"
            )
        if self.origin.dtype != self.layout.wide:
            raise ValueError(
                f"Subspace: the origin must be {self.layout.wide}, is {self.origin.dtype}"
            )
        for block in self.blocks:
            if block.dtype not in STORED or block.device != self.origin.device:
                raise ValueError(
                    f"Subspace: blocks must be one of {', '.join(map(str, STORED))} and on the "
                    f"origin's device ({self.origin.device}); one is {block.dtype} on "
                    f"{block.device}"
                )
            # Sums of unit rows overflow only where an entry is not finite, and take no memory.
            if not block.is_meta and not bool(block.sum(1).isfinite().all()):
                raise ValueError("Subspace: the basis is not finite (nan or infinity among it)")
        name = None if self.origin.is_meta else not_finite(self.layout.views(self.origin))
        if name is not None:
            raise ValueError(f"Subspace: the origin is not finite (nan or infinity in {name!r})")

    def __repr__(self) -> str:
        kind, dtype = self.info.get("kind", "subspace"), str(self.blocks[0].dtype)
        parts = f", {len(self.blocks)} blocks" if len(self.blocks) > 1 else ""
        return (
            f"Subspace({kind}, {self.dim} directions of {self.layout.total:,} numbers in "
            f"{len(self.layout.names)} tensors{parts}, {dtype.removeprefix('torch.')})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Subspace:
        # Copying an optimizer must not copy P: nothing ever writes to it.
        return self

    @property
    def dim(self) -> int:
        """d, the number of coefficients."""
        return sum(len(block) for block in self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of coefficients and sums."""
        return self.layout.wide

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.origin.device

    @property
    def explained(self) -> list[float]:
        """The share of (its block's) variance that each direction explains; empty where the
        subspace was not made from a trajectory."""
        return [share for block in self.info.get("explained", []) for share in block]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the basis, the origin and the buffers."""
        return store.fingerprint(self._tensors(None))

    def project(self, grads: Mapping[str, Tensor]) -> Tensor:
        """P g.

        Args:
            grads: gradients by name; other names may be there too.

        Returns:
            (d,), of dtype `dtype`, in loss units per unit of c.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        return products.projected(self.blocks, self.layout.flatten(grads))

    def lift(self, coefficients: Tensor) -> dict[str, Tensor]:
        """P^T c, differentiable in c.

        Args:
            coefficients: (d,).

        Returns:
            Displacements from the origin by name, of dtype `dtype`.

        Raises:
            ValueError: another number of coefficients.
        """
        return self.layout.views(self._displacement(coefficients))

    def parameters(self, coefficients: Tensor) -> dict[str, Tensor]:
        """theta = origin + P^T c, differentiable in c; tensors by name, in their own dtypes.

        Args:
            coefficients: (d,).

        Raises:
            ValueError: another number of coefficients.
        """
        return self.layout.tensors(self.origin + self._displacement(coefficients))

    def coefficients(self, model: NamedParams) -> Tensor:
        """P (theta - origin), (d,): where a model stands, seen from within the subspace.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        theta_N = self.layout.flatten(named(model, aliases=True)).to(self.device)
        return products.projected(self.blocks, theta_N - self.origin)

    def _displacement(self, coefficients: Tensor) -> Tensor:
        require_kind("Subspace", "coefficients", coefficients, Tensor)
        if coefficients.shape[-1:] != (self.dim,):
            raise ValueError(
                f"Subspace: expected ({self.dim},) coefficients, got {tuple(coefficients.shape)}"
            )
        return products.lift(coefficients.to(self.dtype), (self.blocks,))

    def with_origin(self, model: NamedParams) -> Subspace:
        """The same directions (shared, not copied) through another start: a model's present
        weights and buffers.

        Raises:
            ValueError: the model does not fit.
        """
        origin = self.layout.flatten(named(model, aliases=True)).to(self.device)
        buffers = buffers_of(model) if isinstance(model, torch.nn.Module) else {}
        buffers = {name: value.to(self.device) for name, value in buffers.items()}
        return Subspace(self.blocks, origin, self.layout, buffers, self.info)

    def to(self, device: torch.device | str) -> Subspace:
        """The same subspace on a device; itself where it is there."""
        device = torch.empty(0, device=device).device  # `cuda` is one of them, with its number
        if self.device == device:
            return self
        moved = dataclasses.replace(
            self, blocks=tuple(block.to(device) for block in self.blocks),
            origin=self.origin.to(device),
            buffers={key: value.to(device) for key, value in self.buffers.items()},
        )  # fmt: skip
        if "fingerprint" in self.__dict__:  # to hash a large basis takes seconds
            moved.__dict__["fingerprint"] = self.fingerprint
        return moved

    def deviation(self) -> float:
        """The largest entry of |P P^T - 1|: how far the stored rows are from orthonormal."""
        worst = 0.0
        for block_DN in self.blocks:
            gram = torch.zeros(len(block_DN), len(block_DN), dtype=torch.float64)
            for part_DB in block_DN.split(2**16, dim=1):
                wide = part_DB.double()
                gram += (wide @ wide.t()).cpu()
            worst = max(worst, float((gram - torch.eye(len(gram))).abs().max()))
        return worst

    def _tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        blocks = {
            f"basis.{place}": block.to(dtype or block.dtype)
            for place, block in enumerate(self.blocks)
        }
        buffers = {f"buffer.{name}": value for name, value in self.buffers.items()}
        return {**blocks, "origin": self.origin, **buffers}

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write one safetensors file with a JSON manifest inside, atomically; an older file of that
        name is replaced.

        Args:
            path: the file; `.safetensors` is added where it has no suffix.
            dtype: to store the basis in; `torch.bfloat16` halves the file and what is read at every
                step, and rounds the rows, which are then orthonormal to about 1e-5.

        Returns:
            The path written.

        Raises:
            ValueError: another dtype than one of `STORED`.
            CheckpointError: the disk refuses.
        """
        require_stored("Subspace.save", dtype)
        path = store.suffixed(path)
        manifest = {
            "kind": "subspace", "version": __version__, "info": self.info,
            "layout": {
                "names": self.layout.names, "shapes": self.layout.shapes,
                "dtypes": [str(d).removeprefix("torch.") for d in self.layout.dtypes],
            },
        }  # fmt: skip
        store.write(path, self._tensors(dtype), manifest)
        return path

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Subspace:
        """Read what `save` wrote.

        Args:
            path: the file, named as for `save`.
            device: where to put it.

        Raises:
            CheckpointError: missing, damaged, or no subspace.
        """
        given = store.place("Subspace.load", path)
        path = given if given.is_file() else store.suffixed(given)
        tensors, manifest = store.read(path, "subspace", store.LONGEST_MANIFEST)
        try:
            layout = _layout(manifest["layout"])
            count = sum(key.startswith("basis.") for key in tensors)
            blocks = tuple(tensors[f"basis.{place}"] for place in range(count))
            buffers = {
                key.removeprefix("buffer."): value
                for key, value in tensors.items()
                if key.startswith("buffer.")
            }
            info = _require_info(manifest["info"])
            found = cls(blocks, tensors["origin"], layout, buffers, info)
            found.__dict__["fingerprint"] = manifest["fingerprint"]
            return found.to(device)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the manifest lacks or garbles {error}") from None


def _layout(told: dict[str, list[Any]]) -> TypedLayout:
    """A layout as a manifest tells it.

    Raises:
        ValueError, TypeError, KeyError: it does not.
    """
    names, shapes, dtypes = (told[key] for key in ("names", "shapes", "dtypes"))
    if not len(names) == len(shapes) == len(dtypes):
        raise ValueError("layout: as many names, shapes and dtypes are needed")
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        # Products beyond it begin again at zero in PyTorch.
        if (
            not isinstance(name, str) or not isinstance(kind, torch.dtype) or not whole
            or math.prod(n or 1 for n in shape) >= 2**63
        ):  # fmt: skip
            raise ValueError(f"layout: {name!r:.60} of shape {shape!r:.60} and dtype {dtype!r:.60}")
    return TypedLayout(
        tuple(names), tuple(tuple(shape) for shape in shapes),
        tuple(getattr(torch, name) for name in dtypes),
    )  # fmt: skip


def _require_info(info: Any) -> dict[str, Any]:
    """What a manifest says of how a subspace was made.

    Raises:
        ValueError: what is read of it is of another type.
    """
    explained = info.get("explained", []) if isinstance(info, dict) else None
    if (
        not isinstance(info, dict)
        or not isinstance(info.get("kind", ""), str)
        or not isinstance(explained, list)
        or not all(isinstance(block, list) for block in explained)
        or not all(type(share) in (int, float) for block in explained for share in block)
    ):
        raise ValueError(f"info: {info!r:.60}")
    return info


def require_stored(owner: str, dtype: torch.dtype | None) -> None:
    """Check a dtype for the basis.

    Raises:
        ValueError: none of `STORED`.
    """
    if dtype is not None and dtype not in STORED:
        raise ValueError(
            f"{owner}: dtype must be one of {', '.join(map(str, STORED))}, got {dtype}"
        )


def require_counts(owner: str, **counts: int) -> None:
    """Check numbers that must be whole and at least 1.

    Raises:
        ValueError: one that is not.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}: {name} must be a whole number, at least 1, got {value!r}")


def require_room(owner: str, d: int, layout: TypedLayout) -> None:
    """Check that there are as many numbers as directions.

    Raises:
        ValueError: fewer.
    """
    if d > layout.total:
        raise ValueError(
            f"{owner}: d = {d} directions asked for, but the model has only {layout.total} "
            f"parameters; lower d to at most {layout.total}"
        )


def buffers_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a module's buffers by name."""
    return {name: value.detach().clone() for name, value in unwrapped(model).named_buffers()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that holds a nan or an infinity; None where none does."""
    bad = (name for name, value in tensors.items() if not bool(value.isfinite().all()))
    return next(bad, None)
