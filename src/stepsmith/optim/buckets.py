"""Many parameters' statistics and carries as a few long tensors.

An LSTM step costs least on one long vector. A bucket therefore holds the state of all parameters
of a device and dtype side by side, and `optimizer.state[p]` holds views into it, in the
parameter's own shape, so that saving, loading and inspecting work as for any optimizer.

Shape letters: N = coordinates of all members, n = coordinates of one member, K = channels of one
carried tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.kernels.plain import NetworkStep
from stepsmith.optim.entries import LAST
from stepsmith.rules.base import Carry, Rule, State, Weights, statistics_dtype


@dataclass
class Member:
    """A parameter of a bucket: its place, the steps it has made, and its entry in `state`."""

    param: Tensor
    index: int
    span: slice
    shape: torch.Size
    dtype: torch.dtype
    steps: int
    state: dict[str, Any]
    views: dict[str, Tensor]
    held: tuple[Any, ...] = ()
    """All values of the entry in their order, which are fast to compare."""

    def holds_views(self) -> bool:
        """Whether the entry still holds the views, whatever else has changed in it."""
        held = all(self.state.get(key) is view for key, view in self.views.items())
        if held:
            self.held = tuple(self.state.values())
        return held


class Bucket:
    """The state of some parameters of one device and one statistics dtype.

    Args:
        rule: the rule.
        params: the members; none is empty, and one listed again steps again.
        entries: `optimizer.state[p]` of each; filled with views, from what it holds already (after
            loading) or afresh. What it holds fits the rule (`EntryForm.misfit`).
        carry_dtype: of the carry; None is the statistics'.
        keeps_last: whether to keep how far the last step moved each coordinate.

    Attributes:
        last: (N,) that, 0 where nothing moved; None where it is not kept.
    """

    def __init__(
        self,
        rule: Rule,
        params: list[Tensor],
        entries: list[dict[str, Any]],
        carry_dtype: torch.dtype | None = None,
        keeps_last: bool = False,
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
        self._again: list[Member] = []
        self._grads: list[Tensor | None] = []
        units, numbers, known, end = rule.units, [], {}, 0
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            # Long tensors from the start: joining the members' own would need twice the memory.
            total = sum(param.numel() for param in {id(param): param for param in params}.values())
            self.carry = rule.init_carry(total, dtype=self.carry_dtype, device=self.device)
            self.last = None
            if keeps_last:
                self.last = torch.zeros(total, dtype=self.dtype, device=self.device)
            self._fresh = (
                {} if units is None else units.init(1, dtype=self.dtype, device=self.device)
            )
            for param, entry in zip(params, entries, strict=True):
                if not keeps_last:
                    entry.pop(LAST, None)  # it would not be the last for long
                if id(param) in known:
                    self._again.append(known[id(param)])
                    continue
                span = slice(end, end + param.numel())
                end = span.stop
                numbers.append(self._fill(param, span, entry, total))
                member = Member(
                    param, len(self.members), span, param.shape, param.dtype,
                    int(numbers[-1]["step"]), entry, {},
                )  # fmt: skip
                known[id(param)] = member
                self.members.append(member)
            # Moved in place, so that a captured CUDA graph counts on: one number a member.
            self.per_tensor = {
                key: torch.stack([n[key] for n in numbers]) for key in rule.per_tensor
            }
            self.measures = {key: torch.stack([n[key] for n in numbers]) for key in self._fresh}
            for member in self.members:
                self._expose(member)
        self._numbers = (*self.per_tensor.values(), *self.measures.values())
        self.settle()

    def _fill(self, param: Tensor, span: slice, entry: dict[str, Any], total: int) -> State:
        """Write one parameter's state and carry, from its entry or afresh; returns its numbers for
        `Rule.per_tensor` and `Rule.units`."""
        state = self.rule.init_state(param.detach().reshape(-1).to(self.dtype))
        loaded = "step" in entry
        if loaded:
            for key, fresh in state.items():
                state[key] = torch.as_tensor(entry[key]).reshape(fresh.shape).to(fresh)
            for key, value in self.carry.items():
                value[:, span] = entry[key].movedim(-1, 0).reshape(len(value), -1)
        if self.last is not None and isinstance(entry.get(LAST), Tensor):
            self.last[span] = entry[LAST].reshape(-1)
        numbers = {key: state.pop(key) for key in self.rule.per_tensor}
        numbers |= {
            key: torch.as_tensor(entry[key]).reshape(()).to(fresh) if loaded else fresh[0]
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
        flat = self.state if self.last is None else {**self.state, LAST: self.last}
        for key, value in flat.items():
            member.views[key] = value[member.span].view(shape)
        for key, value in self.carry.items():
            view = value[:, member.span].view(len(value), *shape)
            member.views[key] = view.movedim(0, -1)
        member.state.update(member.views)
        member.held = tuple(member.state.values())

    def note(self, measures: Mapping[str, float | Tensor]) -> None:
        """Let every member's state say what the whole optimizee measures: numbers, or (1,) tensors
        where they are not to be waited for."""
        for key, value in self.measures.items():
            one = measures[key]
            if isinstance(one, Tensor):
                value.copy_(one.expand_as(value))
            else:
                value.fill_(one)

    def _written(self) -> list[int]:
        """How often the numbers that are known here too have been written to."""
        return [value._version for value in self._numbers]

    def settle(self) -> None:
        """Note that all that was written so far is known here."""
        self._known = self._written()

    def look(self, state: Any) -> bool:
        """Take the members' gradients, unless the bucket must be made anew: where `optimizer.state`
        no longer holds its views (loading replaces them) or its numbers were written to, or a
        parameter was moved or cast.

        Raises:
            RuntimeError: a parameter of another size than its state, or a gradient that does not
                fit its parameter.
        """
        self._grads = grads = []
        for member in self.members:
            param, entry = member.param, state.get(member.param)
            if entry is not member.state:
                return False
            same = len(entry) == len(member.held) and all(map(is_, entry.values(), member.held))
            if not same and not member.holds_views():
                return False
            grad = param.grad
            if grad is not None:
                if param.dtype is not member.dtype or param.device != self.device:
                    return False
                require_gradient(param, grad)
                if param.shape != member.shape:
                    raise RuntimeError(
                        f"LearnedOptimizer: a parameter has shape {tuple(param.shape)}, its state "
                        f"was made for {tuple(member.shape)}; delete optimizer.state[parameter] to "
                        "start it afresh"
                    )
            grads.append(grad)
        return self._known == self._written()

    def release(self, kept: set[int]) -> None:
        """Give the entries of all but the parameters with `kept` ids tensors of their own, which
        do not hold on to the bucket's memory."""
        for member in self.members:
            if id(member.param) not in kept:
                for key, view in member.views.items():
                    if member.state.get(key) is view:
                        member.state[key] = view.clone()

    def runs(self) -> Iterator[tuple[list[Member], list[Tensor]]]:
        """Neighbouring members with a gradient and the same number of steps, and the gradients
        that `look` took, once.

        A rule that couples coordinates sees every tensor alone.
        """
        run: list[Member] = []
        taken: list[Tensor] = []
        grads, self._grads = self._grads, []
        alone = self.rule.coupling != "none"
        for member, grad in zip(self.members, grads, strict=True):
            if run and (grad is None or alone or run[-1].steps != member.steps):
                yield run, taken
                run, taken = [], []
            if grad is not None:
                run.append(member)
                taken.append(grad)
        if run:
            yield run, taken
        for member in self._again:
            grad = grads[member.index]
            if grad is not None:
                yield [member], [grad]

    @torch.no_grad()
    def step(self, run: list[Member], weights: Weights, backend: str, grad_n: Tensor) -> Tensor:
        """Advance a run by one gradient; returns the step (n,), not yet applied.

        Args:
            run: from `runs`.
            weights: the rule's, the same at every call.
            backend: that makes the step.
            grad_n: the members' gradients, flat and joined, in the statistics' dtype.
        """
        rule, span = self.rule, slice(run[0].span.start, run[-1].span.stop)
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

    def move(self, run: list[Member], moved_n: Tensor) -> None:
        """Move the parameters of a run by (n,)."""
        params = [member.param for member in run]
        parts = [
            part.view(param.shape).to(param.dtype)
            for param, part in zip(params, moved_n.split([p.numel() for p in params]), strict=True)
        ]
        torch._foreach_add_(params, parts)  # pyright: ignore[reportPrivateImportUsage]


def require_gradient(param: Tensor, grad: Tensor) -> None:
    """Check that a parameter can be moved by a gradient.

    Raises:
        RuntimeError: a sparse one, or one of another shape or device.
    """
    if grad.layout is not torch.strided:
        raise RuntimeError(
            "LearnedOptimizer does not support sparse gradients; use Embedding(sparse=False), or "
            "torch.optim.SparseAdam for these parameters"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"LearnedOptimizer: a gradient has shape {tuple(grad.shape)} on {grad.device}, its "
            f"parameter has {tuple(param.shape)} on {param.device}; call zero_grad() after setting "
            "a parameter's data, then backward()"
        )
