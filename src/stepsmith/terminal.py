"""What commands share on a terminal: telling what is being done, ending where they are stopped."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.status import Status
from rich.text import Text

from stepsmith.names import shown

NARROW, USUAL = 20, 80
"""Columns: a terminal, or COLUMNS, that says fewer than the first is not believed."""

INTERRUPTED = "interrupted; what was saved before is intact"


STOPS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a process to end: Ctrl-C, a scheduler's, that of a terminal which closes."""


class Interrupt:
    """While open, the first of `STOPS` only sets `asked`, so that what is under way can be finished
    and saved; Ctrl-C after it acts at once. Others after it, which schedulers send in a row, change
    nothing.

    Outside the main thread, where signals cannot be caught, nothing changes. A hang-up that is
    ignored (`nohup`) stays so.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if not hangs_on(number):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def hangs_on(number: int) -> bool:
    """Whether the process was started to outlive this signal (`nohup`)."""
    return number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


class Lasting:
    """A stream of text that may go away while work goes on: a pipe whose reader ends, a terminal
    that is closed, a disk that fills up. What cannot be written is dropped.

    Args:
        stream: the stream, such as `sys.stdout`.

    Attributes:
        lost: why something was dropped, where nobody chose that: not where a reader went.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: OSError | ValueError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's, and a letter its encoding lacks becomes a question mark."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        if isinstance(error, ValueError) and not self._stream.closed:
            raise error
        if getattr(error, "errno", None) not in (errno.EPIPE, errno.EIO):
            self.lost = self.lost or error
        # What the stream still holds is written once more when Python ends, and must go somewhere.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting() -> Iterator[list[Lasting]]:
    """Standard output and errors as `Lasting` streams, those of them that there are: a closed one
    is none."""
    before = sys.stdout, sys.stderr
    streams = [None if stream is None else Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield [stream for stream in streams if stream is not None]
    finally:
        for stream in streams:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


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


class Terminal(Console):
    """A console on which a text is a line that says what the text says: no markup, no codes of
    emoji, no control characters, whoever chose the names in it. Styles are given beside it, or by
    `rich.text.Text`."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        if self.width < NARROW:
            self.width = USUAL

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


class Warnings(logging.Handler):
    """Writes warnings to standard errors, whatever that is by then, each as a line."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(OneLine("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        print(self.format(record), file=sys.stderr)


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
