"""A task in a subspace: what is optimised are a few coefficients.

Shape letters: D = directions, N = numbers of all tensors, K = bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepsmith.subspace import Subspace, products
from stepsmith.tasks.base import Batch, Buffers, Metrics, Params, Task
from stepsmith.tasks.wrapped import WrappedTask

COEFFICIENTS = "coefficients"
"""The name of the one parameter, c."""
BASIS = "subspace.basis"
"""The name of the buffer that says which basis a copy has, where there are several."""


class SubspaceTask(WrappedTask):
    """Another task, trained within a subspace: theta = origin + P^T c, starting at c = 0.

    Batches, loss, data and stacking are the inner task's. All copies of an optimizee share the
    bases. With several, each fresh start draws one, with its origin.

    A start's buffers (batch-norm's statistics) are those saved with the subspace, where it has
    them, else the inner task's own fresh ones; frozen parameters are the inner task's.

    Args:
        task: the inner task, its `init` giving the tensors the subspaces are of.
        subspaces: a basis, or several of one dimension over the same tensors.

    Raises:
        ValueError: no subspace, several of different dimensions, or one that does not fit the
            task's parameters (names the first tensor that differs, in shape or dtype) or buffers,
            or a frozen parameter that every start of the task draws anew.
        TypeError: something else than a `Subspace`.
    """

    def __init__(self, task: Task, subspaces: Subspace | Sequence[Subspace]):
        given = [subspaces] if isinstance(subspaces, Subspace) else list(subspaces)
        if not given:
            raise ValueError("SubspaceTask: give at least one subspace")
        for subspace in given:
            if not isinstance(subspace, Subspace):
                raise TypeError(
                    f"SubspaceTask: subspaces must be a Subspace or several, got "
                    f"{type(subspace).__name__}; Subspace.load reads one from a file"
                )
        dims = sorted({subspace.dim for subspace in given})
        if len(dims) > 1:
            raise ValueError(
                f"SubspaceTask: subspaces have {', '.join(map(str, dims))} directions; one "
                "optimizee has one number of coefficients, so make them all of one"
            )
        params, buffers = task.init(torch.Generator().manual_seed(0))
        for subspace in given:
            _require_same(subspace, params)
            _require_buffers(subspace, buffers)
        _require_one_start(task, given, buffers)
        super().__init__(task)
        self.subspaces = tuple(subspace.to(task.device) for subspace in given)
        # Which of several bases a copy has is looked up on the host.
        self.capturable = self.capturable and len(self.subspaces) == 1
        self.dim = dims[0]
        self.name = f"{task.name}, subspace {self.dim}"
        self.dtype = self.subspaces[0].dtype
        self._layout = self.subspaces[0].layout
        if any(subspace.layout != self._layout for subspace in self.subspaces):
            raise ValueError(
                "SubspaceTask: the subspaces differ in the order or the dtypes of their tensors; "
                "make them all in one way"
            )
        self._bases = tuple(subspace.blocks for subspace in self.subspaces)
        self._origins_KN = torch.stack([subspace.origin for subspace in self.subspaces])

    @property
    def details(self) -> dict[str, Any]:
        """Which bases."""
        return {**self.task.details, "subspaces": [s.fingerprint for s in self.subspaces]}

    def init(self, generator: torch.Generator) -> tuple[Params, Buffers]:
        """c = 0, and the buffers of the origin; with several bases, the number of one drawn."""
        chosen = 0
        if len(self.subspaces) > 1:
            chosen = int(torch.randint(len(self.subspaces), (), generator=generator))
        _, buffers = self.task.init(generator)
        saved = self.subspaces[chosen].buffers
        buffers |= {
            key: saved[key].to(value, copy=True) for key, value in buffers.items() if key in saved
        }
        if len(self.subspaces) > 1:
            buffers[BASIS] = torch.tensor(chosen, device=self.device)
        zeros = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
        return {COEFFICIENTS: zeros}, buffers

    def loss(
        self,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        generator: torch.Generator | None,
        train: bool,
    ) -> tuple[Tensor, Buffers, Metrics]:
        """The inner task's loss at origin + P^T c; its gradient in c is P g."""
        own = {key: value for key, value in buffers.items() if key != BASIS}
        theta = self.parameters(params[COEFFICIENTS], buffers.get(BASIS))
        loss, own, metrics = self.task.loss(theta, own, batch, generator, train)
        if BASIS in buffers:
            own = {**own, BASIS: buffers[BASIS]}
        return loss, own, metrics

    def parameters(self, coefficients: Tensor, basis: Tensor | None = None) -> Params:
        """The inner task's parameters at these coefficients.

        Args:
            coefficients: (d,).
            basis: (), int64, which basis; None is the first.
        """
        origin_N = self._origins_KN[0]
        if basis is not None:
            # Under vmap the basis differs from copy to copy, which plain indexing cannot take.
            origin_N = self._origins_KN.index_select(0, basis.reshape(1))[0]
        theta_N = origin_N + products.lift(coefficients, self._bases, basis)
        return self._layout.tensors(theta_N)


def _require_buffers(subspace: Subspace, buffers: Buffers) -> None:
    for name in buffers.keys() & subspace.buffers.keys():
        have, want = (tuple(part[name].shape) for part in (subspace.buffers, buffers))
        if have != want:
            raise ValueError(
                f"SubspaceTask: the subspace does not fit: its buffer {name!r} has shape {have}, "
                f"the task's {want}; use it with the network it was made for"
            )


def _require_one_start(task: Task, given: Sequence[Subspace], buffers: Buffers) -> None:
    """Theta is the origin's only beside the frozen parameters that were the origin's."""
    drawn = [n for n in task.frozen if any(n not in subspace.buffers for subspace in given)]
    if not drawn:
        return
    _, other = task.init(torch.Generator().manual_seed(1))
    for name in sorted(drawn):
        if not torch.equal(buffers[name], other[name]):
            raise ValueError(
                f"SubspaceTask: the task's frozen parameter {name!r} is drawn anew for every "
                "start, but a subspace is of one; load or seed it where the model is made"
            )


def _require_same(subspace: Subspace, params: Params) -> None:
    layout = subspace.layout
    layout.require(params, "the task's parameters")
    for name, dtype in zip(layout.names, layout.dtypes, strict=True):
        if params[name].dtype != dtype:
            raise ValueError(
                f"SubspaceTask: the task's parameter {name!r} is {params[name].dtype}, in the "
                f"subspace {dtype}; make the subspace from parameters of the task's dtype"
            )
    extra = next((name for name in params if name not in subspace.layout.names), None)
    if extra is not None:
        raise ValueError(
            f"SubspaceTask: the task's parameter {extra!r} is not in the subspace; make the "
            "subspace with all of them"
        )
