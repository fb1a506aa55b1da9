"""The recorder: what it keeps, when, and in which order."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.subspace.runs import network
from torch import nn

from stepsmith import store
from stepsmith.subspace import Snapshots, from_trajectory
from stepsmith.subspace.checkpoints import Checkpoint


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parameters": None}, "'parameters' in its manifest should be a list of names"),
        ({"parameters": "weight"}, "'parameters'"),
        ({"parameters": ["weight", 3]}, "'parameters'"),
        ({"buffers": {"a": 1}}, "'buffers'"),
    ],
)
def test_manifests_of_snapshots_are_typed(tmp_path, change, says):
    model = nn.Linear(3, 1)
    snapshots = Snapshots(tmp_path, model)
    for _ in range(2):
        snapshots()
    path = snapshots.paths()[0]
    tensors, manifest = store.read(path, "snapshot")
    store.write(path, tensors, {**manifest, **change})
    with pytest.raises(store.CheckpointError, match=says):
        from_trajectory(tmp_path, 1)


def test_two_runs_that_record_into_one_folder_are_told(tmp_path):
    first, second = Snapshots(tmp_path, nn.Linear(3, 1)), Snapshots(tmp_path, nn.Linear(3, 1))
    first()
    before = first.paths()[0].read_bytes()
    with pytest.raises(store.CheckpointError, match="another run records into the folder"):
        second()
    assert first.paths()[0].read_bytes() == before
    first()
    assert len(first) == 2


def test_shapes_that_no_tensor_can_have(tmp_path):
    told = json.dumps({"weight": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}})
    paths = [tmp_path / f"{place}.safetensors" for place in range(2)]
    for path in paths:
        path.write_bytes(len(told).to_bytes(8, "little") + told.encode())
    with pytest.raises(store.CheckpointError, match="not a readable safetensors file") as caught:
        Checkpoint(paths[0], "first").tensors(["weight"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["", "a\0b"], ids=["empty", "nul"])
def test_no_folder(folder):
    with pytest.raises(ValueError, match="is no path"):
        Snapshots(folder, nn.Linear(3, 1))
    with pytest.raises(ValueError, match="is no path"):
        from_trajectory(folder, 1)
