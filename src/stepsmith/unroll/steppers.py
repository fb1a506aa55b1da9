"""What moves the copies: a rule on the flat tensor, or a `torch.optim` optimizer.

Shape letters: C = copies, P = parameters of one optimizee, F = features, O = outputs,
K = channels of one carried tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.layout import Layout
from stepsmith.rules.base import (
    Carry,
    Rule,
    State,
    Weights,
    require_kind,
    require_number,
    statistics_dtype,
)
from stepsmith.rules.units import norms

Keep = Callable[[Tensor, Tensor | None], None]
"""Sees the features (F, N) of all N = C * P coordinates and their scale (N,) or None."""

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Stepper(Protocol):
    """Moves theta (C, P), in place, given the gradients (C, P)."""

    def __call__(self, theta_CP: Tensor, grad_CP: Tensor) -> None:
        """Make one step."""
        ...


class RuleStepper:
    """A rule's statistics and carry for C copies, and its steps.

    Args:
        rule: the rule.
        weights: its weights; replaced by `load`.
        theta_CP: the copies' parameters, for shapes, dtype, device and first statistics.
        layout: of one copy.
        lr: factor on every step.
        weight_decay: decoupled: theta <- (1 - lr * weight_decay) theta + lr * step.
        backend: that makes the steps.
        carry_dtype: of the carry between steps, where it is not the parameters'.

    Attributes:
        state: coordinate statistics (C, P); per-tensor ones (C, tensors), or (C, 1) where the rule
            couples nothing and all tensors share one.
        carry: (K, C * P) tensors.
        measures: (C,) numbers of the rule's units, none where it has no units.
        seen, gain: (C,) factors on gradients and on steps at the last step, None without units.
    """

    def __init__(
        self,
        rule: Rule,
        weights: Weights,
        theta_CP: Tensor,
        layout: Layout,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        backend: str = "auto",
        carry_dtype: torch.dtype | None = None,
    ):
        if statistics_dtype(theta_CP.dtype) != theta_CP.dtype:
            raise ValueError(
                f"RuleStepper: optimizees are trained in float32 or float64, not {theta_CP.dtype}; "
                "make the task in one of these (LearnedOptimizer takes parameters of any)"
            )
        require_kind("RuleStepper", "rule", rule, Rule)
        self.rule, self.layout = rule, layout
        self.lr = require_number("RuleStepper", "lr", lr)
        self.weight_decay = require_number("RuleStepper", "weight_decay", weight_decay, least=0)
        self.backend = backend
        self.state = self._fresh_state(theta_CP)
        kernels.require_carry(rule, carry_dtype)
        self.carry_dtype = carry_dtype or theta_CP.dtype
        self.carry = self._fresh_carry(theta_CP.numel(), theta_CP.device)
        self.measures = self._fresh_measures(theta_CP)
        self.seen: Tensor | None = None
        self.gain: Tensor | None = None
        self.load(weights, theta_CP)

    def load(self, weights: Weights, theta_CP: Tensor) -> None:
        """Step by these weights from now on."""
        given = (self.rule, weights, theta_CP.dtype, theta_CP.device, self.backend)
        if self.uncoupled:
            self._advance = kernels.advance_function(*given, self.carry_dtype)
        else:
            self._network = kernels.network_function(*given)

    @property
    def uncoupled(self) -> bool:
        """Whether the rule treats every coordinate alone."""
        return self.rule.coupling == "none"

    def _fresh_state(self, theta_CP: Tensor) -> State:
        copies = len(theta_CP)
        if self.uncoupled:
            return kernels.init_state(self.rule, theta_CP)
        parts = [
            torch.func.vmap(self.rule.init_state)(theta_CP[:, span]) for span in self.layout.spans
        ]
        return {
            key: torch.stack([part[key].expand(copies) for part in parts], dim=1)
            if key in self.rule.per_tensor
            else torch.cat([part[key] for part in parts], dim=1)
            for key in parts[0]
        }

    def _fresh_carry(self, coordinates: int, device: torch.device) -> Carry:
        return self.rule.init_carry(coordinates, dtype=self.carry_dtype, device=device)

    def _fresh_measures(self, theta_CP: Tensor) -> State:
        if self.rule.units is None:
            return {}
        dtype = statistics_dtype(theta_CP.dtype)
        return self.rule.units.init(len(theta_CP), dtype=dtype, device=theta_CP.device)

    def restart(self, copy: int, theta_CP: Tensor) -> None:
        """Forget what one copy has seen."""
        for key, fresh in self._fresh_measures(theta_CP[copy : copy + 1]).items():
            self.measures[key][copy] = fresh[0]
        for key, fresh in self._fresh_state(theta_CP[copy : copy + 1]).items():
            self.state[key][copy] = fresh[0]
        size = theta_CP.shape[1]
        # One coordinate's for all: a whole copy's would be the largest tensors there are, twice.
        for key, value_K1 in self._fresh_carry(1, theta_CP.device).items():
            self.carry[key][:, copy * size : (copy + 1) * size] = value_K1

    @torch.no_grad()
    def __call__(self, theta_CP: Tensor, grad_CP: Tensor, keep: Keep | None = None) -> None:
        """One step; `keep` sees the features and scales of a rule that couples coordinates."""
        if self.rule.units is not None:
            self.seen, self.gain, self.measures = self.rule.units.measure(
                norms(grad_CP), self.layout.total, self.measures
            )
            grad_CP = grad_CP * self.seen[:, None]
        delta_CP = self._delta(theta_CP, grad_CP, keep)
        if self.weight_decay:
            theta_CP.mul_(1 - self.lr * self.weight_decay)
        if self.gain is None:
            theta_CP.add_(delta_CP, alpha=self.lr)
        else:
            theta_CP.addcmul_(delta_CP, self.gain[:, None], value=self.lr)

    def _delta(self, theta_CP: Tensor, grad_CP: Tensor, keep: Keep | None = None) -> Tensor:
        """The rule's steps, gradients and steps in its own units; state and carry move on."""
        if self.uncoupled:
            return self._advance(grad_CP, theta_CP, self.state, self.carry)
        return self._coupled(theta_CP, grad_CP, keep)

    def _coupled(self, theta_CP: Tensor, grad_CP: Tensor, keep: Keep | None) -> Tensor:
        features_FCP, scale_CP = self._features_by_tensor(theta_CP, grad_CP)
        features_FN = features_FCP.flatten(1)
        scale_N = None if scale_CP is None else scale_CP.reshape(-1)
        if keep is not None:
            keep(features_FN, scale_N)
        delta_N = torch.empty_like(features_FN[0])
        whole = [slice(0, len(delta_N))]
        spans = coupled_spans(self.layout, len(theta_CP))
        for span in spans if self.rule.coupling == "network" else whole:
            carry = {key: value[:, span] for key, value in self.carry.items()}
            output = self._network(features_FN[:, span], carry)
            delta_N[span] = self.rule.step(output, None if scale_N is None else scale_N[span])
        return delta_N.view_as(theta_CP)

    def _features_by_tensor(
        self, theta_CP: Tensor, grad_CP: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        features, scales, states = [], [], []
        for tensor, (span, shape) in enumerate(
            zip(self.layout.spans, self.layout.shapes, strict=True)
        ):
            own = {
                key: value[:, tensor] if key in self.rule.per_tensor else value[:, span]
                for key, value in self.state.items()
            }

            def one(grad_N: Tensor, theta_N: Tensor, state: State, shape=shape):
                features_FN, scale_N, state = self.rule.features(grad_N, theta_N, state, shape)
                return features_FN, torch.empty(0) if scale_N is None else scale_N, state

            features_CFN, scale_CN, state = torch.func.vmap(one)(
                grad_CP[:, span], theta_CP[:, span], own
            )
            features.append(features_CFN.transpose(0, 1))
            scales.append(scale_CN)
            states.append(state)
        self.state = {
            key: torch.stack([s[key] for s in states], dim=1)
            if key in self.rule.per_tensor
            else torch.cat([s[key] for s in states], dim=1)
            for key in self.state
        }
        scale_CP = torch.cat(scales, dim=1)
        return torch.cat(features, dim=2), scale_CP if scale_CP.numel() else None


def coupled_spans(layout: Layout, copies: int) -> list[slice]:
    """The spans of C * P coordinates that a network which couples them sees at once: each tensor
    of each copy."""
    size = layout.total
    return [
        slice(copy * size + span.start, copy * size + span.stop)
        for copy in range(copies)
        for span in layout.spans
    ]


ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Rprop, torch.optim.ASGD,
)  # fmt: skip
"""Optimizers that treat each number alone, so that C copies in one tensor are C separate runs."""


class TorchStepper:
    """A `torch.optim` optimizer on the copies.

    Elementwise optimizers get one (C, P) tensor; any other gets each copy's own tensors and an
    instance a copy.

    Args:
        make: called with parameters, returns the optimizer.
        theta_CP: the copies' parameters.
        layout: of one copy.
    """

    def __init__(self, make: MakeOptimizer, theta_CP: Tensor, layout: Layout):
        self.layout = layout
        self._joined = torch.nn.Parameter(theta_CP.clone())
        optimizer = make([self._joined])
        self._split: list[list[Tensor]] | None = None
        self._optimizers = [optimizer]
        if type(optimizer) not in ELEMENTWISE:
            self._split = [
                [torch.nn.Parameter(p.clone()) for p in layout.views(row).values()]
                for row in theta_CP
            ]
            self._optimizers = [make(params) for params in self._split]

    def __call__(self, theta_CP: Tensor, grad_CP: Tensor) -> None:
        """One step."""
        if self._split is None:
            self._joined.grad = grad_CP
            self._optimizers[0].step()
            theta_CP.copy_(self._joined.detach())
            return
        for copy, (params, optimizer) in enumerate(zip(self._split, self._optimizers, strict=True)):
            for param, grad in zip(params, self.layout.views(grad_CP[copy]).values(), strict=True):
                param.grad = grad.clone()
            optimizer.step()
            theta_CP[copy] = torch.cat([p.detach().reshape(-1) for p in params])
