"""Arguments of subspaces are checked when they are made."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from stepsmith.subspace import Snapshots, Subspace, from_trajectory, per_layer, random


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def states(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [model().state_dict() for _ in range(count)]


@pytest.mark.parametrize("given", [None, 5, 0.5, object()], ids=lambda given: type(given).__name__)
def test_what_is_no_model_or_trajectory(given):
    for make in (random, from_trajectory, per_layer):
        with pytest.raises(TypeError, match=r"must be of type"):
            make(given, 2)


@pytest.mark.parametrize("pairs", [[1], ["ab"], [("w", 3)], [(3, torch.ones(2))], [torch.ones(2)]])
def test_parameters_must_have_names(pairs):
    with pytest.raises(TypeError, match=r"goes by the names of parameters"):
        random(pairs, 1)


@pytest.mark.parametrize("d", [0, -1, 1.5, True, "2", None, [2], torch.tensor(2), 10**30])
def test_directions_are_counted_in_whole_numbers(d):
    for make in (random, per_layer):
        if isinstance(d, int) and d > 100 and make is per_layer:
            continue  # a layer of fewer numbers gets as many as it has
        with pytest.raises(ValueError, match=r"d must be a whole number|lower d"):
            make(model(), d)
    with pytest.raises(ValueError, match=r"d must be a whole number|lower d"):
        from_trajectory(states(), d)


@pytest.mark.parametrize("wrong", [{"centred": "no"}, {"centred": 1}, {"source": 3}, {"params": 7}])
def test_arguments_of_a_trajectory(wrong):
    (name,) = wrong
    with pytest.raises(TypeError, match=f"from_trajectory: {name} must be"):
        from_trajectory(states(), 2, **wrong)


def test_numbers_of_numpys_are_saved(tmp_path):
    made = per_layer(model(), np.int64(2), source="here")
    assert Subspace.load(made.save(tmp_path / "made")).dim == 4
    json.dumps(made.info)
    snapshots = Snapshots(tmp_path / "run", model(), every=np.int64(1), done=None)
    snapshots()
    assert len(snapshots) == 1


@pytest.mark.parametrize("done", [1.5, "3", True])
def test_steps_made_are_a_whole_number(done, tmp_path):
    with pytest.raises((ValueError, TypeError), match=r"Snapshots: done must be"):
        Snapshots(tmp_path, model(), done=done)


def test_snapshots_of_no_model(tmp_path):
    for wrong in (None, 3, {"w": torch.ones(2)}):
        with pytest.raises(TypeError, match=r"Snapshots: model must be of type Module"):
            Snapshots(tmp_path, wrong)
    with pytest.raises(TypeError, match="Snapshots: expected the path of a file"):
        Snapshots(5, model())


@pytest.mark.parametrize(
    "wrong", [{"blocks": 3}, {"blocks": (3,)}, {"origin": [0.0]}, {"layout": None}, {"info": []}]
)
def test_parts_of_a_subspace(wrong):
    made = random(model(), 2)
    parts = {name: getattr(made, name) for name in ("blocks", "origin", "layout", "info")}
    with pytest.raises(TypeError, match=r"Subspace: .* must be of type"):
        Subspace(**{**parts, **wrong})
    with pytest.raises(TypeError, match=r"coefficients must be of type Tensor"):
        made.lift([0.0, 0.0])
