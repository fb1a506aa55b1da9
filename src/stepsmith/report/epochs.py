"""Figures of long trainings: test accuracy on the way, and how single coefficients are moved.

Shape letters: S = seeds, E = tests, T = steps.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from stepsmith.evaluate.records import Records
from stepsmith.evaluate.statistics import stability
from stepsmith.report.figures import Panel
from stepsmith.report.style import STYLE, colours, dashes, figure_of, legend


def accuracy_curves(records: Records, panel: Panel) -> Figure | None:
    """Test accuracy along the training, the mean over seeds and their range; None where it was
    measured once only."""
    blocks = [b for b in panel.select(records, "test_accuracy", "test") if len(b.steps) > 1]
    if not blocks:
        return None
    palette = colours((block.key.optimizer, block.key.kind) for block in blocks)
    with mpl.rc_context(STYLE):
        figure, axes = figure_of()
        for block in sorted(blocks, key=lambda b: b.key.kind == "learned"):
            values_SE, steps = 100 * block.values, block.steps
            name, learned = block.key.optimizer, block.key.kind == "learned"
            axes.plot(steps, values_SE.mean(0), color=palette[name], label=name,
                      lw=2.6 if learned else 1.4, ls=dashes(name, block.key.kind))  # fmt: skip
            axes.fill_between(steps, values_SE.min(0), values_SE.max(0), color=palette[name],
                              alpha=0.12, lw=0)  # fmt: skip
        axes.set(xlabel="step", ylabel="test accuracy, %", title=panel.title)
        legend(figure, axes)
    return figure


def accuracy_spreads(records: Records, panel: Panel) -> Figure | None:
    """How much test accuracy still moves in the last third of the training (`stability`): a mark a
    seed, a dot their mean; None where it was measured too seldom."""
    found = stability(records, panel.task, panel.protocol)
    if not found:
        return None
    kinds = {b.key.optimizer: b.key.kind for b in panel.select(records, "test_accuracy", "test")}
    palette = colours(kinds.items())
    with mpl.rc_context(STYLE):
        figure, axes = figure_of(height=0.9 + 0.36 * len(found))
        for place, entry in enumerate(reversed(found)):
            each, colour = entry["spread_of_each_seed"], palette[entry["optimizer"]]
            axes.plot(each, np.full(len(each), place), "|", color=colour, ms=9, alpha=0.6)
            axes.plot(entry["spread"], place, "o", color=colour, ms=8)
        axes.set_yticks(range(len(found)), [entry["optimizer"] for entry in reversed(found)])
        axes.set_xlim(left=0)
        axes.set(xlabel="spread of test accuracy over the last third, points",
                 title=panel.title)  # fmt: skip
    return figure


def update_tracks(records: Records, panel: Panel) -> Figure | None:
    """The updates of single directions step by step, as in figure 7 of SL2O's supplement: the first
    seed's, the others' faint behind it, a row an optimizer, on one scale; None where none were
    recorded."""
    rows: dict[str, list[np.ndarray]] = {}
    kinds: dict[str, str] = {}
    number = 1
    while found := panel.select(records, f"update_{number}", "test"):
        for block in found:
            rows.setdefault(block.key.optimizer, []).append(block.values)
            kinds[block.key.optimizer] = block.key.kind
        number += 1
    if not rows:
        return None
    palette = colours(kinds.items())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.6 + 1.9 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), number - 1, sharex=True, sharey=True, squeeze=False)
        for place, (name, tracks) in enumerate(rows.items()):
            for k, track_ST in enumerate(tracks):
                own = axes[place, k]
                own.axhline(0, color="#bbbbbb", lw=0.8)
                steps = np.arange(1, track_ST.shape[1] + 1)
                own.plot(steps, track_ST[1:].T, color=palette[name], lw=0.6, alpha=0.3)
                own.plot(steps, track_ST[0], color=palette[name], lw=1.3)
                if place == 0:
                    own.set_title(f"direction {k + 1}")
                if place == len(rows) - 1:
                    own.set_xlabel("step")
            axes[place, 0].set_ylabel(f"{name}\nupdate")
    return figure
