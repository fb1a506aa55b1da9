"""Arguments of evaluations are checked before anything is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stepsmith.evaluate import BASELINES, Baseline, Key, evaluate, train, transfer, transfer_matrix
from stepsmith.evaluate.cost import seconds_per_step
from stepsmith.evaluate.epochs import Length, train_epochs
from stepsmith.evaluate.halving import Rung, halve
from stepsmith.evaluate.run import Settings, by_torch
from stepsmith.evaluate.schedules import Schedule, Scheduled, scheduled
from stepsmith.evaluate.tuning import tune
from stepsmith.tasks import Quadratic

NO_COUNTS = [0, -1, 1.5, 2.0, math.nan, "3", True, None, torch.tensor(3), 10**30]
SGD = by_torch(lambda params: torch.optim.SGD(params, lr=0.1))


@pytest.mark.parametrize("name", ["steps", "seeds", "tuning_seeds", "copies", "points"])
@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda given: type(given).__name__)
def test_settings_are_counts(name, value):
    with pytest.raises((ValueError, TypeError), match=f"evaluate: {name} must be"):
        Settings(**{name: value})


def test_settings_take_numpys_numbers():
    made = Settings(steps=np.int64(5), tune_around={"adam": np.float32(0.5)})
    assert made == Settings(steps=5, tune_around={"adam": 0.5})
    assert type(made.steps) is int
    assert Settings(timing_rounds=0).timing_rounds == 0


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf, 1e99, "0.1", None, True])
def test_rates_are_numbers_above_0(rate):
    for make in (
        lambda: Settings(tune_around={"adam": rate}),
        lambda: Baseline("mine", torch.optim.SGD, rate),
        lambda: replace(BASELINES["adam"], centre=rate),
    ):
        with pytest.raises((ValueError, TypeError), match=r"must be .*> 0"):
            make()


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "quadratic"}, {"task": None}, {"rules": 5}, {"rules": [5]}, {"baselines": 5},
        {"baselines": [None]}, {"optimizers": [torch.optim.SGD]}, {"optimizers": {"sgd": 3}},
        {"recipe": None}, {"scale": 3}, {"protocol": None}, {"say": "loud"}, {"tune_around": 0.1},
    ],
)  # fmt: skip
def test_evaluations_of_other_types(wrong):
    given = {"task": Quadratic(2), "baselines": ["sgd"], **wrong}
    with pytest.raises(TypeError, match=r"evaluate: .* must be|expected a rule"):
        evaluate(given.pop("task"), **given)


def test_transfers_check_everything_before_the_first_task():
    tasks = [Quadratic(2)]
    for wrong, match in (
        ({"tasks": 3}, "tasks must be"), ({"tasks": ["quadratic"]}, "each of tasks must be"),
        ({"baselines": 3}, "baselines must be"), ({"steps": 1.5}, "steps must be"),
    ):  # fmt: skip
        said = []
        given = {"tasks": tasks, "baselines": [], "say": said.append, **wrong}
        with pytest.raises((TypeError, ValueError), match=match):
            transfer("quadratic", given.pop("tasks"), given.pop("baselines"), **given)
        assert not said
    with pytest.raises(ValueError, match=r"metric must be one of"):
        transfer_matrix([], "mean_los")


@pytest.mark.parametrize("seeds", [3, [], [0, 0], [-1], [0.5], ["0"], [True], None])
def test_trainings_need_seeds(seeds):
    for start in (
        lambda: train(Quadratic(2), SGD, seeds, 3, 1),
        lambda: train_epochs(Quadratic(2), SGD, seeds, Length(1, 3)),
    ):
        with pytest.raises((ValueError, TypeError), match=r"seeds"):
            start()


@pytest.mark.parametrize("value", NO_COUNTS[:-1], ids=lambda given: type(given).__name__)
def test_trainings_count_steps_copies_and_rounds(value):
    with pytest.raises((ValueError, TypeError), match=r"train: steps must be"):
        train(Quadratic(2), SGD, [0], value, 1)
    with pytest.raises((ValueError, TypeError), match=r"train: copies must be"):
        train(Quadratic(2), SGD, [0], 3, value)
    with pytest.raises((ValueError, TypeError), match=r"rounds must be"):
        seconds_per_step(Quadratic(2), {}, rounds=value)
    with pytest.raises((ValueError, TypeError), match=r"scheduled: steps must be"):
        scheduled(torch.optim.SGD, Schedule(), value)
    with pytest.raises(ValueError, match=r"in whole numbers"):
        Length(1, value)


@pytest.mark.parametrize(
    "wrong", [{"drops": 0.5}, {"drops": ["0.5"]}, {"factor": "0.1"}, {"kind": None}]
)
def test_schedules_of_other_types(wrong):
    with pytest.raises(TypeError, match=r"Schedule: .* must be"):
        Schedule(**{"kind": "steps", "drops": (0.5,), **wrong})


def test_baselines_of_other_types():
    for wrong in ({"name": 3}, {"make": "sgd"}, {"fixed": [1]}):
        with pytest.raises(TypeError, match=r"must be of type"):
            Baseline(**{"name": "mine", "make": torch.optim.SGD, "centre": 0.1, **wrong})
    with pytest.raises(TypeError, match=r"schedule must be of type Schedule"):
        Scheduled("mine", torch.optim.SGD, 0.1, schedule="cosine")
    for points, factor in ((0, 2.0), (9, 1.0), (9, math.nan), (2.5, 2.0)):
        with pytest.raises(ValueError, match=r"must be"):
            BASELINES["adam"].grid(points, factor)


def test_searches_for_rates_of_other_types():
    def run(rate: float, share: float) -> float:
        return rate

    for given in ({"centre": "0.1"}, {"factor": None}, {"rungs": 3}, {"rungs": (0.5, 1.0)}):
        with pytest.raises(TypeError, match=r"halve: .* must be"):
            halve(run, **{"centre": 0.1, **given})
    for share, rates in ((math.nan, 3), ("1", 3), (1.0, 2.5), (1.0, None)):
        with pytest.raises((ValueError, TypeError), match=r"Rung: .* must be"):
            Rung(share, rates)
    for given in ({"points": 9.5}, {"factor": "2"}, {"factor": math.inf}):
        with pytest.raises((ValueError, TypeError), match=r"tune: .* must be"):
            tune(BASELINES["adam"], run, None, Key(), [0], **given)


def test_lengths_hold_pythons_numbers():
    assert type(Length(np.int64(2), np.int64(3)).steps) is int
