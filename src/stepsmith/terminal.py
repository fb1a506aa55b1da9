"""What commands share on a terminal: telling what is being done, ending where they are stopped."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from stepsmith.names import shown

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
            yield lambda message: status.update(Text(shown(message)))
    else:
        yield lambda message: console.print(
            time.strftime("%H:%M:%S"), shown(message), markup=False, emoji=False, soft_wrap=True
        )


class Terminal(Console):
    """A console on which a text is a line that says what the text says: no markup, no codes of
    emoji, no control characters, whoever chose the names in it. Styles are given beside it, or by
    `rich.text.Text`."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """As rich's, of the text as it is shown."""
        return super().render_str(shown(text), **options)

    def status(self, status: Any, **options: Any) -> Status:
        """As rich's, of the text as it is shown."""
        return super().status(Text(shown(status)) if isinstance(status, str) else status, **options)


class OneLine(logging.Formatter):
    """Messages of a log, each on a line of its own and with nothing in it that a terminal obeys."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """As logging's, of the text as it is shown."""
        return shown(super().formatMessage(record))
