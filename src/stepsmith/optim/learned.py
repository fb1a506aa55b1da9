"""A learned rule as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from numbers import Real
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.hub import TrainedRule, as_trained
from stepsmith.optim.buckets import Bucket, require_gradient
from stepsmith.optim.entries import EntryForm
from stepsmith.optim.loading import keep_uncompiled, require_groups, within_hooks
from stepsmith.optim.trusted import OPTIONS, Part, make, require_held, taken_back
from stepsmith.rules.base import Rule, require_choice, statistics_dtype
from stepsmith.rules.trust import Trust, usual_trust
from stepsmith.rules.units import norms

FAR = 10
"""A rule run beyond this many times its horizon says so."""

_OPTIONS = ("lr", "weight_decay", "maximize", "rule", *OPTIONS)
"""Of a parameter group."""


class LearnedOptimizer(torch.optim.Optimizer):
    """Train any model by a learned rule, as by any `torch.optim` optimizer.

    Each parameter moves by `lr` times the rule's step, after decoupled weight decay:
    theta <- (1 - lr * weight_decay) theta + lr * step.

    Args:
        params: parameters or parameter groups; groups may have their own `lr` and `weight_decay`.
        rule: a `TrainedRule`, the name of a bundled one (`"mlp-mnist"`), the path of a saved one,
            or a rule without weights.
        lr: factor on the rule's steps, no unit; the rule was meta-trained at 1.
        weight_decay: decoupled shrinkage, per step and unit of `lr`.
        maximize: ascend.
        nonfinite: what to do where a gradient is nan or infinite: `"skip"` the whole step (counted
            in `skipped_steps`, said once), `"refuse"` it with an error before anything has
            changed, or `"ignore"` it, which saves the check.
        backend: how the network runs, one of `stepsmith.kernels.BACKENDS`; `"auto"` takes the
            fastest there is for each dtype and device.
        carry_dtype: of the recurrent state between steps; `torch.bfloat16` halves its memory. On
            a CPU it costs time, and a float32 copy during the step. What it costs in loss:
            `docs/5-speed.md`.
        trust: how far the rule's steps are trusted (`stepsmith.rules.trust`): `True` (as the rule's
            manifest says), `False` (steps are made as they are), or a `Trust` of your own. By
            default those in relative units are, and bundled ones, except with
            `nonfinite="ignore"`: trust looks at numbers at every step. Costs the memory of one
            more number a parameter. Steps that were taken back are counted in `rejected_steps`.

    Raises:
        ValueError: negative or non-finite lr or weight_decay, tensors of them with several
            elements, complex parameters, unknown choices, no parameters.
        TypeError: lr or weight_decay that are no numbers.
        CheckpointError: a rule that cannot be loaded.

    `state[p]` holds plain tensors: statistics in the parameter's shape, the recurrent state in that
    shape with the units last. Statistics are float32, or float64 where the parameter is. State goes
    with its parameter: groups may be changed, split, merged and reordered between steps. A
    parameter without an entry in `state` starts afresh; what is written into an entry counts.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = LearnedOptimizer(model.parameters(), "mlp-mnist")
    >>> loss = model(torch.ones(8, 3)).square().mean()
    >>> loss.backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule | TrainedRule | str | Path,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        nonfinite: str = "skip",
        backend: str = "auto",
        carry_dtype: torch.dtype | None = None,
        trust: bool | Trust | None = None,
    ):
        require_choice("LearnedOptimizer", "nonfinite", nonfinite, ("skip", "refuse", "ignore"))
        self.trained = as_trained(rule)
        kernels.require_form(self.trained.rule, backend)
        kernels.require_carry(self.trained.rule, carry_dtype)
        self.backend = backend
        self.carry_dtype = carry_dtype
        self.nonfinite = nonfinite
        self.skipped_steps = self.rejected_steps = 0
        self._clipped = 1.0
        if trust is None and nonfinite != "ignore":
            trust = usual_trust(self.trained.rule, self.trained.manifest)
        elif trust is True:
            trust = usual_trust(self.trained.rule, self.trained.manifest) or Trust()
        self.trust = trust or None
        if self.trust is not None and not isinstance(self.trust, Trust):
            raise TypeError(
                "LearnedOptimizer: trust must be True, False, None or a "
                f"stepsmith.rules.trust.Trust, got {trust!r}"
            )
        self._warned: set[str] = set()
        self._forget()
        # Travels with every saved state; a number, since sharded checkpoints take no strings.
        self._mark = _mark(self.trained)
        own = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "rule": self._mark}
        own |= OPTIONS
        super().__init__(params, own)
        keep_uncompiled(type(self))

    def _forget(self) -> None:
        """Drop everything derived from `state`."""
        self._held: list[tuple[Tensor, ...]] = []  # each group's parameters
        self._buckets: list[list[Bucket]] = []
        self._waiting: list[list[Tensor]] = []  # parameters without a bucket
        self._measures: dict[str, Any] = {}

    @cached_property
    def _form(self) -> EntryForm:
        return EntryForm(self.trained.rule)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer keeps only defaults, state and groups when it is copied or pickled.
        kept = (
            "trained", "backend", "carry_dtype", "nonfinite", "skipped_steps", "rejected_steps",
            "trust", "_clipped", "_warned", "_mark",
        )  # fmt: skip
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One may have been pickled before there was trust; loading a state gives no attributes.
        usual = {"trust": None, "rejected_steps": 0, "_clipped": 1.0, "defaults": {}}
        state = {**usual, **self.__dict__, **state}
        state["defaults"] = {**OPTIONS, **state["defaults"]}
        self.trust = state["trust"]
        self._forget()
        super().__setstate__(state)
        keep_uncompiled(type(self))
        # A state may be from before there was one of these options.
        for group in self.param_groups:
            for key in _OPTIONS:
                group.setdefault(key, self.defaults[key])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own lr and weight decay if wanted.

        Raises:
            ValueError: a negative or non-finite lr or weight_decay, a tensor of them with several
                elements, or complex or distributed parameters.
            TypeError: lr or weight_decay that are no numbers, or a group that is no dictionary.
        """
        if isinstance(param_group, dict):  # where not, Optimizer.add_param_group says so
            _require_options({**self.defaults, **param_group})
            if self.param_groups:  # trust is of all groups together
                first = self.param_groups[0]
                param_group.update({key: first[key] for key in OPTIONS if key in first})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            refused = _refused(param)
            if refused:
                self.param_groups.pop()
                raise ValueError(f"LearnedOptimizer: {refused}")

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters of the groups, and the options of these.

        Returns:
            As `torch.optim.Optimizer.state_dict`; the state's tensors are copies, contiguous and
            without shared memory, so that any of them may be saved by itself.
        """
        kept: list[Any] = []

        def copied(_: Any) -> None:
            # Optimizer.state_dict knows no number for a parameter that has left the groups.
            members = {id(param) for group in self.param_groups for param in group["params"]}
            kept.append(self.state)
            self.state = defaultdict(dict)
            for param, entry in kept[0].items():
                if not isinstance(param, Tensor):
                    self.state[param] = entry
                elif id(param) in members:
                    self.state[param] = {
                        key: _own(value) if isinstance(value, Tensor) else value
                        for key, value in entry.items()
                    }

        def restored(*_: Any) -> None:
            self.state = kept.pop()

        try:
            with within_hooks(self, "state_dict", copied, restored):
                return super().state_dict()
        finally:
            if kept:
                restored()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, every tensor in the dtype it was saved in, on its parameter's device.

        Options that a group of the state lacks are as they were given to this optimizer.

        Raises:
            ValueError: the state of another rule or of other parameters, options that cannot be, or
                a state with numbers that cannot be: nan, infinity, negative second moments or
                steps. Nothing has changed.
            TypeError: no dictionary, or options that are no numbers.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                "LearnedOptimizer: load_state_dict takes a dictionary from state_dict(), got "
                f"{type(state_dict).__name__}"
            )
        loaded: list[Mapping[str, Any]] = []  # in the order of the groups' parameters

        def checked(_: Any, loading: dict[str, Any]) -> dict[str, Any]:
            require_groups("LearnedOptimizer", loading, ("state",))
            state = {
                key: {name: _tensor(value) for name, value in entry.items()}
                if isinstance(entry, dict)
                else entry
                for key, entry in loading["state"].items()
            }
            loading = {**loading, "state": state}
            self._require_fit(loading)
            ids = [key for group in loading["param_groups"] for key in group["params"]]
            loaded.extend(state.get(key, {}) for key in ids)
            return loading

        def settled(_: Any) -> None:
            # Optimizer.load_state_dict casts state to the parameter's dtype, which would round
            # float32 statistics of a bfloat16 parameter.
            params = [param for group in self.param_groups for param in group["params"]]
            for entry, param in zip(loaded, params, strict=True):
                for name, value in entry.items():
                    if isinstance(value, Tensor):
                        value = value.detach().to(param.device, copy=True)
                    self.state[param][name] = value
            self._forget()

        with within_hooks(self, "load_state_dict", checked, settled):
            super().load_state_dict(state_dict)

    def _require_fit(self, loading: dict[str, Any]) -> None:
        for group in loading["param_groups"]:
            _require_options({**self.defaults, **group})
            require_held(group)
        saved_ids = [key for group in loading["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        # Where the groups differ in size, Optimizer.load_state_dict says so.
        for key, param in zip(saved_ids, params, strict=False):
            entry = loading["state"].get(key, {})
            if entry == {}:
                continue
            known = isinstance(entry, dict)
            misfit = self._form.misfit(entry, param.shape) if known else "is no dictionary"
            if misfit:
                raise ValueError(
                    f"LearnedOptimizer: state of parameter {key}: {misfit}, for rule "
                    f"{self.trained.name!r}; load a state into the rule and the parameters it was "
                    "saved with"
                )
            unsound = self._form.unsound(entry)
            if unsound:
                raise ValueError(
                    f"LearnedOptimizer: state of parameter {key}: {unsound}; the state is damaged, "
                    "load another"
                )
        if any(group.get("rule", self._mark) != self._mark for group in loading["param_groups"]):
            raise ValueError(
                f"LearnedOptimizer: the state was saved with another rule than "
                f"{self.trained.name!r} as it is here (its weights or its configuration differ); "
                "load it with the rule it belongs to, or start afresh"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: sparse gradients, a parameter of another size than its state, or a state
                that does not fit the rule; nothing has changed.
            ValueError: a parameter that is in several groups.
            FloatingPointError: a non-finite gradient where `nonfinite="refuse"`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._sync_buckets()
        except BaseException:
            self._forget()  # half of it may be done; `state` has everything
            raise
        parts: list[Part] = []
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            for bucket in buckets:
                for run, grads in bucket.runs():
                    # Joined first: fewer operations on small tensors.
                    flat = [grad.reshape(-1) for grad in grads]
                    grad_n = flat[0] if len(flat) == 1 else torch.cat(flat)
                    grad_n = grad_n.detach().to(bucket.dtype)
                    grad_n = grad_n.neg() if group["maximize"] else grad_n
                    parts.append(Part(group, bucket, run, grad_n))
        clipped, self._clipped = self._clipped, 1.0
        if self.nonfinite != "ignore" and not all(_all_finite(part.grad_n) for part in parts):
            self._meet_nonfinite()
            return loss
        buckets = [bucket for group in self._buckets for bucket in group]
        if (
            self.trust is not None
            and parts
            and taken_back(self.trust, parts, self.param_groups, buckets, clipped)
        ):
            self.rejected_steps += 1
        elif parts:
            self._advance(parts, buckets, clipped)
        for bucket in buckets:
            bucket.settle()
        return loss

    def _advance(self, parts: list[Part], buckets: list[Bucket], clipped: float) -> None:
        """Make a step."""
        # Of all parameters: some may have been added since.
        fresh = not any(part.run[0].steps for part in parts)
        fresh = fresh and not any(m.steps for bucket in buckets for m in bucket.members)
        measured = self._measure(parts, buckets, clipped)
        for part in parts:
            grad_n = part.grad_n
            if measured is not None:
                grad_n = _times(grad_n, measured[0])
            part.delta_n = part.bucket.step(part.run, self.trained.weights, self.backend, grad_n)
            self._check_horizon(part.run[0].steps)
        if self.trust is not None:
            _, gain, lag = measured or (1.0, 1.0, 1.0)
            make(
                self.trust, parts, self.param_groups, buckets, gain=gain, lag=lag, fresh=fresh,
                clipped=clipped,
            )  # fmt: skip
            return
        for group in self.param_groups:
            group["trust_predicted"] = 0.0  # no step that is known is the last one
        for part in parts:
            assert part.delta_n is not None
            delta_n = part.delta_n * float(part.group["lr"])
            if measured is not None:
                delta_n = _times(delta_n, measured[1])
            part.decay()
            part.bucket.move(part.run, delta_n)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; what was clipped is forgotten too."""
        self._clipped = 1.0
        super().zero_grad(set_to_none)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients' norm as `torch.nn.utils.clip_grad_norm_` does, and let the rule know.

        A rule measures its steps by its gradients: clipped by another function they look like
        those of a smaller loss, and the steps become bolder. Clipped here they do not.

        Args:
            max_norm: largest norm of all gradients together.
            norm_type: which norm.

        Returns:
            The norm before clipping, ().
        """
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        ratio = float(norm) / max_norm if max_norm > 0 else 1.0
        self._clipped *= max(1.0, ratio) if math.isfinite(ratio) else 1.0
        return norm

    def _measure(
        self, parts: list[Part], buckets: list[Bucket], clipped: float
    ) -> tuple[Any, Any, float] | None:
        """The units' factors on all gradients and all steps, and by how much larger gradients are
        on average; None without units. Without trust nothing is waited for: (1,) tensors, and no
        average."""
        units = self.trained.rule.units
        if units is None:
            return None
        if not self._measures:
            # Parameters added later have measured nothing; the longest memory is the optimizee's.
            eldest = max(buckets, key=lambda bucket: float(bucket.measures["measured"].max()))
            place = int(eldest.measures["measured"].argmax())
            kept = {key: value[place, None].clone() for key, value in eldest.measures.items()}
            self._measures = kept if self.trust is None else {k: float(v) for k, v in kept.items()}
        known: dict[str, Any] = self._measures
        size = sum(len(part.grad_n) for part in parts)
        each = [norms(part.grad_n[None]) for part in parts]
        if self.trust is None:
            like = known["running_norm"]
            norm = torch.stack([one.to(like) for one in each]).sum(0)
            seen, gain, new = units.measure(norm, size, known, clipped)
            # In place: a captured CUDA graph reads them again.
            for key, value in known.items():
                value.copy_(new[key])
            lag = 1.0
        else:
            norm = sum(map(float, each))
            seen, gain, new = units.measure_one(norm, size, known, clipped)
            # As they are saved, so that a resumed run goes on with the same numbers.
            single = all(bucket.dtype is torch.float32 for bucket in buckets)
            known.update({k: _single(v) for k, v in new.items()} if single else new)
            lag = units.lag(norm * clipped, known["running_norm"], known["measured"])
        for bucket in buckets:
            bucket.note(known)
        return seen, gain, lag

    def _sync_buckets(self) -> None:
        """Make the buckets follow the groups and `state`, and take the gradients.

        A bucket holds parameters of a group that have a gradient or a state. Where something has
        changed it is made anew, from what `state` says.
        """
        held = [tuple(group["params"]) for group in self.param_groups]
        dropped: list[Bucket] = []
        changed: set[int] = set()
        if len(held) != len(self._held) or not all(map(_same, held, self._held)):
            dropped, changed = self._regroup(held)
        for index, buckets in enumerate(self._buckets):
            kept = [bucket for bucket in buckets if bucket.look(self.state)]
            if len(kept) < len(buckets):
                dropped += [bucket for bucket in buckets if bucket not in kept]
                changed.add(index)
                self._buckets[index] = kept
            if index in changed:
                known = {id(member.param) for bucket in kept for member in bucket.members}
                self._waiting[index] = [p for p in held[index] if id(p) not in known]
            if self._waiting[index]:
                self._admit(index, index in changed)
        if dropped:
            # Not kept: the measures are those of the parameters that are there.
            self._measures = {}
            members = {id(m.param) for group in self._buckets for b in group for m in b.members}
            for bucket in dropped:
                bucket.release(members)
        # Numbers made in inference mode cannot be written to outside of it.
        elif any(isinstance(v, Tensor) and v.is_inference() for v in self._measures.values()):
            self._measures = {}

    def _regroup(self, held: list[tuple[Tensor, ...]]) -> tuple[list[Bucket], set[int]]:
        """Give every group the buckets of exactly its parameters; returns those that are left, and
        the groups that have none."""
        owners: dict[int, int] = {}
        for index, params in enumerate(held):
            for param in params:
                if owners.setdefault(id(param), index) != index:
                    raise ValueError(
                        f"LearnedOptimizer: a parameter of shape {tuple(param.shape)} is in groups "
                        f"{owners[id(param)]} and {index}; a parameter has one group"
                    )
                refused = _refused(param)
                if refused:
                    raise ValueError(f"LearnedOptimizer: {refused}")
        were = {
            tuple(map(id, params)): (buckets, waiting)
            for params, buckets, waiting in zip(
                self._held, self._buckets, self._waiting, strict=True
            )
        }
        found = [were.pop(tuple(map(id, params)), None) for params in held]
        self._held = held
        self._buckets = [[] if one is None else one[0] for one in found]
        self._waiting = [[] if one is None else one[1] for one in found]
        left = [bucket for buckets, _ in were.values() for bucket in buckets]
        return left, {index for index, one in enumerate(found) if one is None}

    def _admit(self, index: int, adopt: bool) -> None:
        """Make buckets for a group's parameters that have none and have a gradient; with `adopt`
        for those that have a state, too."""
        fresh: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in self._waiting[index]:
            grad = param.grad
            if grad is None and not adopt:
                continue
            if grad is not None:
                require_gradient(param, grad)
            entry = self.state.get(param) or {}
            known = any(name in entry for name in self._form.names)
            misfit = self._form.misfit(entry, param.shape) if known else ""
            if grad is None and (misfit or not known):
                continue
            if misfit:
                raise RuntimeError(
                    f"LearnedOptimizer: a parameter has shape {tuple(param.shape)}, and its state "
                    f"does not fit: {misfit}; put back what was there, or delete "
                    "optimizer.state[parameter] to start it afresh"
                )
            if param.numel():
                key = (param.device, statistics_dtype(param.dtype))
                fresh.setdefault(key, []).append(param)
        if not fresh:
            return
        made: set[int] = set()
        for params in fresh.values():
            entries = [self.state.setdefault(param, {}) for param in params]
            bucket = Bucket(
                self.trained.rule, params, entries, self.carry_dtype, self.trust is not None
            )
            bucket.look(self.state)
            self._buckets[index].append(bucket)
            made |= set(map(id, params))
        self._waiting[index] = [p for p in self._waiting[index] if id(p) not in made]

    def _meet_nonfinite(self) -> None:
        if self.nonfinite == "refuse":
            raise FloatingPointError(
                "LearnedOptimizer: a gradient is nan or infinite; the step was refused and nothing "
                "changed. Look for what made it (data, a loss that overflows), or pass "
                "nonfinite='skip'."
            )
        self.skipped_steps += 1
        self._say_once(
            "nonfinite",
            "LearnedOptimizer: a gradient is nan or infinite; the whole step is skipped. Further "
            "ones are counted in skipped_steps, not announced.",
        )

    def _check_horizon(self, steps: int) -> None:
        horizon = self.trained.horizon
        if horizon is not None and steps > FAR * horizon:
            self._say_once(
                "horizon",
                f"LearnedOptimizer: {steps} steps, and rule {self.trained.name!r} was meta-trained "
                f"for {horizon}; so far past its horizon it may stall or diverge. Meta-train for a "
                "longer horizon, or lower lr by a schedule.",
            )

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def _same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    return len(one) == len(two) and all(map(is_, one, two))


def _times(value_n: Tensor, factor: float | Tensor) -> Tensor:
    return value_n * (factor.to(value_n) if isinstance(factor, Tensor) else factor)


def _single(value: float) -> float:
    """The nearest number of float32."""
    return ctypes.c_float(value).value


def _own(value: Tensor) -> Tensor:
    """A contiguous copy."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _tensor(value: Any) -> Any:
    """Numbers of Python or numpy as a tensor: a count of steps may have been saved as one."""
    numbers = isinstance(value, Real) or hasattr(value, "__array__")
    return torch.as_tensor(value) if numbers and not isinstance(value, Tensor) else value


def _require_options(options: Mapping[str, Any]) -> None:
    for key in ("lr", "weight_decay"):
        value = options[key]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"LearnedOptimizer: Tensor {key} must be 1-element, has shape "
                    f"{tuple(value.shape)}; give groups of their own to parameters that differ"
                )
            number = value.detach().item()
        else:  # numpy's, too
            number = value.item() if hasattr(value, "__array__") else value
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(
                f"LearnedOptimizer: {key} must be a number or a tensor of one, got {value!r}"
            )
        if not 0 <= float(number) < math.inf:
            raise ValueError(f"LearnedOptimizer: {key} must be finite and >= 0, got {value!r}")


def _refused(param: Tensor) -> str:
    """Why a parameter cannot be optimised; empty where it can."""
    if param.is_complex():
        return (
            "complex parameters are not supported; optimise torch.view_as_real(parameter) instead"
        )
    if hasattr(param, "device_mesh"):  # DTensor's home differs between versions of torch
        return (
            "distributed tensors (fully_shard, tensor parallelism) are not supported; shard with "
            "FullyShardedDataParallel(use_orig_params=True), or train replicas"
        )
    return ""


def _mark(trained: TrainedRule) -> int:
    """A number for a rule: its class, its configuration and its weights."""
    told = [type(trained.rule).__qualname__, trained.rule.config(), trained.fingerprint]
    text = json.dumps(told, sort_keys=True, default=repr)
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def _all_finite(value: Tensor) -> bool:
    # One nan or infinity spoils the sum, which takes a tenth of the time; where it only overflowed,
    # look again.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
