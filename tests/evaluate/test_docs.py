"""The programs of the page on comparisons run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from stepsmith.cli import main

DOCS = Path(__file__).parents[2] / "docs" / "3-compare.md"


def test_a_network_of_ones_own_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine, compared = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    scope: dict = {}
    exec(mine, scope)
    exec(compared, scope)
    printed = dict(line.rsplit(" ", 2)[:2] for line in capsys.readouterr().out.splitlines())
    assert {"learned (mlp-mnist)", "adam", "nag"} == set(printed)
    assert all(0 < float(loss) < 2.3 for loss in printed.values())


def test_the_command_finds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]
    )
    (command,) = re.findall(r"stepsmith (evaluate --task mine:task .*)", DOCS.read_text())
    try:
        main([*command.split(), "--steps", "5", "--seeds", "2", "-b", "adam", "--no-timing"])
    except SystemExit as done:
        assert done.code == 0
    assert (tmp_path / "runs" / "evaluate-mine-task" / "report.html").exists()
