"""The recorder: what it keeps, when, and in which order."""

from __future__ import annotations

import pytest
import torch
from tests.subspace.runs import network

from stepsmith import store
from stepsmith.subspace import Snapshots


def test_every_so_many_calls_the_first_too(tmp_path):
    model = network()
    snapshots = Snapshots(tmp_path / "run", model, every=4)
    kept = []
    for call in range(10):
        if call % 4 == 0:
            kept.append(model[0].weight.detach().clone())
        snapshots()
        with torch.no_grad():
            model[0].weight.add_(1)
    assert [path.name for path in snapshots.paths()] == [
        f"snapshot-{number:06d}.safetensors" for number in range(3)
    ]
    assert len(snapshots) == 3
    for path, want in zip(snapshots.paths(), kept, strict=True):
        tensors, manifest = store.read(path, "snapshot")
        assert torch.equal(tensors["0.weight"], want)
        assert manifest["parameters"] == [name for name, _ in model.named_parameters()]
        assert manifest["buffers"] == [name for name, _ in model.named_buffers()]


def test_frozen_parameters_are_not_kept(tmp_path):
    model = network()
    model[0].weight.requires_grad_(False)
    tensors, _ = store.read(Snapshots(tmp_path, model).record(), "snapshot")
    assert "0.weight" not in tensors


def test_order_is_that_of_time_past_a_million(tmp_path):
    snapshots = Snapshots(tmp_path, network())
    paths = [snapshots.record()]
    snapshots._number = 999_999
    paths += [snapshots.record(), snapshots.record()]
    (tmp_path / "notes.txt").write_text("mine")
    assert snapshots.paths() == paths == Snapshots.listed(tmp_path)


def test_an_older_run_is_not_mixed_in(tmp_path):
    Snapshots(tmp_path, network()).record()
    with pytest.raises(ValueError, match="holds 1 snapshots already; choose another folder"):
        Snapshots(tmp_path, network())
    Snapshots(tmp_path, network(), resume=True).record()
    assert [path.stem[-1] for path in Snapshots.listed(tmp_path)] == ["0", "1"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Snapshots(tmp_path, network(), every=0)
    with pytest.raises(ValueError, match="does any require a gradient"):
        Snapshots(tmp_path, torch.nn.Tanh())
    assert Snapshots.listed(tmp_path / "none") == []
