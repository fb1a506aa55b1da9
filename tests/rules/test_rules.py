"""Rules by name, and rebuilt from their configuration."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch

from stepsmith import LearnedOptimizer, TrainedRule, load, make_rule, register, save
from stepsmith.rules import CLASSIC, LEARNED, LSTMRule, Rule, rule_from_config
from stepsmith.rules.base import statistics_dtype
from stepsmith.store import CheckpointError


@pytest.mark.parametrize("name", LEARNED | CLASSIC)
def test_every_rule_is_rebuilt_from_json(name):
    rule = make_rule(name)
    config = json.loads(json.dumps(rule.config()))
    assert rule_from_config(type(rule).__name__, config) == rule
    assert rule.learned == (name in LEARNED)


@pytest.mark.parametrize("name", LEARNED | CLASSIC)
def test_rules_are_frozen(name):
    rule = make_rule(name)
    field = dataclasses.fields(rule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, field, 3)


@pytest.mark.parametrize("name", LEARNED)
def test_fresh_weights_come_from_the_generator_alone(name):
    rule = make_rule(name)
    state = torch.random.get_rng_state()
    one, two, other = (rule.init(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert all(value.dtype == torch.float32 for value in one.values())


def test_statistics_are_float64_where_the_parameter_is():
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [statistics_dtype(kind) for kind in kinds] == [torch.float64] + 3 * [torch.float32]


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("LSTMRul", {}, "Did you mean 'LSTMRule'"),
        ("LSTMRule", {"colour": 3}, "no field colour"),
        ("LSTMRule", {"step_scale": "wide"}, "rule class 'LSTMRule'"),
        ("LSTMRule", {"hidden": True}, "hidden must be a whole number"),
        ("SGD", {"lr": None}, "rule class 'SGD'"),
    ],
)
def test_configurations_that_do_not_fit(name, config, match):
    with pytest.raises(ValueError, match=match):
        rule_from_config(name, config)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("adm", {}, r"known: adagrad, adam, .*Did you mean 'adam'"),
        ("zzzzzz", {}, "unknown rule 'zzzzzz'; known: [^?]*$"),
        ("adam", {"amsgrad": True}, "rule 'adam': .*amsgrad"),
        ("sgd", {"lr": "fast"}, "rule 'sgd'"),
    ],
)
def test_names_and_arguments_that_are_unknown(name, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_rule(name, **arguments)


class Half(LSTMRule):
    """A user's rule: half the step."""

    def step(self, output_ON, scale_N):
        return super().step(output_ON, scale_N) / 2


def test_a_registered_rule_is_saved_loaded_and_deployed(tmp_path, monkeypatch):
    from stepsmith import rules

    monkeypatch.setattr(rules, "_CLASSES", dict(rules._CLASSES))
    rule = Half(hidden=3)
    path = save(TrainedRule(rule, rule.init()), tmp_path / "half")
    with pytest.raises(CheckpointError, match="unknown rule class 'Half'"):
        load(path)
    assert register(Half) is Half
    assert register(Half) is Half  # a module may be imported twice
    loaded = load(path)
    assert type(loaded.rule) is Half
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    LearnedOptimizer([param], loaded).step()
    assert not torch.equal(param.detach(), torch.ones(3))


def test_two_classes_of_one_name_are_refused():
    twin = dataclass(frozen=True)(type("LSTMRule", (Rule,), {}))
    with pytest.raises(ValueError, match="named 'LSTMRule' is registered already"):
        register(twin)
