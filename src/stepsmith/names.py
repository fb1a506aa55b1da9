"""Names are data: looking things up by them, showing them, and files called after them."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable

LONGEST = 100
"""Bytes of a name in a file's name: systems take 255, and endings come after it."""

_DEVICES = {"con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10)}
"""Names that Windows keeps for devices, whatever comes after a dot."""


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
    return ValueError(shown(f"unknown {kind} {name!r}; known: {', '.join(names)}.{hint}"))


def shown(text: str, keep: str = "") -> str:
    """A text that may come from anywhere, safe to show: on a terminal, a page, in a figure.

    Control characters, line breaks, marks that turn the direction of writing and other characters
    that cannot be seen become escapes, as in Python; all others stay. What markup the place has of
    its own (HTML, say) is for that place to escape.

    Args:
        text: to show.
        keep: such characters that may stay.

    >>> print(shown(f"learned {chr(27)}[2J"))
    learned \\x1b[2J
    """

    def seen(found: re.Match[str]) -> str:
        c = found[0]
        visible = c.isprintable() or c in keep or unicodedata.category(c) == "Zs"
        return c if visible else c.encode("unicode_escape").decode()

    return re.sub(r"[^ -~]", seen, text)


def file_name(name: str) -> str:
    """A name as files may have it on any system, itself where it can be.

    What is neither letter, digit nor one of `-_.@` becomes `-`, and so does a dot at either end.
    A name that is longer than `LONGEST` bytes ends in a hash instead of its rest.

    >>> file_name("adamw, cosine"), file_name("../up")
    ('adamw--cosine', '-.-up')
    """
    safe = "".join(c if c.isalnum() or c in "-_.@" else "-" for c in name) or "-"
    if safe[0] == ".":
        safe = f"-{safe[1:]}"
    if safe[-1] == ".":
        safe = f"{safe[:-1]}-"
    if safe.partition(".")[0].casefold() in _DEVICES:
        safe = f"-{safe}"
    raw = safe.encode()
    if len(raw) > LONGEST:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        safe = f"{raw[: LONGEST - 9].decode(errors='ignore')}-{digest}"
    return safe
