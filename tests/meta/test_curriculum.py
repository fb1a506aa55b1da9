"""Stages of growing horizon: what they start from, when they end, resuming."""

from __future__ import annotations

import math
import os
import signal

import pytest

from stepsmith import load
from stepsmith.meta import meta_train, train_curriculum
from stepsmith.meta.curriculum import SEEDS_APART, longest_window
from stepsmith.meta.trainer import has_stalled
from stepsmith.tasks import Quadratic

SMALL = {"copies": 2, "validations": 3, "validation_copies": 4, "samples": 60}
HORIZONS = (4, 8, 16)


def test_each_stage_is_meta_training_from_the_best_of_the_one_before():
    trained = train_curriculum(Quadratic(3), horizons=HORIZONS, steps=600, patience=None, **SMALL)
    rule = "joined"
    for place, horizon in enumerate(HORIZONS):
        left = 600 - (rule.manifest["inner_steps"] if place else 0)
        ahead = {4: 8, 8: 16, 16: None}[horizon]
        rule = meta_train(
            Quadratic(3), rule, horizon=horizon, steps=left // (3 - place),
            seed=SEEDS_APART * place, validation_horizon=ahead, **SMALL,
        )  # fmt: skip
        stage = trained.manifest["curriculum"][place]
        assert stage["fingerprint"] == rule.fingerprint
        assert stage["validation_horizon"] == (ahead or horizon)
    assert trained.fingerprint == rule.fingerprint
    assert trained.horizon == 16
    stages = trained.manifest["curriculum"]
    assert [stage["ended"] for stage in stages] == ["budget"] * 3
    assert sum(stage["inner_steps"] for stage in stages) == trained.manifest["inner_steps"]
    assert 600 <= trained.manifest["inner_steps"] < 600 + 2 * 16


def test_a_stage_that_stops_improving_leaves_its_budget_to_the_next():
    common = {**SMALL, "validations": 10, "lr": 1e-30}
    trained = train_curriculum(Quadratic(3), horizons=(4, 8), steps=800, patience=2, **common)
    first, second = trained.manifest["curriculum"]
    assert first["ended"] == second["ended"] == "no better"
    assert first["inner_steps"] == 80  # two tenths of its 400
    assert second["inner_steps"] == pytest.approx(0.2 * (800 - 80), abs=16)
    assert len(first["scores"]) == 3


def test_shares_divide_the_budget():
    trained = train_curriculum(
        Quadratic(3), horizons=(4, 8), shares=(1, 3), steps=800, patience=None, **SMALL
    )
    assert [s["inner_steps"] for s in trained.manifest["curriculum"]] == [200, 608]


def test_windows_grow_up_to_their_limit():
    trained = train_curriculum(Quadratic(3), horizons=HORIZONS, window=6, steps=300, **SMALL)
    assert [stage["window"] for stage in trained.manifest["curriculum"]] == [4, 4, 4]
    assert [longest_window(h, 200) for h in (100, 200, 300, 1000, 211)] == [None, None, 150, 200, 1]


def test_look_ahead_can_be_left():
    trained = train_curriculum(Quadratic(3), horizons=(4, 8), look_ahead=False, steps=100, **SMALL)
    assert [s["validation_horizon"] for s in trained.manifest["curriculum"]] == [4, 8]


def test_going_on_from_a_trained_rule_does_not_spend_the_budget():
    start = meta_train(Quadratic(3), steps=1000, horizon=4, **SMALL)
    trained = train_curriculum(
        Quadratic(3), start, horizons=(4, 8), steps=200, patience=None, **SMALL
    )
    assert [s["inner_steps"] for s in trained.manifest["curriculum"]] == [104, 96]
    assert trained.manifest["inner_steps"] == start.manifest["inner_steps"] + 200


@pytest.mark.parametrize("stop_at", [4, 8, 16])
def test_resuming_in_any_stage_gives_the_same_numbers(tmp_path, stop_at):
    common = {**SMALL, "steps": 600, "horizons": HORIZONS}
    whole = train_curriculum([Quadratic(3), Quadratic(2)], **common)

    def stop(run, window) -> None:
        if run.config.horizon == stop_at and run.progress.updates == 2:
            os.kill(os.getpid(), signal.SIGINT)

    tasks = [Quadratic(3), Quadratic(2)]
    stage = HORIZONS.index(stop_at) + 1
    with pytest.raises(KeyboardInterrupt, match=rf"in stage {stage} of 3; continue with resume"):
        train_curriculum(tasks, out=tmp_path, on_window=stop, **common)
    resumed = train_curriculum(tasks, out=tmp_path, resume=True, **common)
    assert resumed.fingerprint == whole.fingerprint
    again = train_curriculum(tasks, out=tmp_path, resume=True, **common)
    assert again.fingerprint == whole.fingerprint

    def counts(trained) -> list[dict]:
        return [{k: v for k, v in stage.items() if "seconds" not in k}
                for stage in trained.manifest["curriculum"]]  # fmt: skip

    assert counts(resumed) == counts(again) == counts(whole)
    assert load(tmp_path / "rule.safetensors").manifest["curriculum"][1]["horizon"] == 8


def test_a_budget_in_seconds():
    trained = train_curriculum(Quadratic(3), horizons=(4, 8), seconds=0.6, patience=None, **SMALL)
    assert 0.6 <= trained.manifest["seconds"] < 5
    assert all(stage["inner_steps"] > 0 for stage in trained.manifest["curriculum"])


def test_when_a_run_has_stalled():
    def stalled(scores: list[float], patience: int | None = 2) -> bool:
        return has_stalled([{"score": score} for score in scores], patience)

    nan = float("nan")
    assert stalled([3.0, 2.0, 2.5, 2.0])  # as good is no better
    assert not stalled([3.0, 2.0, 2.5])
    assert not stalled([3.0, 2.0, 2.5, 2.5], None)
    assert not stalled([nan, nan, nan, nan])
    assert not stalled([nan, 2.0, nan])
    assert stalled([nan, 2.0, nan, nan])


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"horizons": ()}, "must grow"),
        ({"horizons": (8, 8)}, "must grow"),
        ({"shares": (1,)}, r"one a stage \(2\)"),
        ({"shares": (1, 0)}, "finite number > 0"),
        ({"horizon": 8}, "horizon is set stage by stage"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"window": 0}, "window must lie between 1"),
        ({"resume": True}, "out=FOLDER"),
    ],
)
def test_bad_curricula_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        train_curriculum(Quadratic(3), **{"horizons": (4, 8), "steps": 100, **SMALL, **bad})
    with pytest.raises(ValueError, match="budget"):
        train_curriculum(Quadratic(3), horizons=(4, 8))


@pytest.mark.parametrize(
    "bad",
    [
        {"horizons": 100}, {"horizons": "48"}, {"horizons": (4.0, 8)}, {"horizons": (True, 8)},
        {"shares": 2}, {"shares": ("1", 1)}, {"shares": (1, math.nan)}, {"look_ahead": "no"},
        {"look_ahead": 1}, {"seed": "0"}, {"seed": -1}, {"window": "4"}, {"window": 2.5},
        {"patience": 1.5}, {"steps": 7}, {"steps": 100.5},
    ],
)  # fmt: skip
def test_arguments_of_other_types_are_refused_before_the_first_stage(bad, tmp_path):
    given = {"horizons": (4, 8), "steps": 100, **SMALL, **bad}
    with pytest.raises((ValueError, TypeError), match=r"must|smaller than one window"):
        train_curriculum(Quadratic(3), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_stage_whose_share_is_less_than_a_window_still_has_one():
    trained = train_curriculum(
        Quadratic(3), horizons=(4, 8), shares=(99, 1), steps=100, patience=None, **SMALL
    )
    assert trained.manifest["curriculum"][-1]["updates"] >= 1
