"""The trainer: budgets, determinism, resuming, interruption, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import torch

from stepsmith import load, store
from stepsmith.machine import machine
from stepsmith.meta import MetaTrainConfig, meta_train, train_curriculum, trainer
from stepsmith.meta.trainer import Run
from stepsmith.rules import make_rule
from stepsmith.store import CheckpointError
from stepsmith.tasks import Quadratic

SMALL = {"horizon": 12, "copies": 3, "validations": 3, "validation_copies": 4, "samples": 60}


def same(one, two) -> bool:
    return all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)


def test_meta_training_beats_the_fresh_rule_and_adam_on_quadratics():
    scores = []
    trained = meta_train(
        Quadratic(4), "joined", steps=40_000, horizon=40, copies=8, validation_copies=64,
        validations=4, on_window=lambda run, window: scores.append(window.value),
    )  # fmt: skip
    first, best = trained.manifest["validations"][0]["score"], trained.manifest["validation"]
    assert best["score"] < 0.7 * first
    assert trained.manifest["inner_steps"] >= 40_000


@pytest.mark.parametrize("window", [None, 4])
def test_same_seed_same_numbers(window):
    runs = [
        meta_train(Quadratic(3), steps=300, window=window, seed=seed, **SMALL) for seed in (1, 1, 2)
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("window", [None, 4])
def test_resuming_gives_the_numbers_of_an_uninterrupted_run(tmp_path, window, tiny_task):
    common = {**SMALL, "window": window, "seed": 5}
    whole = meta_train(tiny_task, steps=432, **common)

    def stop(run: Run, window) -> None:
        if run.progress.inner_steps >= 180:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="continue with resume=True"):
        meta_train(tiny_task, steps=432, out=tmp_path, on_window=stop, **common)
    resumed = meta_train(tiny_task, steps=432, out=tmp_path, resume=True, **common)
    assert same(whole, resumed)
    for key in ("updates", "inner_steps"):
        assert whole.manifest[key] == resumed.manifest[key]
    scores = [[v["score"] for v in t.manifest["validations"]] for t in (whole, resumed)]
    assert scores[0] == scores[1]
    assert same(load(tmp_path / "rule.safetensors"), resumed)


def test_one_copy_can_be_resumed(tmp_path):
    common = {**SMALL, "copies": 1}
    meta_train(Quadratic(3), steps=24, out=tmp_path, **common)
    resumed = meta_train(Quadratic(3), steps=48, out=tmp_path, resume=True, **common)
    assert resumed.manifest["inner_steps"] == 48


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    meta_train(Quadratic(3), steps=72, out=tmp_path, **SMALL)
    with pytest.raises(CheckpointError, match=r"lr=0\.01 \(now 0\.5\)"):
        meta_train(Quadratic(3), steps=72, out=tmp_path, resume=True, lr=0.5, **SMALL)
    with pytest.raises(CheckpointError, match="rule"):
        meta_train(Quadratic(3), "rnnprop", steps=72, out=tmp_path, resume=True, **SMALL)
    with pytest.raises(CheckpointError, match="no such file"):
        meta_train(Quadratic(3), steps=72, out=tmp_path / "none", resume=True, **SMALL)


def test_a_run_goes_on_only_where_its_task_is_the_same_in_detail(tmp_path):
    class Detailed(Quadratic):
        detail = 1

        @property
        def details(self):
            return {"detail": self.detail}

    task = Detailed(3)
    meta_train(task, steps=72, out=tmp_path, **SMALL)
    meta_train(task, steps=144, out=tmp_path, resume=True, **SMALL)
    task.detail = 2
    with pytest.raises(CheckpointError, match="detail"):
        meta_train(task, steps=216, out=tmp_path, resume=True, **SMALL)


def test_an_earlier_run_is_not_overwritten(tmp_path):
    first = meta_train(Quadratic(3), steps=72, out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="holds an earlier meta-training"):
        meta_train(Quadratic(3), steps=72, out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="holds an earlier meta-training"):
        train_curriculum(Quadratic(3), horizons=(5, 10), steps=72, copies=2, out=tmp_path)
    assert load(tmp_path / "rule.safetensors").fingerprint == first.fingerprint


def test_a_finished_run_can_be_given_more_budget(tmp_path):
    meta_train(Quadratic(3), steps=72, out=tmp_path, **SMALL)
    more = meta_train(Quadratic(3), steps=144, out=tmp_path, resume=True, **SMALL)
    assert more.manifest["inner_steps"] == 144


def test_short_windows_run_at_staggered_ages():
    config = MetaTrainConfig(steps=10, horizon=12, window=4, copies=3)
    run = Run([Quadratic(3)], make_rule("joined"), config)
    ages = []
    for _ in range(12):
        run.window()
        ages.append(tuple(run.episodes[0].ages))
    assert all(sorted(row) == [0, 4, 8] for row in ages[2:])


def test_windows_of_the_whole_horizon_start_afresh():
    run = Run([Quadratic(3)], make_rule("joined"), MetaTrainConfig(steps=10, horizon=6, copies=2))
    (own,) = run.episodes
    instance = own.copies.buffers["W"].clone()
    run.window()
    assert own.ages == [0, 0]
    assert not torch.equal(own.copies.buffers["W"], instance)
    assert all(bool((carry == 0).all()) for carry in own.stepper.carry.values())
    assert bool((own.stepper.state["step"] == 0).all())


def test_nonfinite_windows_are_skipped_counted_and_said_once(caplog):
    class Broken(Quadratic):
        def loss(self, params, buffers, batch, generator, train):
            loss, buffers, metrics = super().loss(params, buffers, batch, generator, train)
            return loss * float("nan"), buffers, metrics

    run = Run([Broken(3)], make_rule("joined"), MetaTrainConfig(steps=10, horizon=6, copies=2))
    before = {key: value.detach().clone() for key, value in run.weights.items()}
    for _ in range(3):
        run.window()
    assert run.progress.skipped == 3
    assert run.progress.updates == 0
    assert len([r for r in caplog.records if "not finite" in r.message]) == 1
    assert all(torch.equal(before[key], run.weights[key]) for key in before)
    with pytest.raises(RuntimeError, match="no validation had a finite score"):
        meta_train(Broken(3), steps=12, horizon=6, copies=2, validation_copies=2)


def test_a_seconds_budget_ends():
    trained = meta_train(Quadratic(3), seconds=0.5, **SMALL)
    assert 0.5 <= trained.manifest["seconds"] < 5
    assert 0 < trained.manifest["core_seconds"] < 10


def test_core_seconds_add_up_over_resumes_and_parents(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    first = meta_train(Quadratic(3), steps=72, out=tmp_path, **SMALL)
    spent = first.manifest["core_seconds"]
    assert spent > 0
    more = meta_train(Quadratic(3), steps=144, out=tmp_path, resume=True, **SMALL)
    assert spent < more.manifest["core_seconds"] < next(clock)
    alone = meta_train(Quadratic(3), steps=72, **SMALL).manifest["core_seconds"]
    further = meta_train(Quadratic(3), more, steps=72, **SMALL).manifest
    assert further["core_seconds"] == more.manifest["core_seconds"] + alone
    assert further["parent"]["core_seconds"] == more.manifest["core_seconds"]


def test_the_manifest_names_the_machine_of_every_stage(monkeypatch):
    monkeypatch.setattr(trainer, "machine", lambda: {"processor": "first"})
    first = meta_train(Quadratic(3), steps=72, **SMALL)
    monkeypatch.undo()
    second = meta_train(Quadratic(3), first, steps=72, **SMALL)
    assert first.manifest["machine"] == {"processor": "first"}
    assert second.manifest["parent"]["machine"] == {"processor": "first"}
    assert second.manifest["machine"] == machine()


def test_core_seconds_that_are_not_known_are_not_claimed(tmp_path):
    meta_train(Quadratic(3), steps=72, out=tmp_path, **SMALL)
    tensors, manifest = store.read(tmp_path / "run.safetensors", "run")
    del manifest["progress"]["core_seconds"]
    store.write(tmp_path / "run.safetensors", tensors, manifest)
    more = meta_train(Quadratic(3), steps=144, out=tmp_path, resume=True, **SMALL)
    assert "core_seconds" not in more.manifest
    assert "core_seconds" not in meta_train(Quadratic(3), more, steps=72, **SMALL).manifest


def test_the_rate_warms_up_and_decays():
    config = MetaTrainConfig(steps=100, lr=0.02, warmup=0.1, final_lr=0.1)
    assert config.rate(0.05) == pytest.approx(0.01)
    assert config.rate(0.1) == pytest.approx(0.02)
    assert config.rate(1.0) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "budget"),
        ({"seconds": 1, "steps": 1}, "budget"),
        ({"steps": 0}, "steps"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": 0}, "seconds"),
        ({"steps": 9, "copies": 0}, "copies"),
        ({"steps": 9, "horizon": 1e2}, "horizon must be at least 1 and whole, got 100.0"),
        ({"steps": 9, "window": 20.0}, "window must be"),
        ({"steps": 9, "window": 200}, "window"),
        ({"steps": 9, "window": 30}, "multiple"),
        ({"steps": 9, "fraction": 0.0}, "fraction"),
        ({"steps": 9, "samples": 0}, "samples"),
        ({"steps": 9, "lr": -0.1}, "lr"),
        ({"steps": 9, "lr": float("nan")}, "lr"),
        ({"steps": 9, "loss": "median"}, "mean, final, log"),
        ({"steps": 9, "losses": "during"}, "after, before"),
        ({"steps": 9, "validations": 0}, "validations"),
        ({"steps": 9, "final_lr": 2.0}, "final_lr"),
    ],
)
def test_bad_settings_are_refused_when_made(bad, match):
    with pytest.raises(ValueError, match=match):
        MetaTrainConfig(**bad)


def test_the_rate_never_rises_above_its_peak():
    config = MetaTrainConfig(steps=9, lr=0.5, warmup=1e-4)
    assert config.rate(0.0) == 0.5


def test_a_run_keeps_the_figures_of_its_last_windows(monkeypatch):
    monkeypatch.setattr(trainer, "KEPT", 3)
    run = Run([Quadratic(3)], make_rule("joined"), MetaTrainConfig(steps=900, **SMALL))
    for _ in range(5):
        run.window()
    kept = [row["inner_steps"] for row in run.progress.history]
    assert kept == [36 * window for window in (2, 3, 4)]


def test_classic_rules_have_nothing_to_learn():
    with pytest.raises(ValueError, match="nothing to meta-train"):
        meta_train(Quadratic(3), make_rule("adam"), steps=10)


def test_tensorboard_and_resume_need_a_folder():
    with pytest.raises(ValueError, match="out=FOLDER"):
        meta_train(Quadratic(3), steps=10, resume=True)


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    meta_train(Quadratic(3), steps=72, out=tmp_path, tensorboard=True, **SMALL)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_meta_training_goes_on_from_a_trained_rule(tmp_path):
    first = meta_train(Quadratic(3), "joined", steps=40, horizon=5, copies=2)
    same = meta_train(Quadratic(3), first, steps=10, horizon=5, copies=2, lr=1e-30)
    assert all(torch.equal(same.weights[key], first.weights[key]) for key in first.weights)
    further = meta_train(Quadratic(3), first, steps=40, horizon=5, copies=2, lr=0.1)
    assert any(not torch.equal(further.weights[k], first.weights[k]) for k in first.weights)
    assert further.manifest["inner_steps"] == 80
    assert further.manifest["seconds"] >= first.manifest["seconds"]
    assert further.manifest["parent"]["fingerprint"] == first.fingerprint


def test_a_checkpoint_of_another_parent_is_refused(tmp_path):
    first = meta_train(Quadratic(3), "joined", steps=20, horizon=5)
    meta_train(Quadratic(3), first, steps=20, horizon=5, out=tmp_path)
    with pytest.raises(CheckpointError, match="parent"):
        meta_train(Quadratic(3), "joined", steps=40, horizon=5, out=tmp_path, resume=True)


def test_weights_that_require_gradients_are_no_obstacle():
    first = meta_train(Quadratic(3), "joined", steps=20, horizon=5)
    for value in first.weights.values():
        value.requires_grad_()
    assert meta_train(Quadratic(3), first, steps=20, horizon=5).horizon == 5


@pytest.mark.parametrize(
    ("config", "window"),
    [({"horizon": 1000}, 1000), ({"horizon": 40, "window": 10}, 10), ({}, 100)],
)
def test_a_budget_smaller_than_one_window_is_refused(config, window, tmp_path):
    with pytest.raises(ValueError, match=f"5 steps is smaller than one window, of {window:,};"):
        meta_train(Quadratic(3), steps=5, out=tmp_path / "run", **config)
    assert not (tmp_path / "run").exists()


def test_an_update_that_takes_more_than_the_budget_says_so(caplog):
    done = meta_train(Quadratic(3), steps=10, horizon=5, copies=2, accumulate=3, validations=1)
    assert done.manifest["inner_steps"] == 30
    assert "one update takes 30 steps (5 a window, 2 copies, 3 windows an update)" in caplog.text


NO_COUNTS = [0, -1, 1.5, 2.0, math.nan, "3", True, torch.tensor(3), 10**30]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, NO_COUNTS) for name in ("steps", "horizon", "copies", "accumulate", "samples",
                                         "window", "patience", "validations", "validation_copies",
                                         "validation_horizon")),
        *((name, [0.0, -1.0, math.nan, math.inf, 1e99, "1", True, [1.0]])
          for name in ("lr", "clip", "teacher_lr", "checkpoint_seconds")),
        *((name, [-0.1, 1.1, math.nan, "0.5", None, True])
          for name in ("fraction", "discount", "final_lr", "warmup", "weight_decay", "imitation")),
        *((name, ["", "x", 0, ["mean"]])
          for name in ("loss", "losses", "balance", "teacher", "validation_loss",
                       "validation_split")),
        ("proportions", [3, "2,1", [0.0], [1, math.nan], ["1"], [True], torch.ones(2)]),
        ("seed", [-1, 1.0, "0", True, None, 2**64]),
    ],
)  # fmt: skip
def test_settings_of_other_types_or_out_of_range(name, values):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"meta_train: {name}.* must"):
            MetaTrainConfig(**{"steps": 1000, name: value})


def test_what_may_be_none():
    optional = ("window", "samples", "proportions", "validation_horizon", "validation_loss",
                "patience")  # fmt: skip
    MetaTrainConfig(steps=1000, **dict.fromkeys(optional))
    for name in ("horizon", "copies", "lr", "clip", "validations"):
        with pytest.raises(TypeError, match=f"{name} must be"):
            MetaTrainConfig(steps=1000, **{name: None})


def test_settings_take_numpys_numbers():
    given = MetaTrainConfig(steps=np.int64(100), lr=np.float32(0.5), proportions=np.array([2, 1]))
    assert given == MetaTrainConfig(steps=100, lr=0.5, proportions=(2, 1))
    json.dumps(dataclasses.asdict(given))


def test_a_run_that_never_improved_says_so(caplog):
    meta_train(Quadratic(3), "joined", steps=10, horizon=5, lr=1e-30, validations=1)
    assert "no validation was better than the first" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"task": 5}, {"rule": 5}, {"rule": None}, {"out": 5}, {"name": 5}, {"on_window": 5},
     {"resume": "no"}, {"progress": 1}, {"tensorboard": None}],
)  # fmt: skip
def test_arguments_of_other_types(wrong):
    given = {"task": Quadratic(3), "rule": "joined", "steps": 200, **wrong}
    (name,) = wrong
    with pytest.raises(TypeError, match=f"meta_train: {name} must be"):
        meta_train(given.pop("task"), given.pop("rule"), **given)
