"""Figures, drawn from records alone.

Shape letters: S = seeds, T = steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from stepsmith.evaluate.records import Block, Records
from stepsmith.evaluate.statistics import diverged, score, smoothed, smoothing, standing
from stepsmith.names import file_name
from stepsmith.report.style import STYLE, colours, dashes, figure_of, legend

LINEAR = 200
"""Longer curves have a logarithmic axis of steps."""
WIDE = 5.0
"""Validation scores whose largest is more than so many times the least have a logarithmic axis."""
NARROW = 4
"""A logarithmic axis whose ends differ less than so many times is labelled as a plain
one: of the usual labels, 1, 2, 3 and 5, it would show one or two."""


ENDINGS = ("", "-accuracy", "-cost", "-epochs", "-stability", "-updates")
"""Of the names of a panel's figures."""


@dataclass(frozen=True)
class Panel:
    """What one set of figures and one table are about: a task under a protocol, over a horizon."""

    task: str
    horizon: int
    protocol: str = "corrected"

    @property
    def title(self) -> str:
        """For headings."""
        kind = "" if self.protocol == "corrected" else f", {self.protocol}"
        return f"{self.task}, {self.horizon:,} steps{kind}"

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a summary is about this."""
        return all(row[name] == getattr(self, name) for name in ("task", "horizon", "protocol"))

    def select(self, records: Records, metric: str, purpose: str) -> list[Block]:
        """Blocks of this panel."""
        wanted = {"task": self.task, "horizon": self.horizon, "protocol": self.protocol}
        return list(records.select(metric, purpose=purpose, **wanted))


def panels(records: Records) -> list[Panel]:
    """Panels with test losses, in order of appearance."""
    keys = [block.key for block in records.select("train_loss", purpose="test")]
    return list(dict.fromkeys(Panel(key.task, key.horizon, key.protocol) for key in keys))


def panel_files(records: Records) -> dict[Panel, str]:
    """How each panel's figures are called: by task, and by what else tells it from another; with a
    number where two would be called alike, or one as a figure that is no panel's."""
    found = panels(records)
    names: dict[Panel, str] = {}
    taken = {"meta-training", "break-even"}
    for panel in found:
        like = [other for other in found if other.task == panel.task]
        name = file_name(panel.task).replace("@", "-")
        if len({other.horizon for other in like}) > 1:
            name += f"-{panel.horizon}"
        if panel.protocol != "corrected":
            name += f"-{panel.protocol}"
        if name.casefold().startswith("transfer-"):  # as heat maps are called
            name = f"task-{name}"
        name, number = file_name(name), 1
        # Systems that do not tell capitals from small letters count too.
        while taken & _files(own := name if number == 1 else f"{name}-{number}"):
            number += 1
        taken |= _files(own)
        names[panel] = own
    return names


def _files(name: str) -> set[str]:
    return {f"{name}{ending}".casefold() for ending in ENDINGS}


def shown(records: Records, panel: Panel, criterion: str = "mean") -> list[Block]:
    """Test losses of a panel: learned rules, and baselines as tuned for the criterion."""
    return standing(panel.select(records, "train_loss", "test"), criterion)


def _plain_minor(value: float, _: int) -> str:
    """Labels between the powers of ten of a log axis: 2, 3 and 5 times."""
    leading = f"{value:e}"[0]
    return f"{value:g}" if leading in "235" else ""


def _log_losses(axes: Axes) -> None:
    """A logarithmic axis of losses that are drawn already, with plain numbers."""
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Axis) -> None:
    """Labels of a logarithmic axis on which all is drawn already."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    low, high = axis.get_view_interval()
    narrow, crowded = high < NARROW * low, high > 1e3 * low
    if narrow:
        axis.set_major_locator(MaxNLocator(5))
    unlabelled = narrow or crowded
    axis.set_minor_formatter(NullFormatter() if unlabelled else FuncFormatter(_plain_minor))


def _drawn(steps: int) -> np.ndarray:
    """The steps a curve is drawn at: all, or evenly on a logarithmic axis where they are many."""
    if steps <= LINEAR:
        return np.arange(steps)
    return np.unique(np.geomspace(1, steps, 2 * LINEAR).astype(int)) - 1


def loss_curves(records: Records, panel: Panel) -> Figure:
    """Mean over seeds of the training loss, with the 95 % interval of that mean.

    Smoothed on a logarithmic axis; as published and over few steps, every batch on a plain one, as
    the paper drew it.
    """
    blocks = shown(records, panel)
    plain = panel.protocol != "corrected" and panel.horizon <= LINEAR
    palette = colours((b.key.optimizer, b.key.kind) for b in blocks)
    with mpl.rc_context(STYLE):
        figure, axes = figure_of()
        for block in sorted(blocks, key=lambda b: b.key.kind == "learned"):
            steps = block.values.shape[1]
            losses_ST = smoothed(np.where(np.isfinite(block.values), block.values, np.nan),
                                 1 if plain else smoothing(steps))  # fmt: skip
            alive_ST = losses_ST[~diverged(block.values)]
            if not len(alive_ST):
                continue
            mean_T = alive_ST.mean(0)
            half_T = 1.96 * alive_ST.std(0, ddof=min(1, len(alive_ST) - 1)) / len(alive_ST) ** 0.5
            learned = block.key.kind == "learned"
            colour, x_T = palette[block.key.optimizer], np.arange(steps) + 1
            gone = len(losses_ST) - len(alive_ST)
            label = block.key.optimizer + (f" ({gone} diverged)" if gone else "")
            kept = _drawn(steps)
            mean_T, half_T, x_T = mean_T[kept], half_T[kept], x_T[kept]
            axes.plot(x_T, mean_T, color=colour, lw=2.6 if learned else 1.4, label=label,
                      ls=dashes(block.key.optimizer, block.key.kind))  # fmt: skip
            low_T = np.maximum(mean_T - half_T, mean_T * 1e-2)
            axes.fill_between(x_T, low_T, mean_T + half_T, color=colour, alpha=0.15, lw=0)
        if not plain:
            _log_losses(axes)
        if panel.horizon > LINEAR:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.12g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="step", ylabel="training loss", title=panel.title)
        legend(figure, axes, reverse=True)
    return figure


def accuracies(records: Records, panel: Panel) -> Figure | None:
    """Test accuracy after the last step, a dot a seed and the mean; None where not measured."""
    blocks = standing(panel.select(records, "test_accuracy", "test"), "final")
    if not blocks:
        return None
    palette = colours((b.key.optimizer, b.key.kind) for b in blocks)
    blocks.sort(key=lambda block: float(np.nanmean(block.values[:, -1])))
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=0.9 + 0.36 * len(blocks))
        for place, block in enumerate(blocks):
            values_S = 100 * block.values[:, -1]
            colour = palette[block.key.optimizer]
            axes.plot(values_S, np.full(len(values_S), place), "|", color=colour, alpha=0.45, ms=9)
            axes.plot(np.nanmean(values_S), place, "o", color=colour, ms=8)
        axes.set_yticks(range(len(blocks)), [block.key.optimizer for block in blocks])
        axes.set(xlabel="test accuracy, %", title=panel.title)
    return figure


def step_costs(records: Records, panel: Panel) -> Figure | None:
    """Median milliseconds of a training step, gradient and optimizer; None where not timed."""
    totals, gradients = (
        {b.key.optimizer: 1e3 * float(np.median(b.values)) for b in
         panel.select(records, metric, "cost")}
        for metric in ("seconds_per_step", "gradient_seconds")
    )  # fmt: skip
    if not totals:
        return None
    kinds = {b.key.optimizer: b.key.kind for b in shown(records, panel)}
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
        axes.set(xlabel="ms a training step (grey: its gradient)", title=panel.task)
    return figure


def meta_curve(records: Records) -> Figure | None:
    """Validation score against inner steps of meta-training, a line for each rule, by the first
    name it goes by; None where not recorded."""
    blocks: dict[str, Block] = {}
    for block in records.select("validation_score", purpose="meta"):
        blocks.setdefault(block.key.checkpoint, block)
    if not blocks:
        return None
    optimizers = [block.key.optimizer for block in blocks.values()]
    curves = []
    for block in blocks.values():
        optimizer = block.key.optimizer
        several = optimizers.count(optimizer) > 1 and block.key.meta_task
        curves.append((f"{optimizer}, on {block.key.meta_task}" if several else optimizer, block))
    palette = colours((label, "learned") for label, _ in curves)
    scores = np.concatenate([block.values[0] for _, block in curves])
    scores = scores[np.isfinite(scores)]
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=3.2)
        for label, block in curves:
            axes.plot(block.steps, block.values[0], marker="o", ms=4, ls=dashes(label, "learned"),
                      color=palette[label], label=label)  # fmt: skip
        if len(scores) and scores.min() > 0 and scores.max() > WIDE * scores.min():
            _log_losses(axes)
        axes.set(xlabel="inner steps", ylabel="meta-loss on held-out examples",
                 title="meta-training")  # fmt: skip
        legend(figure, axes, columns=1)
    return figure


def tuning_curves(records: Records, panel: Panel) -> Figure | None:
    """Mean loss on the tuning seeds against the rate; None where nothing was tuned."""
    found: dict[str, list[tuple[float, float]]] = {}
    for block in panel.select(records, "train_loss", "tuning"):
        value = float(score(block.values, "mean").mean())
        found.setdefault(block.key.optimizer, []).append((block.key.parameters["lr"], value))
    criterion = "mean" if found else "final"
    for block in panel.select(records, "final_loss", "tuning"):
        # By successive halving: a line for each share of the training that rates were tried over.
        lr, share = block.key.parameters["lr"], block.key.parameters["share"]
        name = block.key.optimizer if share == 1 else f"{block.key.optimizer}, {share:.0%} of it"
        found.setdefault(name, []).append((lr, float(block.values.mean())))
    if not found:
        return None
    palette = colours((name, "baseline") for name in found)
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=3.4)
        for name, points in found.items():
            rates, values = zip(*sorted(points), strict=True)
            axes.plot(rates, values, "o-", ms=4, color=palette[name], label=name)
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        _log_losses(axes)
        axes.set(xlabel="rate", ylabel=f"{criterion} loss, tuning seeds", title=panel.title)
        legend(figure, axes)
    return figure
