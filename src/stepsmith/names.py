"""Looking things up by name, with an answer that helps where the name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """A one-line ValueError that lists the known names and the nearest one.

    Args:
        kind: what was looked for, such as `"task"`.
        name: what was asked for.
        known: the names there are.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"unknown {kind} {name!r}; known: {', '.join(names)}.{hint}")
