"""What commands share on a terminal: telling what is being done, ending where they are stopped,
telling a user's mistake and failures of the user's own code from faults of this library.
"""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

INTERRUPTED = "interrupted; what was saved before is intact"


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
            yield lambda message: status.update(escape(message))
    else:
        yield lambda message: console.print(
            time.strftime("%H:%M:%S"), message, markup=False, emoji=False, soft_wrap=True
        )
