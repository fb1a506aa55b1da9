"""What a person sees of a running meta-training: a bar, and TensorBoard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from stepsmith.meta.adjoint import Window
    from stepsmith.meta.trainer import Run


class Reporter:
    """Shows a run's progress while it is open.

    Args:
        run: the run.
        shown: whether to draw the bar.
        tensorboard: folder for events, or None.

    Raises:
        ValueError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, run: Run, *, shown: bool, tensorboard: Path | None):
        self._run = run
        self._started_at = run.progress.inner_steps
        self._elapsed_at = run.progress.elapsed
        self._writer: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("TensorBoard is not installed; pip install tensorboard") from None
            self._writer = SummaryWriter(str(tensorboard))
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            disable=not shown,
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
        if self._writer is not None:
            self._writer.close()

    def show(self, window: Window) -> None:
        """Show the state after a window."""
        progress = self._run.progress
        seconds = max(1e-9, progress.elapsed - self._elapsed_at)
        rate = (progress.inner_steps - self._started_at) / seconds
        best = "-" if progress.best_score is None else f"{progress.best_score:.4g}"
        note = f"meta-loss {window.value:.4g}, best validation {best}, {rate:,.0f} inner steps/s"
        self._bar.update(self._task, completed=min(1.0, self._run.spent), note=note)
        if self._writer is not None:
            at = progress.inner_steps
            self._writer.add_scalar("meta/loss", window.value, at)
            self._writer.add_scalar("meta/gradient_norm", progress.history[-1]["norm"], at)
            self._writer.add_scalar("meta/inner_steps_per_second", rate, at)
            if progress.validations[-1]["inner_steps"] == at:
                self._writer.add_scalar("meta/validation", progress.validations[-1]["score"], at)
