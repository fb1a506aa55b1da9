"""Trained rules on disk: nothing but a whole, matching, own file is accepted."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from stepsmith import BUNDLED, LearnedOptimizer, TrainedRule, load, make_rule, save, store
from stepsmith.recipes.paper_a.rules import MANY
from stepsmith.store import CheckpointError


def toy() -> TrainedRule:
    rule = make_rule("rnnprop", hidden=3)
    return TrainedRule(rule, rule.init(), {"name": "toy", "horizon": 7, "tasks": ["quadratic"]})


def test_round_trip(tmp_path):
    trained = toy()
    path = save(trained, tmp_path / "deep" / "toy")
    assert path.name == "toy.safetensors"
    loaded = load(path)
    assert loaded.rule == trained.rule
    assert loaded.horizon == 7
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.manifest["licence"] == "Apache-2.0"
    assert loaded.manifest["version"]
    assert all(torch.equal(loaded.weights[k], trained.weights[k]) for k in trained.weights)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_rules_load_by_name_and_train(name):
    trained = load(name)
    assert trained.name == name
    assert trained.horizon == {"quadratic": 300, "mlp-mnist-1000": 1000}.get(name, 100)
    tasks = list(MANY) if name == "general-warmed" else [name.removesuffix("-1000")]
    assert trained.manifest["tasks"] == tasks
    assert "/" not in trained.manifest["data"]
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], name)
    losses = []
    for _ in range(60):
        loss = param.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_bundled_general_rule_says_that_it_was_changed_after_its_meta_training():
    trained = load("general-warmed")
    assert trained.rule.config()["scaling"] == "warmed"
    assert trained.manifest["changed_afterwards"] == {"scaling": "warmed"}
    assert len(trained.manifest["tasks"]) == 12


def test_a_meta_trainings_folder_is_its_rule(tmp_path):
    trained = toy()
    save(trained, tmp_path / "rule")
    assert load(tmp_path).fingerprint == trained.fingerprint
    with pytest.raises(CheckpointError, match=r"rule\.safetensors: no such file"):
        load(tmp_path.parent)


def write_toy(path) -> bytes:
    save(toy(), path)
    return path.read_bytes()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "toy.safetensors"
    whole = write_toy(path)
    for size in (0, 4, 50, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"toy\.safetensors: not a readable"):
            load(path)
    flipped = bytearray(whole)
    flipped[-2] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(CheckpointError, match="manifest does not match the weights"):
        load(path)
    path.write_bytes(whole)
    load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="written by another program"):
        load(path)
    store.write(path, {"a": torch.ones(2)}, {"kind": "run"})
    with pytest.raises(CheckpointError, match="holds a 'run', not a 'rule'"):
        load(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"no such file|not a readable"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.pop("rule"), "lacks or garbles"),
        (lambda m: m["rule"].update({"class": "LSTMRul"}), "Did you mean 'LSTMRule'"),
        (lambda m: m["rule"]["config"].update(hidden=5), "weights do not fit"),
        (lambda m: m["rule"]["config"].update(hidden="x"), "hidden"),
        (lambda m: m["rule"]["config"].update(width=5), "no field width"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(tmp_path, change, match):
    path = tmp_path / "toy.safetensors"
    write_toy(path)
    tensors, manifest = store.read(path, "rule")
    change(manifest)
    store.write(path, tensors, manifest)
    with pytest.raises(CheckpointError, match=match):
        load(path)


def test_weights_must_fit_the_rule():
    trained = toy()
    wrong = {**trained.weights, "spare": torch.ones(1)}
    with pytest.raises(CheckpointError, match="'spare' should have shape None"):
        TrainedRule(trained.rule, wrong)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "toy.safetensors"
    old = write_toy(path)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*untouched"):
        save(toy(), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["toy.safetensors"]


def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    """The process dies between writing and renaming: what was saved before still loads."""
    path = tmp_path / "toy.safetensors"
    old = write_toy(path)
    child = os.fork()
    if child == 0:  # pragma: no cover - the child never returns
        os.replace = lambda *args: os._exit(9)
        save(toy(), path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == old
    load(path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(toy(), tmp_path / "file" / "toy.safetensors")


def test_saved_files_are_readable_by_others(tmp_path):
    path = tmp_path / "toy.safetensors"
    write_toy(path)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_manifest_is_json_in_the_file(tmp_path):
    path = tmp_path / "toy.safetensors"
    raw = write_toy(path)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["stepsmith"])["kind"] == "rule"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda w: w.fill_(float("nan")), "is nan or infinite"),
        (lambda w: w.to(torch.int64), "is torch.int64"),
    ],
)
def test_weights_must_be_finite_floating_point_numbers(tmp_path, spoil, match):
    trained = toy()
    key = min(trained.weights)
    weights = {**trained.weights, key: spoil(trained.weights[key].clone())}
    with pytest.raises(CheckpointError, match=match):
        TrainedRule(trained.rule, weights)


def test_a_manifest_must_be_plain_json(tmp_path):
    trained = toy()
    odd = TrainedRule(trained.rule, trained.weights, {"score": torch.ones(1)})
    with pytest.raises(TypeError, match="plain JSON values"):
        odd.save(tmp_path / "odd.safetensors")
    assert not list(tmp_path.iterdir())
