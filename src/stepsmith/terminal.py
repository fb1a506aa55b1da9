"""What commands share on a terminal: telling what is being done, ending where they are stopped."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

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


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str], None]]:
    """Yields what tells the user what is being done: on a terminal one line that changes, in a log
    a line for each message, with the time of day."""
    if console.is_terminal:
        with console.status("...") as status:
            yield lambda message: status.update(escape(message))
    else:
        yield lambda message: console.print(
            time.strftime("%H:%M:%S"), message, markup=False, emoji=False, soft_wrap=True
        )
