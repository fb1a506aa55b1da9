"""Contests over epochs: scheduled, tuned by halving, tested every epoch, cached."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import make_tiny_task
from tests.evaluate.test_run import fresh

from stepsmith.evaluate import Key, Records, epochs, summarise
from stepsmith.evaluate.epochs import Contest, Length, joined, train_epochs
from stepsmith.evaluate.halving import Rung
from stepsmith.evaluate.schedules import Schedule, Scheduled
from stepsmith.unroll import TorchStepper

MOMENTUM = Scheduled(
    "momentum", torch.optim.SGD, 0.25, {"momentum": 0.9}, Schedule("steps", (0.5, 0.75))
)


def contest(**changes) -> Contest:
    options = {
        "name": "tiny", "length": Length(3, 8), "seeds": [0, 1], "records": Records(),
        "key": Key(recipe="r", scale="quick"), "rungs": (Rung(0.25, 3), Rung(1.0, 2)),
    }  # fmt: skip
    return Contest(**{**options, **changes})


def test_epochs_are_one_training(tiny_task):
    def make(group):
        return TorchStepper(lambda p: torch.optim.SGD(p, lr=0.1), group.theta, group.layout)

    whole, at_end = train_epochs(tiny_task, make, [3, 4], Length(1, 12))
    parts, tests = train_epochs(tiny_task, make, [3, 4], Length(3, 4))
    np.testing.assert_allclose(parts, whole)
    assert tests["accuracy"].shape == (2, 3)
    np.testing.assert_allclose(tests["loss"][:, -1:], at_end["loss"])


def test_tests_are_spread_over_the_epochs(tiny_task):
    def make(group):
        return TorchStepper(lambda p: torch.optim.SGD(p, lr=0.1), group.theta, group.layout)

    length = Length(2, 7, tests=3)
    assert length.ends == [2, 5, 7, 9, 12, 14]
    losses, tests = train_epochs(tiny_task, make, [3], length)
    whole, at_end = train_epochs(tiny_task, make, [3], Length(1, 14))
    np.testing.assert_allclose(losses, whole)
    assert tests["loss"].shape == (1, 6)
    np.testing.assert_allclose(tests["loss"][:, -1:], at_end["loss"])
    with pytest.raises(ValueError, match="no more tests than steps"):
        Length(2, 7, tests=8)


def test_each_seed_may_have_a_task_of_its_own(tiny_task, tmp_path):
    other = make_tiny_task(batch_size=5)
    held = contest(cache=tmp_path)
    held.baseline("momentum", [tiny_task, other], MOMENTUM, rate=0.1)
    (both,) = held.records.select("train_loss", purpose="test")
    assert list(both.seeds) == [0, 1]
    for place, task in enumerate((tiny_task, other)):
        alone = contest(seeds=[place])
        alone.baseline("momentum", task, MOMENTUM, rate=0.1)
        (own,) = alone.records.select("train_loss", purpose="test")
        np.testing.assert_array_equal(both.values[place], own.values[0])
    with pytest.raises(ValueError, match="one for each of 3 seeds"):
        contest(seeds=[0, 1, 2]).baseline("momentum", [tiny_task, other], MOMENTUM)
    with pytest.raises(ValueError, match="got 0"):
        contest().rule("mine", [], fresh())


def test_an_interrupted_test_keeps_the_seeds_that_were_done(tmp_path, tiny_task, monkeypatch):
    whole = contest()
    whole.baseline("momentum", tiny_task, MOMENTUM, rate=0.1)
    trained, calls = epochs.train_epochs, []

    def once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(*arguments, **options)

    monkeypatch.setattr(epochs, "train_epochs", once)
    with pytest.raises(KeyboardInterrupt):
        contest(cache=tmp_path).baseline("momentum", tiny_task, MOMENTUM, rate=0.1)
    again = contest(cache=tmp_path)
    again.baseline("momentum", tiny_task, MOMENTUM, rate=0.1)
    assert len(calls) == 3
    (one,), (two,) = (
        list(held.records.select("train_loss", purpose="test")) for held in (whole, again)
    )
    np.testing.assert_allclose(one.values, two.values)


def test_a_contest_tunes_tests_and_summarises(tiny_task):
    held = contest(timing_rounds=1)
    rate = held.baseline("momentum", tiny_task, MOMENTUM)
    held.rule("mine", tiny_task, fresh(), meta_task="tiny", meta_subspace=5.0)
    held.time_steps()
    held.add_subspace_seconds(7.0, ["mine"])
    found = held.tuned["momentum"]
    assert rate == found.rate
    last = {r: value for (r, share), value in found.scores.items() if share == 1.0}
    assert rate == min(last, key=last.__getitem__)
    (block,) = held.records.select("test_accuracy", purpose="test", optimizer="momentum")
    assert block.values.shape == (2, 3)
    assert list(block.steps) == [8, 16, 24]
    rows = {(row["optimizer"], row["metric"]): row for row in summarise(held.records)}
    accuracy = rows["momentum", "test_accuracy"]["mean"]
    assert accuracy == pytest.approx(block.values[:, -1].mean())
    assert rows["mine", "final_train_loss"]["against"] == "momentum"
    assert rows["mine", "seconds_per_step"]["mean"] > 0
    assert rows["momentum", "mean_train_loss"]["tuned_for"] == "final"
    assert rows["mine", "mean_train_loss"]["against"] == "momentum"
    assert rows["mine", "mean_train_loss"]["meta_task"] == "tiny"
    (before,) = held.records.select("subspace_seconds", optimizer="mine")
    assert before.values.item() == 7.0
    (meta,) = held.records.select("meta_training_subspace_seconds", optimizer="mine")
    assert (meta.values.item(), meta.key.purpose) == (5.0, "meta")


def test_a_rule_under_a_schedule_is_kept_apart_and_then_stands_still(tmp_path, tiny_task):
    held, rule = contest(cache=tmp_path), fresh()
    held.rule("mine", tiny_task, rule)
    held.rule("mine, to half", tiny_task, rule, schedule=Schedule("cosine", (0.5,)))
    (plain,) = held.records.select("test_loss", purpose="test", optimizer="mine")
    (quiet,) = held.records.select("test_loss", purpose="test", optimizer="mine, to half")
    assert np.all(np.diff(plain.values[:, 1:]) != 0)  # after two and three epochs
    assert np.all(np.diff(quiet.values[:, 1:]) == 0)  # nothing moves from the middle on
    assert np.all(plain.values[:, 0] != quiet.values[:, 0])


def test_the_second_time_nothing_is_trained(tmp_path, tiny_task, monkeypatch):
    first = contest(cache=tmp_path)
    rates = [first.baseline("momentum", tiny_task, MOMENTUM)]
    first.rule("mine", tiny_task, fresh())
    monkeypatch.setattr(epochs, "train_epochs", lambda *a, **k: pytest.fail("trained again"))
    again = contest(cache=tmp_path, name="of another name")
    rates.append(again.baseline("momentum", tiny_task, MOMENTUM))
    again.rule("mine", tiny_task, fresh())
    assert rates[0] == rates[1]
    assert again.tuned == first.tuned
    assert {block.key.task for block in again.records.blocks} == {"of another name"}
    rows = [
        [{**row, "task": ""} for row in summarise(held.records)] for held in (first, again)
    ]  # fmt: skip
    assert rows[0] == rows[1]


def test_a_tuning_that_was_interrupted_keeps_what_was_tried(tmp_path, tiny_task, monkeypatch):
    want = contest().baseline("momentum", tiny_task, MOMENTUM)
    trained, calls = epochs.train_epochs, []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return trained(*arguments, **options)

    monkeypatch.setattr(epochs, "train_epochs", counted)
    with pytest.raises(KeyboardInterrupt):
        contest(cache=tmp_path).baseline("momentum", tiny_task, MOMENTUM)
    before = len(calls)
    assert contest(cache=tmp_path).baseline("momentum", tiny_task, MOMENTUM) == want
    total = len(calls) - before
    calls.clear()
    calls.extend([()] * 100)
    contest(cache=tmp_path / "other").baseline("momentum", tiny_task, MOMENTUM)
    assert len(calls) - 100 == total + 3


@pytest.mark.parametrize(
    "changes",
    [
        {"length": Length(2, 12)}, {"seeds": [0, 2]}, {"rungs": (Rung(0.5, 3), Rung(1.0, 1))},
        {"key": Key(recipe="r", scale="quick", protocol="other")},
        {"length": Length(3, 8, tests=2)},
    ],
)  # fmt: skip
def test_whatever_decides_the_numbers_misses(changes, tmp_path, tiny_task, monkeypatch):
    contest(cache=tmp_path).baseline("momentum", tiny_task, MOMENTUM)
    monkeypatch.setattr(epochs, "train_epochs", lambda *a, **k: pytest.fail("trained again"))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        contest(cache=tmp_path, **changes).baseline("momentum", tiny_task, MOMENTUM)


def test_each_schedule_has_runs_of_its_own(tmp_path, tiny_task):
    held, rule = contest(cache=tmp_path), fresh()
    for drop in (0.3, 0.6):
        schedule = Schedule("cosine", (drop,))
        held.rule(f"mine, {drop}", tiny_task, rule, schedule=schedule)
        entry = Scheduled("sgd", torch.optim.SGD, 0.1, {}, schedule)
        held.baseline(f"sgd, {drop}", tiny_task, entry, rate=0.1)
    ends = {
        block.key.optimizer: tuple(block.values[:, -1])
        for block in held.records.select("train_loss", purpose="test")
    }
    assert len(set(ends.values())) == 4


def test_tuning_draws_the_schedule_together_on_a_seed_and_the_first_task(tiny_task, monkeypatch):
    rates, tasks = [], []

    def sgd(params, lr):
        made = torch.optim.SGD(params, lr)
        made.register_step_pre_hook(lambda own, *_: rates[-1].append(own.param_groups[0]["lr"]))
        return made

    def watched(task, make, seeds, length, **options):
        rates.append([])
        tasks.append(task)
        return train_epochs(task, make, seeds, length, **options)

    monkeypatch.setattr(epochs, "train_epochs", watched)
    held = contest()
    other = make_tiny_task(batch_size=5)
    held.baseline("watched", [tiny_task, other], Scheduled("sgd", sgd, 0.1, {}, Schedule("cosine")))
    tuned = list(held.records.select("final_loss", purpose="tuning"))
    assert {tuple(block.seeds) for block in tuned} == {(epochs.TUNING_SEED,)}
    assert set(tasks[: len(tuned)]) == {tiny_task}
    assert {len(seen) for seen in rates[: len(tuned)]} == {6, 24}
    for seen in rates[: len(tuned)]:  # the last step's rate is that of the last share
        assert seen[-1] / seen[0] == pytest.approx(Schedule("cosine").at(1 - 1 / len(seen)))


def test_steps_are_timed_where_they_were_made(tiny_task, monkeypatch):
    other, given = make_tiny_task(batch_size=5), {}
    monkeypatch.setattr(
        epochs.cost, "seconds_in_turn", lambda timed, rounds: given.update(timed) or {}
    )
    held = contest(timing_rounds=1)
    held.baseline("one", tiny_task, MOMENTUM, rate=0.1)
    held.rule("two", other, fresh())
    held.time_steps()
    assert {label: task for label, (task, _) in given.items()} == {"one": tiny_task, "two": other}


def test_what_parts_took_is_summed():
    key = Key(optimizer="x", purpose="test")
    parts = []
    for seed in (3, 4):
        part = Records()
        part.add(key, "train_loss", [[seed, 1.0]], seeds=[seed], steps=[0, 1])
        spent = replace(key, purpose="spent")
        part.add(spent, "core_seconds", [float(seed)], seeds=[0], steps=[0])
        parts.append(part)
    losses, spent = joined(parts).blocks
    assert losses.values.tolist() == [[3, 1], [4, 1]]
    assert (losses.seeds.tolist(), spent.values.item()) == ([3, 4], 7.0)


def test_a_given_rate_is_not_tuned(tiny_task):
    held = contest()
    assert held.baseline("as published", tiny_task, MOMENTUM, rate=0.1) == 0.1
    held.baseline("tuned elsewhere", tiny_task, MOMENTUM, rate=0.1, tuned_for="final")
    assert not held.tuned
    assert not list(held.records.select("final_loss", purpose="tuning"))
    told = [block.key.tuned_for for block in held.records.select("train_loss", purpose="test")]
    assert told == ["", "final"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": []}, r"tiny: needs seeds, each once, got \[\]"),
        ({"seeds": [0, 0]}, "each once, got"), ({"copies": 0}, "copies must be at least 1"),
        ({"timing_rounds": -1}, "timing_rounds at least 0"),
    ],
)  # fmt: skip
def test_contests_that_cannot_be_held(changes, match):
    with pytest.raises(ValueError, match=match):
        contest(**changes)


def test_entrants_that_cannot_be(tiny_task):
    held = contest()
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="momentum's rate must be > 0"):
            held.baseline("momentum", tiny_task, MOMENTUM, rate=rate)
    held.baseline("momentum", tiny_task, MOMENTUM, rate=0.1)
    with pytest.raises(ValueError, match="two optimizers are called 'momentum'; rename one"):
        held.rule("momentum", tiny_task, fresh())
    with pytest.raises(ValueError, match=r"unknown optimizer 'momentun'.*Did you mean 'momentum'"):
        held.add_subspace_seconds(1.0, ["momentun"])


def test_refused_lengths():
    with pytest.raises(ValueError, match="an epoch, a step and a test at least"):
        Length(0, 5)
    for counts in ((1.5, 3), (math.nan, 3), (True, 3), (1, 3, 1.5)):
        with pytest.raises(ValueError, match="in whole numbers"):
            Length(*counts)
