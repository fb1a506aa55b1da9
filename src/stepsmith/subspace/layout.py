"""Which tensors a subspace is made of, and whether a model has them.

Shape letters: N = numbers of all tensors, flattened and joined; X = any leading axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stepsmith.layout import Layout
from stepsmith.rules.base import require_kind


@dataclass(frozen=True)
class TypedLayout(Layout):
    """A layout of tensors that may differ in dtype.

    Args:
        names: in the order in which they are joined.
        shapes, dtypes: of each.

    Raises:
        ValueError: no tensor, a name twice, or a tensor that is not of floating-point numbers.
    """

    dtypes: tuple[torch.dtype, ...]

    def __post_init__(self):
        if not self.names:
            raise ValueError(
                "subspace: there is no parameter to make a subspace of; does any require a "
                "gradient?"
            )
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"subspace: tensor {twice!r} is named twice")
        for name, dtype in zip(self.names, self.dtypes, strict=True):
            if not dtype.is_floating_point:
                raise ValueError(
                    f"subspace: tensor {name!r} is {dtype}, not floating-point; only parameters "
                    "belong in a subspace: pass the model itself, or params=model with checkpoints"
                )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TypedLayout:
        """The layout of these tensors, in their order."""
        values = tensors.values()
        return cls(
            tuple(tensors), tuple(tuple(v.shape) for v in values), tuple(v.dtype for v in values)
        )

    @cached_property
    def wide(self) -> torch.dtype:
        """What holds all of them exactly: float64 where any tensor is, else float32."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors of these names into (N,), of dtype `wide`.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        self.require(tensors)
        return torch.cat([tensors[n].detach().reshape(-1).to(self.wide) for n in self.names])

    def tensors(self, flat_XN: Tensor) -> dict[str, Tensor]:
        """`views`, in the tensors' own dtypes."""
        views = self.views(flat_XN).items()
        return {name: v.to(dtype) for (name, v), dtype in zip(views, self.dtypes, strict=True)}

    def require(self, tensors: Mapping[str, Tensor], whose: str = "the tensors") -> None:
        """Check that tensors of these names and shapes are there; others may be.

        Raises:
            ValueError: names the first that is missing, differs or is none, and how.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors:
                raise ValueError(
                    f"the subspace does not fit: its tensor {name!r}, of shape {shape}, is not "
                    f"among {whose}; use it with the network it was made for"
                )
            if not isinstance(tensors[name], Tensor):
                raise ValueError(
                    f"the subspace's tensor {name!r} is {tensors[name]!r} among {whose}; give a "
                    "tensor, zeros for a gradient that there is not"
                )
            have = tuple(tensors[name].shape)
            if have != shape:
                raise ValueError(
                    f"the subspace does not fit: its tensor {name!r} has shape {shape}, that of "
                    f"{whose} {have}; use it with the network it was made for"
                )


_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

NamedParams = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""A model, or its parameters by name."""


def named(model: NamedParams, *, aliases: bool = False) -> dict[str, Tensor]:
    """A model's parameters by name.

    Args:
        model: a module, compiled or not, or its parameters by name.
        aliases: give a tensor that the module holds under several names under each of them, not
            under the first alone.

    Raises:
        TypeError: something else, such as parameters without names.
    """
    if isinstance(model, nn.Module):
        module = unwrapped(model)
        return dict(module.named_parameters(remove_duplicate=not aliases))
    require_kind("a subspace", "the model", model, Mapping | Iterable, "pass the model itself")
    pairs: Iterable[Any] = model.items() if isinstance(model, Mapping) else model
    found: dict[str, Tensor] = {}
    pair: Any
    for pair in pairs:
        named_one = isinstance(pair, tuple | list) and len(pair) == 2
        if not named_one or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
            raise TypeError(
                "a subspace goes by the names of parameters: pass the model itself, or "
                "model.named_parameters(), not model.parameters()"
            )
        found[pair[0]] = pair[1]
    return found


def trainable(model: NamedParams) -> dict[str, Tensor]:
    """Those that require gradients, a tied one under its first name alone."""
    return {name: p for name, p in named(model).items() if p.requires_grad}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile` or data parallelism has put it under another
    name."""
    inner = model.module if isinstance(model, _PARALLEL) else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def members(layout: TypedLayout, model: NamedParams) -> list[Tensor]:
    """The model's parameters that a layout names, in the layout's order.

    Whatever order the model has them in; tied parameters may go by any of their names.

    Raises:
        ValueError: names the first tensor of the layout that the model lacks, has in another shape
            or frozen, or that is one with an earlier one; or the first parameter of the model that
            requires a gradient and is not in the layout.
    """
    params = named(model, aliases=True)
    layout.require(params, "the model")
    first: dict[int, str] = {}
    for name in layout.names:
        param = params[name]
        if not param.requires_grad:
            raise ValueError(
                f"the subspace does not fit: its tensor {name!r} is frozen in the model "
                "(requires_grad=False), so it cannot follow the coefficients; unfreeze it, or make "
                "a subspace without it"
            )
        other = first.setdefault(id(param), name)
        if other != name:
            raise ValueError(
                f"the subspace does not fit: its tensors {other!r} and {name!r} are one tied "
                "parameter of the model; make the subspace with params=model, which names it once"
            )
    for name, param in params.items():
        if param.requires_grad and id(param) not in first:
            raise ValueError(
                f"the subspace does not fit: the model's parameter {name!r}, of shape "
                f"{tuple(param.shape)}, requires a gradient and is not in the subspace, so it "
                "would never move; freeze it (requires_grad_(False)), or make a subspace with it"
            )
    return [params[name] for name in layout.names]
