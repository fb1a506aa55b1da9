"""What a person sees of a running meta-training: a bar, and TensorBoard."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stepsmith.store import CheckpointError
from stepsmith.terminal import Lasting, Terminal

if TYPE_CHECKING:
    from stepsmith.meta.adjoint import Window
    from stepsmith.meta.trainer import Run


_log = logging.getLogger("stepsmith")

AGAIN = 60.0
"""Seconds after which TensorBoard events that could not be written are tried again."""


def require_tensorboard() -> None:
    """Raise ValueError where TensorBoard is not installed."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise ValueError("TensorBoard is not installed; pip install tensorboard") from None


class Events:
    """TensorBoard events of a run. Those that cannot be written are left out, said and, a minute
    later, tried again in a new file; the run goes on.

    Args:
        folder: of the event files.

    Raises:
        ValueError: TensorBoard is not installed.
        CheckpointError: the folder cannot be written to.
    """

    def __init__(self, folder: Path):
        require_tensorboard()
        self._folder = folder
        self._writer: Any = None
        self._failed, self._again = False, 0.0
        try:
            self._open()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: TensorBoard events cannot be written there ({error.strerror or error});"
                " make room, or leave tensorboard out"
            ) from None

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))

    def add(self, numbers: dict[str, float], at: int) -> None:
        """Add some numbers after so many inner steps."""
        if self._failed and (time.monotonic() < self._again or not self._tried(self._open)):
            return
        for name, value in numbers.items():
            if not self._tried(self._writer.add_scalar, name, value, at):
                return
        if self._failed:
            _log.warning("%s: TensorBoard events can be written again", self._folder)
            self._failed = False

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._tried(self._writer.close)

    def _tried(self, act: Callable[..., object], *arguments: Any) -> bool:
        try:
            act(*arguments)
        except Exception as error:  # whatever its thread met: of a remote file system, its own
            if not self._failed:
                _log.warning(
                    "%s: TensorBoard events cannot be written (%s); the run goes on, and they are "
                    "tried again", self._folder, error,
                )  # fmt: skip
            self._writer, self._failed = None, True
            self._again = time.monotonic() + AGAIN
            return False
        return True


class Reporter:
    """Shows a run's progress while it is open.

    Args:
        run: the run.
        shown: whether to draw the bar.
        tensorboard: folder for events, or None.

    Raises:
        ValueError: TensorBoard was asked for and is not installed, or cannot write there.
    """

    def __init__(self, run: Run, *, shown: bool, tensorboard: Path | None):
        self._run = run
        self._started_at = run.progress.inner_steps
        self._elapsed_at = run.progress.elapsed
        self._events = None if tensorboard is None else Events(tensorboard)
        # A bar that nobody reads any more must not end the run.
        stream = None if sys.stdout is None else cast(TextIO, Lasting(sys.stdout))
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=Terminal(file=stream), disable=not shown,
        )  # fmt: skip

    def __enter__(self) -> Reporter:
        self._bar.start()
        self._task = self._bar.add_task("meta-training", total=1.0, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._events is not None:
            self._events.close()

    def show(self, window: Window) -> None:
        """Show the state after a window."""
        progress = self._run.progress
        seconds = max(1e-9, progress.elapsed - self._elapsed_at)
        rate = (progress.inner_steps - self._started_at) / seconds
        best = "-" if progress.best_score is None else f"{progress.best_score:.4g}"
        note = f"meta-loss {window.value:.4g}, best validation {best}, {rate:,.0f} inner steps/s"
        self._bar.update(self._task, completed=min(1.0, self._run.spent), note=note)
        if self._events is not None:
            at = progress.inner_steps
            numbers = {
                "meta/loss": window.value,
                "meta/gradient_norm": progress.history[-1]["norm"],
                "meta/inner_steps_per_second": rate,
            }
            if progress.validations[-1]["inner_steps"] == at:
                numbers["meta/validation"] = progress.validations[-1]["score"]
            self._events.add(numbers, at)
