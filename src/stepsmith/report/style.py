"""Colours, fonts and SVG text of all figures."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepsmith.names import shown

STRONG = (
    "#c2410c", "#7c3aed", "#be185d", "#1f2937", "#d97706", "#0891b2",
    "#1e3a8a", "#818cf8", "#34d399", "#f43f5e", "#78350f", "#eab308",
)  # fmt: skip
"""Learned rules. The last six lie no closer to another colour than the first six to one another,
for eyes that see no red or no green too."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1.2, 1, 1.2)))
"""Rules that differ in their seed or their schedule alone."""
MUTED = {
    "adam": "#2563a8", "nag": "#0f766e", "sgd": "#737373", "momentum": "#65a30d",
    "adamw": "#60a5d8", "rmsprop": "#a16207", "adagrad": "#6d6a9c",
}  # fmt: skip
"""Baselines, one colour each in every figure."""
CROWD, LETTERS = 12, 120
"""More curves than this, or more letters in all their names, have their legend below the axes."""
WIDTH = 7.2
"""Of a figure, in inches."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.labelcolor": "#333333",
    "xtick.color": "#555555", "ytick.color": "#555555", "axes.grid": True, "grid.alpha": 0.25,
    "svg.fonttype": "none", "svg.hashsalt": "stepsmith", "axes.titlesize": 12,
    "axes.titlelocation": "left", "legend.frameon": False,
    # Names may have dollars in them, and are no formulas.
    "text.parse_math": False, "text.usetex": False,
}  # fmt: skip


def svg(figure: Figure) -> str:
    """The figure as an SVG element; the same records give the same text.

    Letters are drawn by whoever shows it, so that our own fonts need not have them; a name that is
    longer than the figure goes beyond its edge. Characters that XML may not hold, or that cannot be
    seen, become escapes.
    """
    sink = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    return shown(text[text.index("<svg") :], keep="\n")


def plain(name: str) -> str:
    """A rule's name without the seed of its meta-training or the schedule it runs under.

    >>> plain("curriculum, seed 1"), plain("SL2O, cosine to half")
    ('curriculum', 'SL2O')
    """
    return re.sub(r", (seed \d+|cosine( to half)?)$", "", name)


def colours(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A colour for each (optimizer, kind), the same wherever it appears; one for rules that differ
    in their seed or their schedule alone."""
    found: dict[str, str] = {}
    strong: dict[str, str] = {}
    for name, kind in names:
        if name in found:
            continue
        if kind == "learned":
            found[name] = strong.setdefault(plain(name), STRONG[len(strong) % len(STRONG)])
        else:
            # `adamw in subspace, cosine` has the colour of `adamw`.
            found[name] = MUTED.get(re.split(r"[ ,]", name)[0], "#444444")
    return found


def dashes(name: str, kind: str) -> Any:
    """How an optimizer's line is drawn, of kind `learned` or `baseline`: dotted where another of
    its colour goes without its schedule, dashed in a subspace, else by the seed it is named by."""
    if name.endswith("cosine to half") or (kind == "learned" and name.endswith(", cosine")):
        return DASHES[2]
    if "subspace" in name:
        return "--"
    seed = re.search(r", seed (\d+)$", name)
    return DASHES[int(seed[1][-2:]) % len(DASHES)] if seed else "-"


def legend(figure: Figure, axes: Axes, *, reverse: bool = False, columns: int = 2) -> None:
    """Name the curves: within the axes, or, where that is too much to stand there, below them, in
    as many columns as fit; the figure grows by these lines.

    Args:
        figure, axes: of `figure_of`, the curves drawn and labelled.
        reverse: the last one drawn comes first.
        columns: within the axes.
    """
    curves = axes.get_lines()[:: -1 if reverse else 1]
    labels = [str(curve.get_label()) for curve in curves]
    # matplotlib leaves out labels that begin with an underscore; the texts are put in afterwards.
    blank = [" "] * len(labels)
    if len(labels) <= CROWD and sum(map(len, labels)) <= LETTERS:
        made = axes.legend(curves, blank, ncols=columns)
    else:
        longest = 0.6 + 0.07 * max(map(len, labels))  # inches, with the line before it
        columns = max(1, min(3, int(WIDTH / longest)))
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
        made = figure.legend(curves, blank, loc="outside lower center", ncols=columns, fontsize=9)
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set_text(label)


def figure_of(width: float = WIDTH, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of so many inches, with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def short(name: str) -> str:
    """A rule's name without the `learned (...)` around it."""
    return re.sub(r"^learned \((.*)\)('*)$", r"\1\2", name)


def wrapped(name: str, width: int = 15) -> str:
    """A task's name on lines of about `width` characters, broken after dashes and before variants.

    >>> print(wrapped("convnet-sigmoid-fashion_mnist@1000@shift"))
    convnet-
    sigmoid-
    fashion_mnist
    @1000@shift
    """
    lines = [""]
    for part in re.split(r"(?<=-)|(?=@)", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
