"""Recipes: registry, caching, protocols, what they derive."""

from __future__ import annotations

import json

import pytest
import torch

from stepsmith.cli import main
from stepsmith.evaluate import Key, Records
from stepsmith.evaluate.run import add_meta_training, learned_key
from stepsmith.hub import TrainedRule
from stepsmith.recipes import QUICK, RECIPES, Study, core_hours, recipe, run_recipe, study
from stepsmith.recipes.paper_a import published
from stepsmith.recipes.paper_a.rules import RULES, learned
from stepsmith.rules import make_rule
from stepsmith.store import CheckpointError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_names_and_what_they_need():
    assert list(RECIPES)[:2] == ["a1-quadratic", "a2-mlp"]
    for name, plan in RULES.items():
        assert plan.tasks, name
        assert all("steps" in config for config in plan.stages)
    with pytest.raises(ValueError, match="unknown recipe 'a1-quadratik'"):
        recipe("a1-quadratik")


def test_the_quadratic_quickly_under_both_protocols(cache, tmp_path):
    folder = tmp_path / "a1-quadratic" / "quick"
    options = {"folder": folder, "cache": cache, "command": "stepsmith recipe run a1-quadratic"}
    summary = run_recipe(recipe("a1-quadratic"), QUICK, **options)
    assert {row["protocol"] for row in summary["rows"]} == {"corrected", published.PROTOCOL}
    assert {row["horizon"] for row in summary["rows"]} == {20, 40}
    rows = [row for row in summary["rows"] if row["protocol"] == published.PROTOCOL]
    rates = {row["optimizer"]: row["hyper_parameters"].get("lr") for row in rows}
    published_rates = published.RATES["quadratic"]
    assert {name: rates[name] for name in published_rates} == published_rates
    config = json.loads((folder / "config.json").read_text())
    assert config["core_hours"]["comparisons"] >= 0
    for name in ("quadratic-20.svg", "quadratic-20-as-published.svg", "report.html"):
        assert (folder / name).exists(), name
    with pytest.raises(ValueError, match="earlier run"):
        run_recipe(recipe("a1-quadratic"), QUICK, **options)


def test_rules_are_meta_trained_once(cache, monkeypatch):
    first = learned(Study("one", QUICK, cache), "quadratic")
    monkeypatch.setattr(study, "meta_train", lambda *a, **k: pytest.fail("meta-trained again"))
    again = learned(Study("two", QUICK, cache), "quadratic")
    assert again.fingerprint == first.fingerprint
    assert again.name == "quadratic"
    with pytest.raises(ValueError, match="unknown rule of the recipes"):
        learned(Study("two", QUICK, cache), "mpl-mnist")


def test_the_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as done:
        main(["recipe", "list"])
    assert done.value.code == 0
    assert "a9-price" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["recipe", "run", "a1", "--quick", "--out", str(tmp_path)])
    assert done.value.code == 2
    assert "unknown recipe 'a1'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["recipe", "run", "b1-resnet8", "--hundred", "--out", str(tmp_path)])
    assert done.value.code == 2
    assert "b1-resnet8: has no scale --hundred; it has --small" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "a1-quadratic"])
def test_every_recipe_runs_quickly(name, cache, tmp_path):
    summary = run_recipe(
        recipe(name), QUICK, folder=tmp_path / name, cache=cache, command=f"recipe run {name}"
    )
    assert summary["rows"]


def test_a_rule_that_another_went_on_from_costs_once():
    records = Records()
    rule = make_rule("joined")
    weights = rule.init(torch.Generator().manual_seed(0))
    first = TrainedRule(rule, weights, {"core_seconds": 3600.0})
    grown = {key: 2 * value for key, value in weights.items()}
    told = {"core_seconds": 3600.0, "fingerprint": first.fingerprint}
    between = {"core_seconds": 5400.0, "fingerprint": "of no table", "parent": told}
    last = TrainedRule(rule, grown, {"core_seconds": 7200.0, "parent": between})
    for trained in (last, first):
        add_meta_training(records, learned_key(Key(task="t"), "rule", trained), trained)
    assert core_hours(records)["meta_training"] == 2.0
    other = TrainedRule(rule, {k: 3 * v for k, v in weights.items()},
                        {"core_seconds": 5400.0, "parent": told})  # fmt: skip
    add_meta_training(records, learned_key(Key(task="t"), "other", other), other)
    assert core_hours(records)["meta_training"] == 2.5
    alone = Records()
    add_meta_training(alone, learned_key(Key(task="t"), "rule", last), last)
    assert core_hours(alone)["meta_training"] == 2.0


@pytest.mark.parametrize("command", [["run", "a1-quadratic", "--quick"], ["rule", "quadratic"]])
def test_an_interrupted_recipe_is_told_as_others_are(command, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "meta_train", interrupted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["recipe", *command])
    assert done.value.code == 2
    assert "interrupted; what was saved before is intact" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_ordinary_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["recipe", "run", "a1-quadratic", "--quick", "--device", "cuda"])
    assert done.value.code == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["folder", "cache"])
@pytest.mark.parametrize("place", ["file", "file/sub"])
def test_places_are_tried_before_a_recipe_runs(tmp_path, monkeypatch, wrong, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Study, "meta_train", lambda *a, **k: pytest.fail("began"))
    where = {"folder": tmp_path / "out", "cache": tmp_path / "cache", wrong: tmp_path / place}
    with pytest.raises(CheckpointError, match="is no folder that can be written to"):
        run_recipe(recipe("a1-quadratic"), QUICK, command="c", **where)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_rule_of_the_cache_is_made_again(tmp_path, caplog):
    first = learned(Study("one", QUICK, tmp_path), "quadratic")
    for kept in tmp_path.rglob("rule.safetensors"):
        kept.write_bytes(kept.read_bytes()[:-50])
    again = learned(Study("two", QUICK, tmp_path), "quadratic")
    assert again.fingerprint == first.fingerprint
    assert "meta-training again" in caplog.text
