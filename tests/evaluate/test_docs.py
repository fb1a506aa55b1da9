"""The programs of the page on comparisons run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepsmith.cli import main

DOCS = (Path(__file__).parents[2] / "docs" / "3-compare.md").read_text()
MINE, COMPARED = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


def test_a_network_of_ones_own_is_compared(capsys):
    scope: dict = {}
    exec(MINE, scope)
    exec(COMPARED, scope)
    printed = dict(line.rsplit(" ", 2)[:2] for line in capsys.readouterr().out.splitlines())
    assert set(printed) == {"learned (mlp-mnist)", "adam"}
    assert all(0 < float(loss) < 2.3 for loss in printed.values())


def test_the_command_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (command,) = re.findall(r"stepsmith (evaluate --task mine:task .*)", DOCS)
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--steps", "5", "--seeds", "2", "-b", "adam", "--no-timing"])
    assert done.value.code == 0
    assert (tmp_path / "runs" / "evaluate-mine-task" / "report.html").exists()
