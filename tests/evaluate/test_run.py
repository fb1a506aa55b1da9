"""Tuning and comparing, on quadratics and a tiny network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepsmith.evaluate import BASELINES, Baseline, Key, Records, evaluate, transfer
from stepsmith.evaluate.schedules import Schedule, Scheduled
from stepsmith.evaluate.tuning import WIDEST, tune, tuned_from
from stepsmith.hub import TrainedRule
from stepsmith.rules import make_rule
from stepsmith.tasks import Quadratic

FEW = {"steps": 20, "seeds": 4, "tuning_seeds": 2, "timing_rounds": 2}


def fresh(name: str = "fresh") -> TrainedRule:
    rule = make_rule("joined")
    manifest = {"name": name, "tasks": ["quadratic"], "seconds": 2.0, "core_seconds": 3.5,
                "validations": [{"inner_steps": 0, "seconds": 0.0, "score": 3.0}]}  # fmt: skip
    return TrainedRule(rule, rule.init(torch.Generator().manual_seed(0)), manifest)


def bowl(best: float):
    """Losses (2, 10) of a pretend optimizer whose best rate is `best`."""
    return lambda entry, rate: np.full((2, 10), 1 + np.log(rate / best) ** 2)


@pytest.mark.parametrize("best", [0.1, 3.0, 1e-4])
def test_the_grid_widens_while_its_edge_wins(best):
    entry = Baseline("toy", torch.optim.SGD, 0.1)
    records = Records()
    tuned = tune(entry, bowl(best), records, Key(task="t", horizon=10), [0, 1])
    for rate in tuned.rates.values():
        assert abs(np.log2(rate / best)) <= 0.5 + 1e-9
        assert min(tuned.tried) < rate < max(tuned.tried)
    assert len(tuned.tried) >= 9
    assert tuned.at_edge == ()
    assert len(list(records.select("train_loss", purpose="tuning"))) == len(tuned.tried)


def test_a_grid_that_never_stops_winning_at_its_edge_says_so():
    entry = Baseline("toy", torch.optim.SGD, 0.1)
    tuned = tune(entry, bowl(1e9), Records(), Key(horizon=10), [0, 1])
    assert len(tuned.tried) == WIDEST
    assert tuned.at_edge == ("mean", "final")


def test_each_criterion_has_its_own_rate():
    def run(entry, rate):
        losses = np.ones((2, 10))
        losses[:, :9] += np.log(rate / 0.4) ** 2
        losses[:, 9:] += np.log(rate / 0.05) ** 2
        return losses

    tuned = tune(Baseline("toy", torch.optim.SGD, 0.1), run, Records(), Key(horizon=10), [0, 1])
    assert tuned.rates == {"mean": pytest.approx(0.4), "final": pytest.approx(0.05)}


@pytest.mark.parametrize("best", [0.8, 0.8 * 64, 0.8 / 16])
def test_a_rate_known_to_be_good_takes_fewer_tries(best):
    entry = Baseline("toy", torch.optim.SGD, 0.1)
    tuned = tune(entry, bowl(best), Records(), Key(horizon=10), [0, 1], around=0.8)
    assert tuned.rates == {"mean": pytest.approx(best), "final": pytest.approx(best)}
    assert len(tuned.tried) == 3 + round(abs(np.log2(best / 0.8)))
    assert tuned.at_edge == ()


def test_evaluate_tunes_around_given_rates():
    result = evaluate(Quadratic(3), [], ["adam", "nag"], tune_around={"adam": 0.1}, **FEW)
    assert 0.1 in result.tuned["adam"].tried
    assert len(result.tuned["adam"].tried) < 9 <= len(result.tuned["nag"].tried)


def test_what_was_tuned_is_told_from_records_alone():
    result = evaluate(Quadratic(3), [], ["adam", "sgd"], **FEW)
    for name, tuned in result.tuned.items():
        assert tuned_from(BASELINES[name], result.records) == tuned


def test_tuning_needs_nine_rates():
    with pytest.raises(ValueError, match="points >= 9"):
        tune(Baseline("t", torch.optim.SGD, 1.0), bowl(1), Records(), Key(), [0], points=5)
    with pytest.raises(ValueError, match="rates must be > 0"):
        Baseline("t", torch.optim.SGD, -1.0)


def test_evaluate_compares_rules_and_baselines(tiny_task):
    result = evaluate(tiny_task, {"mine": fresh()}, ["adam", "nag"], **FEW)
    rows = result.rows()
    metrics = {row["metric"] for row in rows if row["optimizer"] == "mine"}
    assert {"mean_train_loss", "final_train_loss", "test_loss", "test_accuracy",
            "steps_to_baseline", "seconds_to_baseline", "seconds_per_step"} == metrics  # fmt: skip
    assert {row["optimizer"] for row in rows} == {"mine", "adam", "nag"}
    tuning = {int(s) for b in result.records.select(purpose="tuning") for s in b.seeds}
    test = {int(s) for b in result.records.select("train_loss", purpose="test") for s in b.seeds}
    assert test == {0, 1, 2, 3}
    assert not tuning & test
    assert next(result.records.select("meta_training_seconds")).values.item() == 2.0
    assert next(result.records.select("meta_training_core_seconds")).values.item() == 3.5
    for name in ("mine", "adam", "nag"):
        whole, gradient, core = (
            next(result.records.select(metric, purpose="cost", optimizer=name)).values
            for metric in ("seconds_per_step", "gradient_seconds", "core_seconds_per_step")
        )
        assert (whole > gradient).all()
        assert (gradient > 0).all()
        assert (core > 0).all()


def test_all_optimizers_start_from_the_same_losses(tiny_task):
    result = evaluate(tiny_task, {"mine": fresh()}, ["adam"], **FEW)
    firsts = [b.values[:, 0] for b in result.records.select("train_loss", purpose="test")]
    assert len(firsts) >= 2
    for first in firsts[1:]:
        np.testing.assert_array_equal(first, firsts[0])


def test_a_classic_rule_equals_the_optimizer_it_copies():
    rules = {"as rule": make_rule("adam", lr=0.05)}
    result = evaluate(
        Quadratic(4, dtype=torch.float64), rules, [],
        optimizers={"torch": lambda p: torch.optim.Adam(p, lr=0.05)}, **FEW,
    )  # fmt: skip
    one, two = (b.values for b in result.records.select("train_loss", purpose="test"))
    np.testing.assert_allclose(one, two, rtol=1e-10)


def test_a_diverging_optimizer_is_counted():
    result = evaluate(
        Quadratic(4), [], [], optimizers={"wild": lambda p: torch.optim.SGD(p, lr=50.0)}, **FEW
    )
    assert {row["diverged"] for row in result.rows()} == {4}


def test_every_baseline_runs():
    result = evaluate(Quadratic(3), [], list(BASELINES), **FEW)
    assert set(result.tuned) == set(BASELINES)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"tuning_seeds": -1}, "tuning_seeds"),
        ({"points": 3}, "points must be at least 9"),
        ({"timing_rounds": -1}, "timing_rounds"),
        ({"tune_around": {"adam": 0.0}}, r"tune_around\['adam'\] must be > 0"),
        ({"tune_around": {"adm": 0.1}}, "Did you mean 'adam'"),
    ],
)
def test_bad_settings(bad, match):
    with pytest.raises(ValueError, match=match):
        evaluate(Quadratic(3), [], ["adam"], **bad)


def test_one_rule_and_one_baseline_need_no_list():
    few = {"steps": 5, "seeds": 2, "tuning_seeds": 1, "timing_rounds": 0}
    result = evaluate(Quadratic(3), "quadratic", "adam", **few)
    assert {row["optimizer"] for row in result.rows()} == {"learned (quadratic)", "adam"}
    result = transfer(fresh(), Quadratic(3), "sgd", **few)
    assert len({row["optimizer"] for row in result.rows()}) == 2


def test_nothing_to_compare_and_unknown_names():
    with pytest.raises(ValueError, match="nothing to compare"):
        evaluate(Quadratic(3), [], [])
    with pytest.raises(ValueError, match="Did you mean 'adam'"):
        evaluate(Quadratic(3), [], ["adm"])
    with pytest.raises(ValueError, match="unknown bundled rule"):
        evaluate(Quadratic(3), ["mlp-mnits"], ["adam"])


class Below(Quadratic):
    """Its loss begins at a constant below zero."""

    def loss(self, params, buffers, batch, generator, train):
        value, new, metrics = super().loss(params, buffers, batch, generator, train)
        return value - value.detach() - 1, new, metrics


def test_losses_below_zero_are_refused():
    with pytest.raises(ValueError, match=r"initial loss of -1; .* add a constant"):
        evaluate(Below(3), [], ["adam"], **FEW)


def test_losses_that_are_not_finite_at_the_start_are_refused(tiny_task):
    tiny_task.data.train[0][:] = float("nan")
    with pytest.raises(ValueError, match=r"initial loss of nan; .* not finite"):
        evaluate(tiny_task, [], ["adam"], **FEW)


def test_schedules_and_fixed_rates_are_refused():
    cosine = Scheduled("mine", torch.optim.SGD, 0.1, {}, Schedule("cosine"))
    with pytest.raises(ValueError, match="'mine' has a schedule"):
        evaluate(Quadratic(3), [], [cosine], **FEW)
    with pytest.raises(ValueError, match="lr is tuned around `centre`"):
        Baseline("mine", torch.optim.SGD, 0.1, {"lr": 0.1})


def test_what_a_step_costs_is_recorded_under_its_optimizers_key():
    found = evaluate(Quadratic(3), {"mine": fresh()}, ["adam"], **{**FEW, "timing_rounds": 1})
    kinds = {b.key.optimizer: b.key.kind for b in found.records.select("seconds_per_step")}
    assert kinds == {"mine": "learned", "adam": "baseline"}
    (cost,) = found.records.select("seconds_per_step", optimizer="mine")
    (losses,) = found.records.select("train_loss", optimizer="mine")
    assert (cost.key.rule, cost.key.checkpoint) == (losses.key.rule, losses.key.checkpoint)


def test_two_optimizers_of_one_name_are_refused():
    given = {"adam": torch.optim.Adam}
    with pytest.raises(ValueError, match="two optimizers are called 'adam'"):
        evaluate(Quadratic(3), [], ["adam"], optimizers=given, **FEW)


def test_what_is_taken_as_it_is_was_not_tuned():
    given = {"given": torch.optim.Adam}
    found = evaluate(Quadratic(3), {"adam": make_rule("adam")}, [], optimizers=given, **FEW)
    assert {row["tuned_for"] for row in found.rows()} == {""}
