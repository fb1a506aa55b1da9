"""What a recipe found beyond its losses, as tables: for the pages in Markdown, and in HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stepsmith.names import shown

APART = ("protocol", "criterion")
"""What tells one table from another."""
PLACES = ("", "task", "horizon")
"""What can head a column; the first stands for a key of a mapping."""
BESIDE = ("low", "high", "ratios")
"""Shown in the cell of the value before them: its interval, and the ratio of each seed."""
NONE = "–"
"""Stands for nothing: a target never met, an empty list."""


@dataclass(frozen=True)
class FindingsTable:
    """One table of text.

    Args:
        caption: what it is of; may be empty.
        head: names of the columns.
        lines: the cells of each line, as many as the head has.
    """

    caption: str
    head: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, the caption in bold above it."""
        lines = [f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in self.lines]
        head = f"| {' | '.join(map(_escaped, self.head))} |\n|{'---|' * len(self.head)}"
        caption = [f"**{_escaped(self.caption)}**\n"] if self.caption else []
        return "\n".join([*caption, head, *lines])


def findings_tables(findings: Mapping[str, Any], caption: str = "") -> list[FindingsTable]:
    """The tables of a recipe's findings.

    A list of entries is a table, and so is a mapping of names to such lists or to entries; an entry
    is a mapping whose values are numbers, texts or lists of these. Single values that stand beside
    others share a table of one line; other mappings are looked into. Where each entry says one
    value of something at a task or horizon, the tasks are the columns.

    Args:
        findings: of a recipe, JSON-able.
        caption: of what they belong to.

    Returns:
        The tables, in order.
    """
    single = {key: value for key, value in findings.items() if _is_cell(value)}
    tables = _tables([single], caption) if single else []
    rest = {key: value for key, value in findings.items() if key not in single}
    entries = _gathered(rest)
    if entries is not None:
        return tables + _tables(entries, caption)
    for key, value in rest.items():
        name = f"{caption}: {_words(key)}" if caption else _words(key)
        if isinstance(value, Mapping):
            tables += findings_tables(value, name)
        else:
            entries = [part if isinstance(part, Mapping) else {key: part} for part in value]
            tables += _tables(entries, name)
    return tables


def _is_cell(value: Any) -> bool:
    """Whether a value fits a cell: a number, a text, None, or a list of these."""
    if isinstance(value, list):
        return not any(isinstance(part, list | Mapping) for part in value)
    return not isinstance(value, Mapping)


def _is_entry(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_cell(part) for part in value.values())


def _gathered(findings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The entries of several keys with the same fields as one list, each with its key; None where
    they do not belong together."""
    lists = [value if isinstance(value, list) else [value] for value in findings.values()]
    entries = [entry for value in lists for entry in value]
    if len(lists) < 2 or not all(_is_entry(entry) for entry in entries):
        return None
    if len({tuple(entry) for entry in entries}) > 1:
        return None
    return [
        # An entry that says its name needs no other.
        dict(entry) if key in entry.values() else {"": key, **entry}
        for key, value in zip(findings, lists, strict=True)
        for entry in value
    ]


def _tables(entries: Sequence[Mapping[str, Any]], caption: str) -> list[FindingsTable]:
    """One table for each protocol and criterion."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(_text(entry.get(name)) for name in APART), []).append(entry)
    return [_table(group, caption) for group in groups.values()]


def _table(entries: Sequence[Mapping[str, Any]], caption: str) -> FindingsTable:
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    common = [
        name for name in columns
        if name in (*APART, *PLACES[1:])
        and len({_text(entry.get(name)) for entry in entries}) == 1
        and name in entries[0]
    ]  # fmt: skip
    told = [_place(name, entries[0][name]) for name in common]
    told = [text for text in told if text not in caption.split(": ")]
    caption = ", ".join([caption, *told] if caption else told)
    shown = [name for name in columns if name not in (*common, *BESIDE)]
    places = [name for name in shown if name in PLACES]
    labels = [name for name in shown if name not in places and _is_text(entries, name)]
    values = [name for name in shown if name not in (*places, *labels)]
    if places and len(labels) == len(values) == 1:
        return _crossed(entries, caption, places, labels[0], values[0])
    bounded = next((before for before, name in pairwise(columns) if name in BESIDE), None)
    lines = [[_cell(entry, name, name == bounded) for name in shown] for entry in entries]
    return FindingsTable(caption, [_words(name) for name in shown], lines)


def _is_text(entries: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(entry.get(name), str) for entry in entries)


def _crossed(
    entries: Sequence[Mapping[str, Any]], caption: str, places: list[str], label: str, value: str
) -> FindingsTable:
    """What the entries are named by in rows, where they are from in columns."""
    cells: dict[str, dict[str, str]] = {}
    for entry in entries:
        place = ", ".join(_place(name, entry.get(name)) for name in places)
        cells.setdefault(entry[label], {})[place] = _cell(entry, value, True)
    heads = list(dict.fromkeys(place for row in cells.values() for place in row))
    lines = [[name, *(row.get(place, "") for place in heads)] for name, row in cells.items()]
    caption = f"{caption}: {_words(value)}" if caption else _words(value)
    return FindingsTable(caption, [_words(label), *heads], lines)


def _place(name: str, value: Any) -> str:
    if name == "horizon":
        return f"{_text(value)} steps"
    return f"{value} loss" if name == "criterion" else str(value)


def _cell(entry: Mapping[str, Any], name: str, bounded: bool) -> str:
    """A value's text, with what stands beside it where it is the bounded one."""
    value = entry.get(name)
    if not bounded or not any(other in entry for other in BESIDE):
        return _text(value)
    text = _fixed(value)
    if "low" in entry:
        text += f" [{_fixed(entry['low'])}, {_fixed(entry.get('high'))}]"
    if isinstance(entry.get("ratios"), list):
        text += f" ({', '.join(_fixed(ratio) for ratio in entry['ratios'])})"
    return text


def _fixed(value: Any) -> str:
    """With as many decimals as its neighbours, to be held against them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _text(value: Any) -> str:
    """A value for people: four digits of a number, dashes for nothing."""
    if value is None or value == []:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _escaped(text: str) -> str:
    """As Markdown shows it: what would end a cell, begin HTML, code, a formula or emphasis, or make
    a link, stands for itself. Underscores within words do."""
    text = re.sub(r"[|`*$]|(?<!\w)_|_(?!\w)|\](?=\()", r"\\\g<0>", shown(text))
    return text.replace("<", "&lt;")
