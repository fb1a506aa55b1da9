"""Commands that are interrupted end as those that fail do: by one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

INTERRUPTED = "interrupted; what was saved before is intact"


class Interrupted(RuntimeError):
    """A command was interrupted by a signal."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an interruption into an ordinary error: typer would end with exit code 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or INTERRUPTED) from None

    return run
