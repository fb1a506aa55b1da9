"""A learned rule as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.hub import TrainedRule, as_trained
from stepsmith.optim.buckets import Bucket, Member
from stepsmith.optim.loading import seen_after_hooks
from stepsmith.rules.base import Rule, State, require_choice, statistics_dtype
from stepsmith.rules.units import norms

FAR = 10
"""A rule run beyond this many times its horizon says so."""


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

    Raises:
        ValueError: negative or non-finite lr or weight_decay, complex parameters, unknown choices,
            no parameters.
        CheckpointError: a rule that cannot be loaded.

    `state[p]` holds plain tensors: statistics in the parameter's shape, the recurrent state in that
    shape with the units last. Statistics are float32, or float64 where the parameter is.

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
    ):
        require_choice("LearnedOptimizer", "nonfinite", nonfinite, ("skip", "refuse", "ignore"))
        self.trained = as_trained(rule)
        kernels.require_form(self.trained.rule, backend)
        kernels.require_carry(self.trained.rule, carry_dtype)
        self.backend = backend
        self.carry_dtype = carry_dtype
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self._warned: set[str] = set()
        self._forget()
        # Travels with every saved state; a number, since sharded checkpoints take no strings.
        self._mark = _mark(self.trained)
        own = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "rule": self._mark}
        super().__init__(params, own)

    def _forget(self) -> None:
        """Drop everything derived from `state`."""
        self._buckets: list[list[Bucket]] = []
        self._measures: State = {}

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer keeps only defaults, state and groups when it is copied or pickled.
        kept = (
            "trained", "backend", "carry_dtype", "nonfinite", "skipped_steps", "_warned", "_mark",
        )  # fmt: skip
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own lr and weight decay if wanted.

        Raises:
            ValueError: a negative or non-finite lr or weight_decay, or complex or distributed
                parameters.
        """
        for key in ("lr", "weight_decay"):
            value = param_group.get(key, self.defaults[key])
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"LearnedOptimizer: {key} must be finite and >= 0, got {value!r}")
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            refused = _refused(param)
            if refused:
                self.param_groups.pop()
                raise ValueError(f"LearnedOptimizer: {refused}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, every tensor in the dtype it was saved in, on its parameter's device.

        Raises:
            ValueError: the state of another rule or of other parameters; nothing has changed.
        """
        with seen_after_hooks(self, self._require_fit) as seen:
            super().load_state_dict(state_dict)
        (loaded,) = seen
        for group in self.param_groups:  # states saved before groups told their rule
            group.setdefault("rule", self._mark)
        # Optimizer.load_state_dict casts state to the parameter's dtype, which would round float32
        # statistics of a bfloat16 parameter.
        saved_ids = [key for group in loaded["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved_ids, params, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)
        self._forget()

    def _require_fit(self, loading: dict[str, Any]) -> None:
        rule, one = self.trained.rule, torch.zeros(1)
        units: dict[str, tuple[int, ...]] = dict.fromkeys(rule.init_state(one), ())
        units |= {key: (len(value),) for key, value in rule.init_carry(1).items()}
        whole = rule.per_tensor | set(rule.units.init(1) if rule.units else ())
        units |= dict.fromkeys(whole, ())
        saved_ids = [key for group in loading["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        # Where the groups differ in size, Optimizer.load_state_dict says so.
        for key, param in zip(saved_ids, params, strict=False):
            entry = loading["state"].get(key)
            for name, tail in units.items() if entry else ():
                want = () if name in whole else (*param.shape, *tail)
                have = tuple(entry[name].shape) if name in entry else None
                if have != want:
                    raise ValueError(
                        f"LearnedOptimizer: state {name!r} of parameter {key} should have shape "
                        f"{want} for rule {self.trained.name!r}, has {have}; load a state into the "
                        "rule and the parameters it was saved with"
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
            RuntimeError: sparse gradients.
            FloatingPointError: a non-finite gradient where `nonfinite="refuse"`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sync_buckets()
        work: list[tuple[dict[str, Any], Bucket, list[Member], Tensor]] = []
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            for bucket in buckets:
                active = {id(m.param) for m in bucket.members if m.param.grad is not None}
                for run in bucket.runs(active):
                    work.append((group, bucket, run, self._gradient(bucket, run)))
        if self.nonfinite != "ignore" and not all(_all_finite(g) for *_, g in work):
            self._meet_nonfinite()
            return loss
        factors = self._measure([grad_n for *_, grad_n in work])
        for group, bucket, run, grad_n in work:
            if group["maximize"]:
                grad_n = grad_n.neg()
            if factors is not None:
                grad_n = grad_n * factors[0].to(grad_n)
            delta_n = bucket.step(run, self.trained.weights, self.backend, grad_n)
            if factors is not None:
                delta_n = delta_n * factors[1].to(delta_n)
            self._apply(group, run, delta_n)
            self._check_horizon(run[0].steps)
        return loss

    def _measure(self, grads: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The units' factors on all gradients and all steps, (1,) each; None without units."""
        units = self.trained.rule.units
        if units is None or not grads:
            return None
        buckets = [bucket for group in self._buckets for bucket in group]
        if not self._measures:
            # Parameters added later have measured nothing; the longest memory is the optimizee's.
            eldest = max(buckets, key=lambda bucket: float(bucket.measures["measured"].max()))
            place = int(eldest.measures["measured"].argmax())
            self._measures = {
                key: value[place, None].clone() for key, value in eldest.measures.items()
            }
        like = self._measures["running_norm"]
        norm = torch.stack([norms(grad_n[None]).to(like) for grad_n in grads]).sum(0)
        size = sum(len(grad_n) for grad_n in grads)
        seen, gain, new = units.measure(norm, size, self._measures)
        # In place: a captured CUDA graph reads them again.
        for key, value in self._measures.items():
            value.copy_(new[key])
        for bucket in buckets:
            bucket.note(self._measures)
        return seen, gain

    def _gradient(self, bucket: Bucket, run: list[Member]) -> Tensor:
        grads = []
        for member in run:
            grad = member.param.grad
            assert grad is not None
            grads.append(grad.detach().reshape(-1).to(bucket.dtype))
        return grads[0] if len(grads) == 1 else torch.cat(grads)

    def _apply(self, group: dict[str, Any], run: list[Member], delta_n: Tensor) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        params = [member.param for member in run]
        deltas = [
            part.view(member.param.shape).to(member.param.dtype)
            for member, part in zip(run, delta_n.split([m.param.numel() for m in run]), strict=True)
        ]
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(params, deltas, alpha=lr)  # pyright: ignore[reportPrivateImportUsage]

    def _sync_buckets(self) -> None:
        """Make buckets for new parameters; rebuild those whose state was replaced."""
        del self._buckets[len(self.param_groups) :]
        for index, group in enumerate(self.param_groups):
            if index == len(self._buckets):
                self._buckets.append([])
            kept = [bucket for bucket in self._buckets[index] if bucket.intact(self.state)]
            if len(kept) < len(self._buckets[index]):
                self._measures = {}
            known = {id(member.param) for bucket in kept for member in bucket.members}
            fresh: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        "LearnedOptimizer does not support sparse gradients; use "
                        "Embedding(sparse=False), or torch.optim.SparseAdam for these parameters"
                    )
                if param.numel() == 0 or id(param) in known:
                    continue
                key = (param.device, statistics_dtype(param.dtype))
                fresh.setdefault(key, []).append(param)
            for params in fresh.values():
                entries = [self.state[param] for param in params]
                kept.append(Bucket(self.trained.rule, params, entries, self.carry_dtype))
            self._buckets[index] = kept

    def _meet_nonfinite(self) -> None:
        if self.nonfinite == "refuse":
            raise FloatingPointError(
                "LearnedOptimizer: a gradient is nan or infinite; the step was refused and nothing "
                "changed. Lower lr, clip the gradients, or pass nonfinite='skip'."
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
