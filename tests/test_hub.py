"""Trained rules on disk: nothing but a whole, matching, own file is accepted."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepsmith import BUNDLED, LearnedOptimizer, TrainedRule, load, make_rule, save, store
from stepsmith.hub import PARENTS
from stepsmith.recipes.paper_a.rules import MANY
from stepsmith.rules import LSTMRule, Rule
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


def saved_as(path, tensors=None, *, rule=None, **fields):
    """A rule's file with other fields in its manifest than were saved."""
    write_toy(path)
    held, manifest = store.read(path, "rule")
    if rule is not None:
        manifest["rule"]["config"] |= rule
    store.write(path, held if tensors is None else tensors, {**manifest, **fields})
    return path


@pytest.mark.parametrize(
    "config",
    [{"hidden": 16_000}, {"hidden": 2**62}, {"hidden": 10**30}, {"layers": 10**9},
     {"layers": 10**300}],
    ids=str,
)  # fmt: skip
def test_sizes_are_held_against_the_file_before_anything_is_made(tmp_path, config, monkeypatch):
    path = saved_as(tmp_path / "toy.safetensors", rule=config)
    monkeypatch.setattr(torch, "rand", lambda *args, **options: pytest.fail("drawn"))
    with pytest.raises(CheckpointError, match=r"weights do not fit LSTMRule|must be at most"):
        load(path)


def test_a_users_rule_is_measured_without_its_weights():
    @dataclass(frozen=True)
    class Wide(LSTMRule):
        def init(self, generator=None):
            drawn = torch.rand(2**40, self.hidden, generator=generator)
            assert drawn.is_meta
            return {"wide": drawn}

        shapes = Rule.shapes

    with pytest.raises(CheckpointError, match="'wide' should have shape"):
        TrainedRule(Wide(), {"wide": torch.ones(2, 2)})


def test_a_users_rule_that_cannot_be_measured_so_makes_its_weights():
    @dataclass(frozen=True)
    class Counted(LSTMRule):
        def init(self, generator=None):
            assert generator is not None
            return {"counted": torch.ones(int(torch.rand(1, generator=generator).item()) + 2)}

        shapes = Rule.shapes

    TrainedRule(Counted(), {"counted": torch.ones(2)})
    with pytest.raises(CheckpointError, match="'counted' should have shape"):
        TrainedRule(Counted(), {"counted": torch.ones(3)})


@pytest.mark.parametrize(
    "rule", [LSTMRule(), LSTMRule(3, 4, "raw"), LSTMRule(bias=False), make_rule("adam")], ids=str
)
def test_shapes_are_those_of_the_weights(rule):
    want = {name: tuple(value.shape) for name, value in rule.init().items()}
    assert list(rule.shapes()) == list(want.items())
    assert list(Rule.shapes(rule)) == list(want.items())


def deep(levels: int) -> dict:
    told: dict = {"fingerprint": "f"}
    for _ in range(levels - 1):
        told = {"fingerprint": "f", "parent": told}
    return told


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"horizon": "100"}, "manifest.horizon should be a whole number >= 1, is '100'"),
        ({"horizon": 0}, "horizon"),
        ({"horizon": 1.5}, "horizon"),
        ({"horizon": True}, "horizon"),
        ({"horizon": None}, "horizon"),
        ({"horizon": 10**40}, "horizon"),
        ({"name": 3}, "manifest.name should be a text, is 3"),
        ({"name": ["a"]}, "name"),
        ({"name": "half \ud800"}, "name"),
        ({"tasks": "mlp"}, "manifest.tasks should be a list, is 'mlp'"),
        ({"tasks": ["mlp", 3]}, r"tasks\[1\] should be a text, is 3"),
        ({"tasks": {"mlp": 1}}, "tasks"),
        ({"seconds": "1"}, "manifest.seconds should be a finite number >= 0, is '1'"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"core_seconds": float("inf")}, "core_seconds"),
        ({"inner_steps": 1.0}, "inner_steps"),
        ({"parameters": [1, "2"]}, r"parameters\[1\]"),
        ({"meta_training": []}, "meta_training should be a mapping"),
        ({"meta_training": {"loss": {"a": 1}}}, "meta_training.loss"),
        ({"meta_training": {"validation_split": 3}}, "meta_training.validation_split"),
        ({"validation": 3.0}, "validation should be a mapping"),
        ({"validation": {"score": "low"}}, "validation.score"),
        ({"validations": {"a": 1}}, "validations should be a list"),
        ({"validations": [{"score": 1.0}]}, r"validations\[0\] lacks 'inner_steps'"),
        ({"validations": [{"score": None, "inner_steps": 1}]}, r"validations\[0\].score"),
        ({"curriculum": [3]}, r"curriculum\[0\] should be a mapping"),
        ({"curriculum": [{"horizon": 5, "inner_steps": 3}]}, "lacks 'ended'"),
        ({"curriculum": [{"horizon": "5", "inner_steps": 3, "ended": ""}]}, "horizon"),
        ({"machine": "big"}, "machine should be a mapping"),
        ({"machine": {"processor": ["a"]}}, "machine.processor"),
        ({"data": 3}, "data"),
        ({"licence": None}, "licence"),
        ({"version": 1}, "version"),
        ({"torch": 2}, "torch"),
        ({"changed_afterwards": []}, "changed_afterwards"),
        ({"trust": 0.5}, "manifest.trust should be a mapping"),
        ({"trust": {"far": "1"}}, "manifest.trust.far should be a finite number, is '1'"),
        ({"trust": {"far": float("inf")}}, "manifest.trust.far"),
        ({"parent": None}, "parent should be a mapping"),
        ({"parent": {"name": "a"}}, "parent lacks 'fingerprint'"),
        ({"parent": {"fingerprint": "f", "horizon": -1}}, "manifest.parent.horizon"),
        ({"parent": deep(PARENTS + 1)}, "more than 256 parents"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_manifests_are_typed(tmp_path, fields, says):
    path = saved_as(tmp_path / "toy.safetensors", **fields)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    trained = toy()
    with pytest.raises(CheckpointError, match=says):
        TrainedRule(trained.rule, trained.weights, fields)


def test_what_later_versions_say_is_kept(tmp_path):
    told = {"later": {"deep": [1, None, "x"]}, "parent": deep(PARENTS)}
    loaded = load(saved_as(tmp_path / "toy.safetensors", **told))
    assert {key: loaded.manifest[key] for key in told} == told


def test_scores_of_runs_that_diverged_are_numbers(tmp_path):
    scores = [float("inf"), float("nan"), 1e300, 3]
    told = [{"inner_steps": 1, "score": score} for score in scores]
    loaded = load(saved_as(tmp_path / "toy.safetensors", validations=told))
    assert [point["score"] for point in loaded.manifest["validations"]][2:] == scores[2:]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "results").rglob("rule.safetensors")),
    ids=lambda path: path.parent.name,
)  # fmt: skip
def test_rules_of_the_results_load(path):
    load(path)


def test_a_longer_manifest_is_a_documented_limit(tmp_path, monkeypatch):
    path = saved_as(tmp_path / "toy.safetensors", notes="x" * 2000)
    load(path)
    monkeypatch.setattr(store, "LONGEST_MANIFEST", 1000)
    with pytest.raises(CheckpointError, match="LONGEST_MANIFEST"):
        load(path)


def test_what_is_saved_to_a_folder_is_loaded_of_it(tmp_path):
    assert save(toy(), tmp_path) == tmp_path / "rule.safetensors"
    assert load(tmp_path).name == "toy"
    assert [path.name for path in tmp_path.iterdir()] == ["rule.safetensors"]


def test_what_is_saved_without_a_suffix_is_loaded_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own", "deep/own", "./dot"):
        save(toy(), name)
        assert load(name).name == "toy"


@pytest.mark.parametrize("give", [load, lambda path: save(toy(), path), LearnedOptimizer])
@pytest.mark.parametrize("path", ["", "a\0b"], ids=["empty", "nul"])
def test_no_path_is_an_error(tmp_path, monkeypatch, give, path):
    monkeypatch.chdir(tmp_path)
    save(toy(), ".")
    with pytest.raises(ValueError, match="is no path"):
        give(path) if give is not LearnedOptimizer else give([torch.zeros(1)], path)
    assert [path.name for path in tmp_path.iterdir()] == ["rule.safetensors"]


def test_what_is_no_path_at_all():
    for wrong in (3, None, b"toy"):
        with pytest.raises(TypeError, match="expected the path of a file"):
            load(wrong)


def test_bundled_names_where_something_of_the_name_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mlp-mnist.safetensors", "general-warmed/rule.safetensors"):
        save(toy(), name)
    assert load("mlp-mnist").name == "mlp-mnist"
    assert load("general-warmed").name == "general-warmed"
    (tmp_path / "mlp-mnist.safetensors").rename(tmp_path / "mlp-mnist")
    assert load("mlp-mnist").name == "toy"
    assert load("./general-warmed").name == "toy"


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors"])
def test_pipes_do_not_wait(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="it is a pipe"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bias": "false"}, "bias must be true or false"),
        ({"start": "0"}, "start must be a number"),
        ({"step_scale": True}, "step_scale must be a number"),
        ({"inputs": ["raw"]}, "inputs must be a text"),
        ({"hidden": 3.0}, "hidden must be a whole number"),
        ({"a\nb\x1b": 1}, r"no field a\\nb\\x1b"),
    ],
)
def test_fields_of_a_rule_are_typed(tmp_path, config, says):
    path = saved_as(tmp_path / "toy.safetensors", rule=config)
    with pytest.raises(CheckpointError, match=says):
        load(path)


@pytest.mark.parametrize(
    "described",
    [None, [], "LSTMRule", {"class": [], "config": {}}, {"class": "LSTMRule", "config": []},
     {"class": "LSTMRule", "config": "ab"}, {"class": {}, "config": None}],
    ids=str,
)  # fmt: skip
def test_descriptions_that_are_none(tmp_path, described):
    path = saved_as(tmp_path / "toy.safetensors")
    tensors, manifest = store.read(path, "rule")
    store.write(path, tensors, {**manifest, "rule": described})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
