"""Names: looking things up by them, and files called after them."""

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


def file_name(name: str) -> str:
    """A name as files may have it: what is neither letter, digit nor one of `-_.@` becomes `-`.

    >>> file_name("adamw, cosine")
    'adamw--cosine'
    """
    return "".join(c if c.isalnum() or c in "-_.@" else "-" for c in name)
