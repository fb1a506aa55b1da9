"""What commands share on a terminal: telling what is being done, ending where they are stopped,
telling a user's mistake and failures of the user's own code from faults of this library.
"""

from __future__ import annotations

import dis
import errno
import functools
import logging
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO, cast

import torch
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
            if handler is not None:  # one that is not Python's cannot be put back
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


class UserCodeError(ValueError):
    """Code of the user's own failed; the message says what, and in which line of which file."""


FAULT = (
    "stepsmith: this is a fault of Stepsmith, not of what was typed; please report it with the "
    "traceback above"
)

_OWN = str(Path(__file__).parent)
_LIBRARIES = tuple({*sysconfig.get_paths().values(), "<frozen "})
_folders: set[str] = set()
"""Where the user's modules lie that commands have been given."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an interruption into an ordinary error (typer would end with another exit code), and a
    failure of the user's own code, met by `users_code` before, into one that says where it is.

    Raises:
        Interrupted: the command was interrupted.
        UserCodeError: a function of the user's own failed.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or INTERRUPTED) from None
        except (Exception, SystemExit) as error:
            frames = _frames(error, lambda file: _is_users(file) and _is_met(file))
            if not frames or isinstance(error, UserCodeError | MemoryError):
                raise
            raise UserCodeError(f"your own code failed: {_told(error, frames)}") from None

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
def users_code(name: str) -> Iterator[None]:
    """Around what imports a user's module and calls a function of it.

    Args:
        name: `module:function`.

    Raises:
        UserCodeError: either failed, even by `SystemExit`; says what and where.
        ValueError: as raised inside by this library itself.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        _meet(name)
        # The error behind one of ours may be the user's: an import that fails within the module.
        chain = [part for part in (error, error.__context__) if part is not None]
        for part in chain:
            frames = _frames(part, _is_users)
            if frames or isinstance(part, SyntaxError):
                raise UserCodeError(f"task {name!r}: {_told(part, frames)}") from None
        told = isinstance(error, ValueError) and _is_deliberate(error)
        if told or isinstance(error, MemoryError):
            raise
        raise UserCodeError(f"task {name!r}: {_told(error, [])}") from None
    _meet(name)


def mistake(error: BaseException) -> str | None:
    """What to tell a user in one line; None of a fault of ours, which needs a traceback.

    A bad value is a ValueError, wherever it is met; what a system or a disk refuses is an OSError.
    Other errors are for the user only where this library raises them itself.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        first = text.strip().splitlines()[0]
        return f"out of memory ({first}); choose a smaller task, rule or number of copies"
    if isinstance(error, ValueError | OSError | Interrupted):
        return text
    if isinstance(error, TypeError | RuntimeError | ImportError) and _is_deliberate(error):
        return text
    return None


def _is_deliberate(error: BaseException) -> bool:
    """Whether a `raise` of this library made it, not an operation that failed."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_code.co_filename.startswith(_OWN):
        return False
    code = trace.tb_frame.f_code.co_code
    return dis.opname[code[trace.tb_lasti]] == "RAISE_VARARGS"


def _frames(error: BaseException, wanted: Callable[[str], bool]) -> list[traceback.FrameSummary]:
    trace: TracebackType | None = error.__traceback__
    # Without looking at sources, which a deep recursion would read a thousand times.
    found = traceback.StackSummary.extract(
        traceback.walk_tb(trace), lookup_lines=False, limit=sys.getrecursionlimit() + 100
    )
    return [frame for frame in found if wanted(frame.filename)]


def _is_users(file: str) -> bool:
    return not file.startswith((_OWN, *_LIBRARIES)) and "site-packages" not in Path(file).parts


def _is_met(file: str) -> bool:
    return any(Path(folder) in Path(file).parents for folder in _folders)


def _meet(name: str) -> None:
    module = sys.modules.get(name.partition(":")[0])
    file = getattr(module, "__file__", None)
    if file is not None and _is_users(file):
        _folders.add(str(Path(file).parent))


def _told(error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    """An error of the user's code in one line: its type, what it says, and where it is."""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        said = error.msg
        place = f" ({error.filename}, line {error.lineno})" if error.filename else ""
    elif frames:
        last = frames[-1]
        place = f" ({last.filename}, line {last.lineno}, in {last.name})"
    else:
        place = ""
    return f"{kind}{': ' * bool(said)}{said}{place}"


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
