"""What an optimizer loads, after its users' own hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def seen_after_hooks(
    optimizer: torch.optim.Optimizer, check: Callable[[dict[str, Any]], None]
) -> Iterator[list[dict[str, Any]]]:
    """Around `torch.optim.Optimizer.load_state_dict`: look at what it loads.

    Args:
        optimizer: that loads.
        check: called with the dictionary that the hooks have made, before anything has changed;
            what it raises ends the loading.

    Yields:
        A list, which that dictionary is put into.
    """
    seen: list[dict[str, Any]] = []

    def look(optimizer: torch.optim.Optimizer, loading: dict[str, Any]) -> None:
        check(loading)
        seen.append(loading)

    # Registered last, it comes after the hooks there are.
    handle = optimizer.register_load_state_dict_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
