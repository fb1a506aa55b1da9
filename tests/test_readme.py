"""The README's programs run as they stand, on small data and with a small budget."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import stepsmith

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def programs() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(found) == 2
    return found


def test_the_programs_run_one_after_the_other(programs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = stepsmith.meta_train

    def briefly(task, *, seconds, progress, **config):
        assert len(task.data.train[0]) == 10_000
        return right(task, steps=400, **{**config, "horizon": 20, "validation_copies": 1})

    monkeypatch.setattr(stepsmith, "meta_train", briefly)
    scope = {}
    exec(programs[0], scope)
    assert float(scope["loss"].detach()) < 0.5 * math.log(10)
    exec(programs[1], scope)
    assert stepsmith.load("mine.safetensors").rule == scope["rule"].rule


@pytest.mark.parametrize("place", re.findall(r"\]\(([^)h][^)]*)\)", README.read_text()))
def test_links_lead_somewhere(place):
    assert (README.parent / place).exists()
