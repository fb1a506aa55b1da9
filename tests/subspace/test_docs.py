"""The tutorial's programs run as they stand, the meta-training shortened."""

from __future__ import annotations

import re
from pathlib import Path

import stepsmith

DOCS = Path(__file__).parents[2] / "docs" / "8-subspace.md"


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    right = stepsmith.meta_train
    monkeypatch.setattr(
        stepsmith, "meta_train",
        lambda task, rule, steps, horizon, copies: right(
            task, rule, steps=200, horizon=20, copies=copies, validations=1, validation_copies=1
        ),
    )  # fmt: skip
    programs = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(programs) == 3
    scope: dict = {}
    for program in programs:
        exec(program, scope)
    lines = capsys.readouterr().out.splitlines()
    reached = {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if ", " in line
               and not line.startswith("Subspace")}  # fmt: skip
    assert reached["subspace, momentum"] < 1.2 * reached["full space, SGD"]
