"""Figures, drawn from records alone.

Shape letters: S = seeds, T = steps.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from stepsmith.evaluate.records import Block, Records
from stepsmith.evaluate.statistics import diverged, score, smoothed, smoothing
from stepsmith.report.style import STYLE, colours, figure_of


def shown(records: Records, task: str, criterion: str = "mean") -> list[Block]:
    """Test losses of a task: learned rules, and baselines as tuned for the criterion."""
    return [
        block
        for block in records.select("train_loss", purpose="test", task=task)
        if block.key.kind == "learned" or criterion in block.key.tuned_for.split(",")
    ]


def tasks(records: Records) -> list[str]:
    """Tasks with test losses, in order of appearance."""
    return list(dict.fromkeys(b.key.task for b in records.select("train_loss", purpose="test")))


def _plain_minor(value: float, _: int) -> str:
    """Labels between the powers of ten of a log axis: 2, 3 and 5 times."""
    leading = f"{value:e}"[0]
    return f"{value:g}" if leading in "235" else ""


def loss_curves(records: Records, task: str) -> Figure:
    """Mean over seeds of the smoothed training loss, with the 95 % interval of that mean."""
    blocks = shown(records, task)
    palette = colours((b.key.optimizer, b.key.kind) for b in blocks)
    with mpl.rc_context(STYLE):
        figure, axes = figure_of()
        for block in sorted(blocks, key=lambda b: b.key.kind == "learned"):
            steps = block.values.shape[1]
            losses_ST = smoothed(np.where(np.isfinite(block.values), block.values, np.nan),
                                 smoothing(steps))  # fmt: skip
            alive_ST = losses_ST[~diverged(block.values)]
            if not len(alive_ST):
                continue
            mean_T = alive_ST.mean(0)
            half_T = 1.96 * alive_ST.std(0, ddof=min(1, len(alive_ST) - 1)) / len(alive_ST) ** 0.5
            learned = block.key.kind == "learned"
            colour, x_T = palette[block.key.optimizer], np.arange(steps) + 1
            gone = len(losses_ST) - len(alive_ST)
            label = block.key.optimizer + (f" ({gone} diverged)" if gone else "")
            axes.plot(x_T, mean_T, color=colour, lw=2.6 if learned else 1.4, label=label)
            low_T = np.maximum(mean_T - half_T, mean_T * 1e-2)
            axes.fill_between(x_T, low_T, mean_T + half_T, color=colour, alpha=0.15, lw=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain_minor))
        if blocks and blocks[0].values.shape[1] > 200:
            axes.set_xscale("log")
        axes.set(xlabel="step", ylabel="training loss", title=task)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], ncols=2)
    return figure


def accuracies(records: Records, task: str) -> Figure | None:
    """Test accuracy after the last step, a dot a seed and the mean; None where not measured."""
    blocks = [
        block
        for block in records.select("test_accuracy", purpose="test", task=task)
        if block.key.kind == "learned" or "final" in block.key.tuned_for.split(",")
    ]
    if not blocks:
        return None
    palette = colours((b.key.optimizer, b.key.kind) for b in blocks)
    blocks.sort(key=lambda block: float(np.nanmean(block.values)))
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=0.9 + 0.36 * len(blocks))
        for place, block in enumerate(blocks):
            values_S = 100 * block.values[:, -1]
            colour = palette[block.key.optimizer]
            axes.plot(values_S, np.full(len(values_S), place), "|", color=colour, alpha=0.45, ms=9)
            axes.plot(np.nanmean(values_S), place, "o", color=colour, ms=8)
        axes.set_yticks(range(len(blocks)), [block.key.optimizer for block in blocks])
        axes.set(xlabel="test accuracy, %", title=task)
    return figure


def step_costs(records: Records, task: str) -> Figure | None:
    """Median milliseconds of a training step, gradient and optimizer; None where not timed."""
    totals, gradients = (
        {b.key.optimizer: 1e3 * float(np.median(b.values)) for b in
         records.select(metric, purpose="cost", task=task)}
        for metric in ("seconds_per_step", "gradient_seconds")
    )  # fmt: skip
    if not totals:
        return None
    kinds = {b.key.optimizer: b.key.kind for b in shown(records, task)}
    palette = colours((name, kinds.get(name, "baseline")) for name in totals)
    names = sorted(totals, key=lambda name: -totals[name])
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=0.9 + 0.36 * len(names))
        for place, name in enumerate(names):
            axes.barh(place, gradients[name], color="#c8c8c8", height=0.6)
            axes.barh(place, totals[name] - gradients[name], left=gradients[name],
                      color=palette[name], height=0.6)  # fmt: skip
            axes.text(totals[name], place, f" {totals[name]:.2f}", va="center", color="#333333")
        axes.set_yticks(range(len(names)), names)
        axes.margins(x=0.12)
        axes.set(xlabel="ms a training step (grey: its gradient)", title=task)
    return figure


def meta_curve(records: Records) -> Figure | None:
    """Validation score against inner steps of meta-training; None where not recorded."""
    blocks: dict[str, Block] = {}
    for block in records.select("validation_score", purpose="meta"):
        blocks.setdefault(block.key.checkpoint + block.key.optimizer, block)
    if not blocks:
        return None
    palette = colours((b.key.optimizer, "learned") for b in blocks.values())
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=3.2)
        for block in blocks.values():
            axes.plot(block.steps, block.values[0], "o-", color=palette[block.key.optimizer],
                      label=block.key.optimizer)  # fmt: skip
        axes.set(xlabel="inner steps", ylabel="meta-loss on held-out examples",
                 title="meta-training")  # fmt: skip
        axes.legend()
    return figure


def tuning_curves(records: Records, task: str) -> Figure | None:
    """Mean loss on the tuning seeds against the rate; None where nothing was tuned."""
    found: dict[str, list[tuple[float, float]]] = {}
    for block in records.select("train_loss", purpose="tuning", task=task):
        value = float(score(block.values, "mean").mean())
        found.setdefault(block.key.optimizer, []).append((block.key.parameters["lr"], value))
    if not found:
        return None
    palette = colours((name, "baseline") for name in found)
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=3.4)
        for name, points in found.items():
            rates, values = zip(*sorted(points), strict=True)
            axes.plot(rates, values, "o-", ms=4, color=palette[name], label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlabel="rate", ylabel="mean loss, tuning seeds", title=task)
        axes.legend(ncols=2)
    return figure
