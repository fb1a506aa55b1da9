"""Tables show names as they are, on any console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from stepsmith import TrainedRule, make_rule, tables
from stepsmith.names import shown

NAMES = [
    "[red]x[/red]", "[/]", "[link=file:///etc]y[/link]", ":warning:", "esc\x1b[2J", "a\nb", "c\td",
    "\u202ecba", "half \ud800", "\\[bold]", "[not closed",
]  # fmt: skip


def printed(table) -> str:
    file = io.StringIO()
    Console(file=file, width=400).print(table)
    return file.getvalue()


def row(name: str, **other):
    return {
        "task": name, "optimizer": name, "metric": "mean_train_loss", "mean": 1.0, "low": 0.5,
        "high": 2.0, "ratio": 0.9, "diverged": 1, "seeds": 8, "kind": "learned", **other,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name):
    text = printed(tables.losses([row(name)]))
    assert text.count(shown(name)) == 2
    assert not set("\x1b\t\u202e") & set(text)
    cell = {"rule": name, "task": name, "ratio": 0.9, "low": 0.8, "high": 1.0, "diverged": 0.5,
            "own": True}  # fmt: skip
    text = printed(tables.matrix([cell], name))
    assert text.count(shown(name)) == 3
    for told in ("0.900", "0.800 to 1.000", "50% diverged"):
        assert told in text
    rule = make_rule("rnnprop")
    if "\ud800" not in name:
        manifest = {
            "name": name, "tasks": [name, name], "data": name, "licence": name, "version": name,
            "machine": {"processor": name, "accelerator": name, "threads": 2, "cores": 2},
            "curriculum": [{"horizon": 3, "inner_steps": 3, "ended": name}],
        }  # fmt: skip
        text = printed(tables.described(TrainedRule(rule, rule.init(), manifest)))
        assert text.count(shown(name)) == 9


def test_losses_that_are_not_known_leave_their_cells_empty():
    assert "nan" not in printed(tables.losses([row("a", mean=None, low=None, ratio=None)]))


def test_a_rules_own_tasks_are_bold_and_what_diverged_is_red():
    file = io.StringIO()
    cell = {"rule": "r", "task": "t", "ratio": 0.9, "low": None, "high": None, "diverged": 0.5,
            "own": True}  # fmt: skip
    console = Console(file=file, width=400, force_terminal=True, color_system="standard")
    console.print(tables.matrix([cell], "loss"))
    assert "\x1b[1m0.900" in file.getvalue()
    assert "\x1b[1;31m50% diverged\x1b[0m" in file.getvalue()
