"""What the optimizers here share: saving and loading within their users' hooks, steps under
`torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def within_hooks(
    optimizer: torch.optim.Optimizer,
    kind: str,
    before: Callable[..., Any],
    after: Callable[..., Any],
) -> Iterator[None]:
    """Around a method of `torch.optim.Optimizer`: do something right before and right after what it
    does itself, so that the hooks that users have registered see the whole.

    Args:
        optimizer: the optimizer.
        kind: the method, `"state_dict"` or `"load_state_dict"`.
        before: a pre-hook, called after those there are; what it raises ends the call.
        after: a post-hook, called before those there are.
    """
    handles = [
        getattr(optimizer, f"register_{kind}_pre_hook")(before),
        getattr(optimizer, f"register_{kind}_post_hook")(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_groups(owner: str, state_dict: Any, keys: tuple[str, ...]) -> None:
    """Check that what is to be loaded looks like an optimizer's state.

    Raises:
        ValueError: a key is missing, its groups are not dictionaries with parameters, or its state
            is no dictionary.
    """
    missing = [key for key in (*keys, "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"{owner}: the state lacks {', '.join(map(repr, missing))}; load one that a {owner} "
            "saved with state_dict()"
        )
    groups = state_dict["param_groups"]
    if "state" in keys and not isinstance(state_dict["state"], dict):
        raise ValueError(
            f"{owner}: 'state' of the state should be a dictionary, is a "
            f"{type(state_dict['state']).__name__}; load one that a {owner} saved with state_dict()"
        )
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise ValueError(
            f"{owner}: 'param_groups' of the state should be a list of dictionaries with 'params'; "
            f"load one that a {owner} saved with state_dict()"
        )


def keep_uncompiled(kind: type[torch.optim.Optimizer]) -> None:
    """Have `torch.compile` leave an optimizer's steps as they are, hooks and all: compiled kernels
    are handed addresses, and state is made at the first step.

    Called when an optimizer is made: by then torch has loaded its compiler, which takes seconds.
    """
    if not getattr(kind.step, "_torchdynamo_disable", False):
        setattr(kind, "step", torch.compiler.disable(kind.step))  # noqa: B010
