"""The recorder: what it keeps, when, and in which order."""

from __future__ import annotations

import numpy as np
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


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_trained_may_not_change_along_the_run(frozen, tmp_path):
    model = network()
    model[3].bias.requires_grad_(not frozen)
    snapshots = Snapshots(tmp_path, model)
    snapshots()
    model[3].bias.requires_grad_(frozen)
    with pytest.raises(ValueError, match=r"parameter '3.bias' was frozen or unfrozen along"):
        snapshots()


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


@pytest.mark.parametrize(("made", "done"), [(21, 20), (21, 25), (25, 25), (21, 0), (30, 21)])
def test_a_resumed_run_keeps_its_rhythm(tmp_path, made, done):
    def train(snapshots, steps):
        for _ in range(steps):
            snapshots()
            with torch.no_grad():
                snapshots._model[0].bias += 1

    def seen(folder):
        paths = Snapshots.listed(folder)
        return [float(store.read(path, "snapshot")[0]["0.bias"][0]) for path in paths]

    whole, model = network(), network()
    whole.load_state_dict(model.state_dict())
    train(Snapshots(tmp_path / "whole", whole, every=10), 40)
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint["0.bias"] += done
    train(Snapshots(tmp_path / "part", model, every=10), max(made, done))
    model.load_state_dict(checkpoint)
    train(Snapshots(tmp_path / "part", model, every=10, done=done), 40 - done)
    np.testing.assert_allclose(seen(tmp_path / "part"), seen(tmp_path / "whole"), rtol=1e-6)


def test_a_run_of_which_snapshots_are_missing_is_not_resumed(tmp_path):
    Snapshots(tmp_path, network(), every=10)()
    with pytest.raises(ValueError, match=r"holds 1 snapshots of the first 25 steps; .* would be 3"):
        Snapshots(tmp_path, network(), every=10, done=25)
    with pytest.raises(ValueError, match="done must be at least 0, got -1"):
        Snapshots(tmp_path / "new", network(), done=-1)


def test_bad_arguments(tmp_path):
    for every in (0, 2.5, 62.4, True):
        with pytest.raises(ValueError, match=f"every must be a whole number, .* got {every}"):
            Snapshots(tmp_path, network(), every=every)
    with pytest.raises(ValueError, match="does any require a gradient"):
        Snapshots(tmp_path, torch.nn.Tanh())
    assert Snapshots.listed(tmp_path / "none") == []
