"""Many parameters' statistics and carries as a few long tensors.

An LSTM step costs least on one long vector. A bucket therefore holds the state of all parameters
of a device and dtype side by side, and `optimizer.state[p]` holds views into it, in the
parameter's own shape, so that saving, loading and inspecting work as for any optimizer.

Shape letters: N = coordinates of all members, n = coordinates of one member, K = channels of one
carried tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.kernels.plain import NetworkStep
from stepsmith.rules.base import Carry, Rule, State, Weights, statistics_dtype


@dataclass
class Member:
    """A parameter of a bucket: its place, the steps it has made, and its entry in `state`."""

    param: Tensor
    index: int
    span: slice
    steps: int
    state: dict[str, Any]
    views: dict[str, Tensor]


class Bucket:
    """The state of some parameters of one device and one statistics dtype.

    Args:
        rule: the rule.
        params: the members; none is empty.
        entries: `optimizer.state[p]` of each; filled with views, from what it holds already (after
            loading) or afresh.
        carry_dtype: of the carry; None is the statistics'.
    """

    def __init__(
        self,
        rule: Rule,
        params: list[Tensor],
        entries: list[dict[str, Any]],
        carry_dtype: torch.dtype | None = None,
    ):
        self.rule = rule
        self.device = params[0].device
        self.dtype = statistics_dtype(params[0].dtype)
        self.carry_dtype = carry_dtype or self.dtype
        self.members: list[Member] = []
        self.state: State = {}
        self.carry: Carry = {}
        self._advance: kernels.Advance | None = None
        self._network: NetworkStep | None = None
        # Long tensors from the start: joining the members' own would need twice the memory.
        total = sum(param.numel() for param in params)
        self.carry = rule.init_carry(total, dtype=self.carry_dtype, device=self.device)
        units = rule.units
        self._fresh = {} if units is None else units.init(1, dtype=self.dtype, device=self.device)
        numbers: list[State] = []
        end = 0
        for param, entry in zip(params, entries, strict=True):
            span = slice(end, end + param.numel())
            end = span.stop
            numbers.append(self._fill(param, span, entry, total))
            index, steps = len(self.members), int(numbers[-1]["step"])
            self.members.append(Member(param, index, span, steps, entry, {}))
        # Moved in place, so that a captured CUDA graph counts on: one number a member.
        self.per_tensor = {key: torch.stack([n[key] for n in numbers]) for key in rule.per_tensor}
        self.measures = {key: torch.stack([n[key] for n in numbers]) for key in self._fresh}
        for member in self.members:
            self._expose(member)

    def _fill(self, param: Tensor, span: slice, entry: dict[str, Any], total: int) -> State:
        """Write one parameter's state and carry, from its entry or afresh; returns its numbers for
        `Rule.per_tensor` and `Rule.units`."""
        state = self.rule.init_state(param.detach().reshape(-1).to(self.dtype))
        if entry:
            for key, fresh in state.items():
                state[key] = entry[key].reshape(fresh.shape).to(fresh)
            for key, value in self.carry.items():
                value[:, span] = entry[key].movedim(-1, 0).reshape(len(value), -1)
        numbers = {key: state.pop(key) for key in self.rule.per_tensor}
        numbers |= {
            key: entry[key].reshape(()).to(fresh) if entry else fresh[0]
            for key, fresh in self._fresh.items()
        }
        for key, value in state.items():
            if key not in self.state:
                self.state[key] = value.new_empty(total)
            self.state[key][span] = value
        return numbers

    def _expose(self, member: Member) -> None:
        shape = member.param.shape
        for key, value in [*self.per_tensor.items(), *self.measures.items()]:
            member.views[key] = value[member.index]
        for key, value in self.state.items():
            member.views[key] = value[member.span].view(shape)
        for key, value in self.carry.items():
            view = value[:, member.span].view(len(value), *shape)
            member.views[key] = view.movedim(0, -1)
        member.state.update(member.views)

    def note(self, measures: State) -> None:
        """Let every member's state say what the whole optimizee measures: (1,) tensors."""
        for key, value in self.measures.items():
            value.copy_(measures[key].expand_as(value))

    def intact(self, state: Any) -> bool:
        """Whether `optimizer.state` still holds this bucket's views (loading replaces them)."""
        return all(
            state.get(member.param) is member.state
            and all(member.state.get(key) is view for key, view in member.views.items())
            for member in self.members
        )

    def runs(self, active: set[int]) -> Iterator[list[Member]]:
        """Neighbouring members with a gradient and the same number of steps.

        A rule that couples coordinates sees every tensor alone.
        """
        run: list[Member] = []
        for member in self.members:
            joins = id(member.param) in active
            alone = self.rule.coupling != "none"
            if run and (not joins or alone or run[-1].steps != member.steps):
                yield run
                run = []
            if joins:
                run.append(member)
        if run:
            yield run

    @torch.no_grad()
    def step(self, run: list[Member], weights: Weights, backend: str, grad_n: Tensor) -> Tensor:
        """Advance a run by one gradient; returns the step (n,), not yet applied.

        Args:
            run: from `runs`.
            weights: the rule's, the same at every call.
            backend: that makes the step.
            grad_n: the members' gradients, flat and joined, in the statistics' dtype.
        """
        rule, end = self.rule, run[0].span.start + len(grad_n)
        span = slice(run[0].span.start, end)
        param_n = grad_n
        if rule.reads_param:
            param_n = torch.cat([m.param.detach().reshape(-1).to(self.dtype) for m in run])
        carry = {key: value[:, span] for key, value in self.carry.items()}
        own = {key: value[span] for key, value in self.state.items()}
        # Members of a run have made the same number of steps: the first counts for all.
        counts = {
            key: value[run[0].index : run[-1].index + 1] for key, value in self.per_tensor.items()
        }
        if rule.coupling == "none":
            if self._advance is None:
                self._advance = kernels.advance_function(
                    rule, weights, self.dtype, self.device, backend, self.carry_dtype
                )
            state = {key: value[None] for key, value in own.items()}
            state |= {key: value[:1, None] for key, value in counts.items()}
            delta_n = self._advance(grad_n[None], param_n[None], state, carry)[0]
        else:
            if self._network is None:
                self._network = kernels.network_function(
                    rule, weights, self.dtype, self.device, backend
                )
            shape = tuple(run[0].param.shape)
            one = {key: value[0] for key, value in counts.items()}
            features, scale, new = rule.features(grad_n, param_n, own | one, shape)
            for key, value in [*own.items(), *one.items()]:
                value.copy_(new[key])
            delta_n = rule.step(self._network(features, carry), scale)
        for value in counts.values():
            value[1:] = value[0]
        for member in run:
            member.steps += 1
        return delta_n
