"""Any optimizer or learned rule on a few coefficients of a big model.

Shape letters: D = directions, N = numbers of all tensors, X = any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stepsmith import store
from stepsmith.optim.loading import keep_uncompiled, require_groups, within_hooks
from stepsmith.rules.base import require_choice
from stepsmith.subspace import Subspace, products
from stepsmith.subspace.layout import NamedParams, members

MakeInner = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

_OWN = ("coefficients", "inner", "optimizer")
SAMPLED = 2**13
"""Columns of a basis by which it is told from others."""


class SubspaceOptimizer(torch.optim.Optimizer):
    """Train a model within a subspace: theta = origin + P^T c, and `inner` moves c.

    Every step projects the parameters' gradients (P g), lets `inner` move c, and sets the
    parameters anew from c: one pass over P each, and rounding does not add up. Whatever else has
    written to the parameters is overwritten at the next step. Buffers, such as batch-norm's
    statistics, are left alone; rate, momentum, weight decay and so on are `inner`'s and act on c.

    Args:
        model: the model, or its parameters by name (`model.named_parameters()`). Every parameter
            that requires a gradient must be in the subspace; frozen ones need not, and stay.
        subspace: the basis and its start; moved to the model's device.
        inner: called with `[c]`, c a parameter of d zeros; returns any `torch.optim` optimizer or
            `LearnedOptimizer` of it, such as `functools.partial(torch.optim.SGD, lr=1.0)`.
        start: `"origin"` sets the model to the subspace's origin; `"model"` takes the model's
            present weights for the origin, a fresh start in a basis of another.

    Attributes:
        coefficients: c, (d,), float32, or float64 where a parameter is.
        inner: the optimizer of c.
        subspace: the basis.

    Raises:
        ValueError: a model the subspace does not fit (names the first tensor that differs), on
            several devices, an unknown start, an `inner` that is not of c alone, or a start that is
            not finite.
        TypeError: parameters without names, no `Subspace`, or an `inner` that returns no optimizer.

    `param_groups` holds the model's parameters, so that `zero_grad`, gradient clipping and
    `GradScaler` see them, with `inner`'s options: set rates and schedulers on this optimizer, and
    every step hands them to `inner` first.

    >>> from functools import partial
    >>> from stepsmith.subspace import random
    >>> model = torch.nn.Linear(30, 1)
    >>> optimizer = SubspaceOptimizer(model, random(model, 4), partial(torch.optim.SGD, lr=1.0))
    >>> loss = model(torch.ones(8, 30)).square().mean()
    >>> loss.backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: NamedParams,
        subspace: Subspace,
        inner: MakeInner,
        *,
        start: str = "origin",
    ):
        require_choice("SubspaceOptimizer", "start", start, ("origin", "model"))
        if not isinstance(subspace, Subspace):
            raise TypeError(
                f"SubspaceOptimizer: subspace must be a Subspace, got {type(subspace).__name__}; "
                "Subspace.load reads one from a file"
            )
        if not callable(inner):
            raise TypeError(_no_inner("be called with the coefficients and return", inner))
        params = members(subspace.layout, model)
        devices = {param.device for param in params}
        if len(devices) > 1:
            raise ValueError(
                f"SubspaceOptimizer: the parameters are on several devices ({devices}); a basis is "
                "on one"
            )
        self.subspace = subspace.to(params[0].device)
        self.coefficients = torch.nn.Parameter(
            torch.zeros(subspace.dim, dtype=subspace.dtype, device=params[0].device)
        )
        self.inner = inner([self.coefficients])
        _require_inner(self.inner, self.coefficients)
        own = self.subspace.layout.names
        self._origin = (
            None
            if start == "origin"
            else self.subspace.layout.flatten(dict(zip(own, params, strict=True)))
        )
        if not bool(self.origin.isfinite().all()):
            raise ValueError(
                f"SubspaceOptimizer: the {start}'s weights are not finite; start from ones that are"
            )
        self._closed = False
        super().__init__(params, dict(self.inner.defaults))
        self._closed = True
        self._members = tuple(params)
        keep_uncompiled(type(self))
        self._claim_state()
        self._hand_back()
        self._place()

    def _claim_state(self) -> None:
        # Torch's distributed checkpoints step an optimizer that has no state, to give it some.
        self.state[self.param_groups[0]["params"][0]] = {"coefficients": self.coefficients}

    @property
    def origin(self) -> Tensor:
        """(N,) the start, all tensors joined."""
        return self.subspace.origin if self._origin is None else self._origin

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer keeps only defaults, state and groups when it is copied or pickled.
        kept = ("subspace", "coefficients", "inner", "_origin", "_closed", "_handed", "_members")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_uncompiled(type(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: the basis says which parameters it moves.

        Raises:
            ValueError: always, then.
        """
        if self._closed:
            raise ValueError(
                "SubspaceOptimizer: parameters cannot be added, the subspace is of those it was "
                "made with; make a subspace with all of them"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: re-evaluates the model with gradients and returns the loss. `inner` calls it,
                as often as it likes (`torch.optim.LBFGS` does), and finds the model at its c.

        Returns:
            What `inner` returns: the closure's loss, or None.

        Raises:
            RuntimeError: sparse gradients, a parameter frozen, resized or moved to another device
                since the optimizer was made, other parameters in its groups, or options set on
                `inner` in place of this optimizer.
        """
        self._require_members()
        self._hand_over()
        if closure is None:
            self._project()
            loss = self._step_inner(())
        else:
            loss = self._step_inner((self._within(closure),))
        self._hand_back()
        self._place()
        return loss

    def _require_members(self) -> None:
        groups = self.param_groups
        if len(groups) != 1 or list(map(id, groups[0]["params"])) != list(map(id, self._members)):
            raise RuntimeError(
                "SubspaceOptimizer: its parameter groups hold other parameters than it was made "
                "with, and the basis says which it moves; put them back, or make a subspace of "
                "these and a new optimizer"
            )
        for name, shape, param in zip(
            self.subspace.layout.names, self.subspace.layout.shapes, self._members, strict=True
        ):
            if param.shape != shape:
                raise RuntimeError(
                    f"SubspaceOptimizer: {name!r} has shape {tuple(param.shape)} now, in the "
                    f"subspace it has {shape}; set data of the same shape, or make a subspace of "
                    "the model as it is and a new optimizer"
                )

    def _step_inner(self, args: tuple[Any, ...]) -> Any:
        """Let `inner` make its step, with the hooks registered on it. Hooks for the steps of all
        optimizers run for this one; for `inner`, too, they would run twice a step."""
        inner, kwargs = self.inner, {}
        step = None if "step" in vars(inner) else _without_hooks(type(inner).step)
        if step is None:
            return inner.step(*args)
        args = (inner, *args)
        with torch.profiler.record_function(f"Optimizer.step#{type(inner).__name__}.step"):
            for before in inner._optimizer_step_pre_hooks.values():
                changed = before(inner, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            loss = step(*args, **kwargs)
            for after in inner._optimizer_step_post_hooks.values():
                after(inner, args, kwargs)
        return loss

    def _within(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure as a function of c: sets the model, evaluates, projects."""

        def evaluate() -> Any:
            # The model may have been moved by the caller before the first call, too.
            with torch.no_grad():
                self._place()
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                self._project()
            return loss

        return evaluate

    def _project(self) -> None:
        """Set c's gradient to P g, or to none where no parameter has one."""
        params = self.param_groups[0]["params"]
        self.coefficients.grad = None
        if all(param.grad is None for param in params):
            return
        grads = []
        for name, param in zip(self.subspace.layout.names, params, strict=True):
            grad = param.grad
            if not param.requires_grad:
                raise RuntimeError(
                    f"SubspaceOptimizer: {name!r} was frozen since the optimizer was made, and "
                    "would be moved all the same; unfreeze it, or make a subspace without it and a "
                    "new optimizer"
                )
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(
                    "SubspaceOptimizer does not support sparse gradients; use "
                    "Embedding(sparse=False)"
                )
            if grad is not None and grad.shape != param.shape:
                raise RuntimeError(
                    f"SubspaceOptimizer: the gradient of {name!r} has shape {tuple(grad.shape)}, "
                    f"the parameter has {tuple(param.shape)}; call zero_grad() after setting its "
                    "data, then backward()"
                )
            if param.device != self.subspace.device:
                raise RuntimeError(
                    f"SubspaceOptimizer: {name!r} was moved to {param.device}, the basis is on "
                    f"{self.subspace.device}; move the model first, then make the optimizer"
                )
            # A parameter that this loss does not reach has gradient zero: its part of the basis
            # moves all the same, by what the others say.
            grad = torch.zeros_like(param) if grad is None else grad.detach()
            grads.append(grad.reshape(-1).to(self.subspace.dtype))
        self.coefficients.grad = products.projected(self.subspace.blocks, torch.cat(grads))

    def _place(self) -> None:
        """Set the parameters to origin + P^T c."""
        theta_N = products.lifted(self.subspace.blocks, self.coefficients.detach())
        theta_N += self.origin
        views = list(self.subspace.layout.views(theta_N).values())
        params = [param.detach() for param in self.param_groups[0]["params"]]
        torch._foreach_copy_(params, views)  # pyright: ignore[reportPrivateImportUsage]

    def _hand_over(self) -> None:
        """Give `inner` the options of this optimizer's group, where schedulers write."""
        for name, value in _options(self.inner).items():
            if _was_set(value, self._handed.get(name)):
                raise RuntimeError(
                    f"SubspaceOptimizer: {name!r} was set to {value!r} on the inner optimizer, "
                    "which takes its options from this one at every step; set it here, and give "
                    "schedulers this optimizer"
                )
        self._handed = _options(self)
        self.inner.param_groups[0].update(self._handed)

    def _hand_back(self) -> None:
        """Take over options that `inner` has written to: some optimizers keep counters there."""
        self._handed = _options(self.inner)
        self.param_groups[0].update(self._handed)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Everything the next steps depend on but the subspace, of which there is only a mark: c,
        the state of `inner`, options; the origin too where it is not the subspace's own."""

        def completed(_: Any, found: dict[str, Any]) -> None:
            found["state"] = {}
            found["coefficients"] = self.coefficients.detach().clone()
            found["inner"] = self.inner.state_dict()
            found["optimizer"] = type(self.inner).__name__
            found["subspace"] = _mark(self.subspace, with_origin=self._origin is None)
            if self._origin is not None:
                found["origin"] = self._origin

        with within_hooks(self, "state_dict", lambda _: None, completed):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and set the model's parameters to what it says.

        Raises:
            ValueError: the state of another optimizer, of another subspace, or of other
                parameters, or coefficients that are not finite; nothing has changed.
        """
        inner = self.inner
        kept = {"state": inner.state, "param_groups": inner.param_groups}
        loaded: list[dict[str, Any]] = []

        def checked(_: Any, loading: dict[str, Any]) -> None:
            self._require_state(loading)
            inner.load_state_dict(loading["inner"])
            loaded.append(loading)

        @torch.no_grad()
        def settled(_: Any) -> None:
            (loading,) = loaded
            self._claim_state()
            self.coefficients.copy_(loading["coefficients"])
            self._origin = None
            if "origin" in loading:
                self._origin = loading["origin"].to(self.subspace.origin, copy=True)
            for name, value in _options(inner).items():  # those the saved group lacks
                self.param_groups[0].setdefault(name, value)
            inner.param_groups[0].update(_options(self))
            self._handed = _options(inner)
            self._place()
            loaded.clear()

        try:
            with within_hooks(self, "load_state_dict", checked, settled):
                super().load_state_dict(state_dict)
        except Exception:
            if loaded:  # inner has its state, this optimizer not
                inner.__setstate__(kept)
            raise

    def _require_state(self, loading: dict[str, Any]) -> None:
        require_groups("SubspaceOptimizer", loading, _OWN)
        name, have = type(self.inner).__name__, loading["optimizer"]
        if have != name:
            raise ValueError(
                f"SubspaceOptimizer: the state was saved with {have} inside, here is {name}; load "
                "it into the optimizer it was saved with"
            )
        wants = {"coefficients": self.coefficients, "origin": self.origin}
        for key in wants.keys() & loading.keys():
            if not isinstance(loading[key], Tensor) or not loading[key].is_floating_point():
                raise ValueError(
                    f"SubspaceOptimizer: {key} of the state should be a tensor of floating-point "
                    f"numbers, is {getattr(loading[key], 'dtype', type(loading[key]).__name__)}"
                )
            want, found = tuple(wants[key].shape), tuple(loading[key].shape)
            if want != found:
                raise ValueError(
                    f"SubspaceOptimizer: {key} should have shape {want}, the state's have {found}; "
                    "load it with the subspace it was saved with"
                )
            if not bool(loading[key].isfinite().all()):
                raise ValueError(
                    f"SubspaceOptimizer: {key} of the state should be finite, holds nan or "
                    "infinity; the state is damaged, load another"
                )
        mark = _mark(self.subspace, with_origin="origin" not in loading)
        if loading.get("subspace", mark) != mark:  # states saved before there was a mark have none
            raise ValueError(
                "SubspaceOptimizer: the state was saved with another subspace of as many "
                "directions, or with this one stored in another dtype: its coefficients mean "
                "nothing here; load it with the subspace it was saved with"
            )
        groups = [len(group["params"]) for group in loading["param_groups"]]
        if groups != [len(self.param_groups[0]["params"])]:
            raise ValueError(
                f"SubspaceOptimizer: the state is of {groups} parameters, the subspace of "
                f"{len(self.param_groups[0]['params'])}"
            )


def _nothing() -> None:
    pass


_HOOKED = torch.optim.Optimizer.profile_hook_step(_nothing).__code__


def _without_hooks(step: Any) -> Callable[..., Any] | None:
    """The step that `torch.optim.Optimizer` has put its calls of hooks around, where it has."""
    while step is not None and getattr(step, "__code__", None) is not _HOOKED:
        step = getattr(step, "__wrapped__", None)
    return None if step is None else step.__wrapped__


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}


def _was_set(value: Any, handed: Any) -> bool:
    """Whether an option is no longer what was handed over."""
    if isinstance(value, Tensor) or isinstance(handed, Tensor):
        return value is not handed
    return isinstance(value, float | int | str | tuple) and handed != value


def _mark(subspace: Subspace, *, with_origin: bool) -> int:
    """A number for a basis, by its tensors' names and some columns of it; with its origin where a
    state relies on that. A number, since sharded checkpoints take no strings."""
    tensors = {f"names {subspace.layout.names}": torch.empty(0)}
    tensors |= {f"basis.{place}": _some(block) for place, block in enumerate(subspace.blocks)}
    if with_origin:
        tensors["origin"] = _some(subspace.origin)
    return int(store.fingerprint(tensors)[:12], 16)


def _some(values_XN: Tensor) -> Tensor:
    return values_XN[..., :: max(1, values_XN.shape[-1] // SAMPLED)]


def _require_inner(inner: Any, coefficients: Tensor) -> None:
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(_no_inner("return", inner))
    groups = [group["params"] for group in inner.param_groups]
    if len(groups) != 1 or len(groups[0]) != 1 or groups[0][0] is not coefficients:
        raise ValueError(
            "SubspaceOptimizer: inner must optimise the coefficients it is given and nothing else; "
            "use its argument as the optimizer's params"
        )


def _no_inner(must: str, got: Any) -> str:
    return (
        f"SubspaceOptimizer: inner must {must} a torch.optim.Optimizer of the parameters it is "
        f"given, got {type(got).__name__}; pass for example "
        "functools.partial(torch.optim.SGD, lr=1.0)"
    )
