"""The README's programs run as they stand, on small data and with a small budget."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import stepsmith

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def programs() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(found) == 2
    return found


def test_a_bundled_rule_trains_the_readers_model(programs):
    scope = {}
    exec(programs[0], scope)
    assert float(scope["loss"].detach()) < 0.5 * math.log(10)


def test_meta_training_on_the_readers_model(programs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = stepsmith.meta_train
    monkeypatch.setattr(
        stepsmith, "meta_train",
        lambda task, seconds, progress: right(task, steps=400, horizon=20, validation_copies=1),
    )  # fmt: skip
    images, labels = torch.randn(300, 784), torch.arange(300) % 10
    scope = {"images": images, "labels": labels}
    exec(programs[1], scope)
    assert stepsmith.load("mine.safetensors").rule == scope["rule"].rule


@pytest.mark.parametrize("place", re.findall(r"\]\(([^)h][^)]*)\)", README.read_text()))
def test_links_lead_somewhere(place):
    assert (README.parent / place).exists()
