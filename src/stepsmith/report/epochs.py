"""Figures of long trainings: test accuracy by epoch, and how single coefficients are moved.

Shape letters: S = seeds, E = epochs, T = steps.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stepsmith.evaluate.records import Records
from stepsmith.report.figures import Panel
from stepsmith.report.style import STYLE, colours, dashes, figure_of


def accuracy_curves(records: Records, panel: Panel) -> Figure | None:
    """Test accuracy after every epoch, the mean over seeds and their range; None where it was
    measured once only."""
    blocks = [b for b in panel.select(records, "test_accuracy", "test") if len(b.steps) > 1]
    if not blocks:
        return None
    palette = colours((block.key.optimizer, block.key.kind) for block in blocks)
    with mpl.rc_context(STYLE):
        figure, axes = figure_of()
        for block in sorted(blocks, key=lambda b: b.key.kind == "learned"):
            values_SE, epochs = 100 * block.values, np.arange(1, len(block.steps) + 1)
            name, learned = block.key.optimizer, block.key.kind == "learned"
            axes.plot(epochs, values_SE.mean(0), color=palette[name], label=name,
                      lw=2.6 if learned else 1.4, ls=dashes(name))  # fmt: skip
            axes.fill_between(epochs, values_SE.min(0), values_SE.max(0), color=palette[name],
                              alpha=0.12, lw=0)  # fmt: skip
        axes.set(xlabel="epoch", ylabel="test accuracy, %", title=panel.title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=2)
    return figure


def update_tracks(records: Records, panel: Panel) -> Figure | None:
    """The updates of single directions step by step, as in figure 7 of SL2O's supplement: the first
    seed's, a row an optimizer; None where none were recorded."""
    rows: dict[str, list[np.ndarray]] = {}
    kinds: dict[str, str] = {}
    number = 1
    while found := panel.select(records, f"update_{number}", "test"):
        for block in found:
            rows.setdefault(block.key.optimizer, []).append(block.values[0])
            kinds[block.key.optimizer] = block.key.kind
        number += 1
    if not rows:
        return None
    palette = colours(kinds.items())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.6 + 1.9 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), number - 1, sharex=True, sharey="row", squeeze=False)
        for place, (name, tracks) in enumerate(rows.items()):
            for k, track_T in enumerate(tracks):
                own = axes[place, k]
                own.axhline(0, color="#bbbbbb", lw=0.8)
                own.plot(np.arange(1, len(track_T) + 1), track_T, color=palette[name], lw=1.3)
                if place == 0:
                    own.set_title(f"direction {k + 1}")
                if place == len(rows) - 1:
                    own.set_xlabel("step")
            axes[place, 0].set_ylabel(f"{name}\nupdate")
    return figure
