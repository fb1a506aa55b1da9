"""Meta-training on several tasks at once: turns, balance, scores, resuming."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from stepsmith import load
from stepsmith.meta import BALANCES, MetaTrainConfig, meta_train
from stepsmith.meta.config import VALIDATION_SPLITS
from stepsmith.meta.episodes import joint_name, joint_score
from stepsmith.meta.trainer import Run
from stepsmith.rules import make_rule
from stepsmith.store import CheckpointError
from stepsmith.tasks import Quadratic
from stepsmith.unroll import roll

SMALL = {"horizon": 12, "copies": 2, "validations": 3, "validation_copies": 4, "samples": 60}


class Scaled(Quadratic):
    """A quadratic times a constant, plus another."""

    def __init__(self, dimensions: int, factor: float = 1.0, plus: float = 0.0):
        super().__init__(dimensions)
        self.name, self.factor, self.plus = f"scaled-{factor:g}", factor, plus

    def loss(self, params, buffers, batch, generator, train):
        loss, buffers, metrics = super().loss(params, buffers, batch, generator, train)
        return loss * self.factor + self.plus, buffers, metrics


def make_run(tasks, **config) -> Run:
    return Run(tasks, make_rule("joined"), MetaTrainConfig(**{"steps": 1000, **SMALL, **config}))


def turns(run: Run, windows: int) -> list[int]:
    for _ in range(windows):
        run.window()
    return [int(row["task"]) for row in run.progress.history]


def test_windows_go_round():
    run = make_run([Quadratic(2), Quadratic(3), Quadratic(4)])
    assert turns(run, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert run.progress.inner_steps == 7 * 12 * 2
    assert [own.parameters for own in run.episodes] == [2, 3, 4]


def test_windows_follow_proportions():
    run = make_run([Quadratic(2), Quadratic(3), Quadratic(4)], proportions=(3, 1, 2))
    seen = turns(run, 12)
    assert [seen.count(task) for task in range(3)] == [6, 2, 4]
    assert [seen[:6].count(task) for task in range(3)] == [3, 1, 2]


def test_an_update_is_the_mean_over_the_accumulated_windows():
    tasks = [Quadratic(2), Scaled(3, 5.0)]
    run, twin = (make_run(tasks, accumulate=2, balance="none", clip=1e9) for _ in range(2))
    run.window()
    parts = [own.turn(twin.weights, twin.sampler).window.gradients for own in twin.episodes]
    for key, weight in run.weights.items():
        torch.testing.assert_close(weight.grad, (parts[0][key] + parts[1][key]) / 2)
    assert run.progress.updates == 1
    assert turns(run, 1) == [0, 1, 0, 1]


def test_gradients_are_balanced_by_their_usual_norm():
    own = make_run([Quadratic(2), Quadratic(3)]).episodes[0]
    assert own.weight(5.0) == pytest.approx(1 / 5)
    for _ in range(60):
        own.weight(2.0)
    assert own.weight(2.0) == pytest.approx(1 / 2, rel=0.01)
    own.weight(1000.0)  # a spike leaves the next window nearly its weight
    assert own.weight(2.0) > 0.25
    assert own.weight(0.0) == 1.0


def test_balance_by_the_loss_divides_by_the_loss_at_the_start():
    run = make_run([Scaled(3, 1.0), Scaled(3, 100.0)], balance="loss")
    one, hundred = (own.weight(1.0) for own in run.episodes)
    assert hundred == pytest.approx(one / 100)
    assert 1 / one == pytest.approx(run.episodes[0].initial_loss())
    logs = make_run([Scaled(3, 1.0), Scaled(3, 100.0)], balance="loss", loss="log")
    assert logs.episodes[1].weight(1.0) == 1.0


def test_a_task_alone_is_left_as_it_is():
    one = [meta_train(Quadratic(3), steps=100, balance=balance, **SMALL) for balance in BALANCES]
    same = [trained.fingerprint == one[0].fingerprint for trained in one]
    assert all(same)
    assert one[0].manifest["tasks"] == ["quadratic"]
    assert isinstance(one[0].manifest["parameters"], int)


def test_the_joint_score_is_a_geometric_mean_of_ratios():
    rows = [[2.0, 300.0], [1.0, 300.0], [1.0, 75.0]]
    assert joint_score("mean", rows[:1], "ab") == 1
    assert joint_score("mean", rows[:2], "ab") == pytest.approx(math.sqrt(1 / 2))
    assert joint_score("final", rows, "ab") == pytest.approx(math.sqrt(1 / 2 * 1 / 4))
    logs = [[math.log(value) for value in row] for row in rows]
    assert joint_score("log", logs, "ab") == pytest.approx(joint_score("mean", rows, "ab"))
    # A task without a finite score makes none; its first finite one is its measure.
    assert math.isnan(joint_score("mean", [[1.0, math.nan]], "ab"))
    assert joint_score("mean", [[2.0, math.inf], [1.0, 3.0]], "ab") == pytest.approx(0.5**0.5)
    with pytest.raises(ValueError, match="task 'b' has a validation loss of -2"):
        joint_score("mean", [[1.0, 5.0], [1.0, -2.0]], "ab")


def test_validation_scores_every_task_on_its_own_scale():
    run = make_run([Scaled(3, 1.0), Scaled(3, 100.0)])
    assert run.validate() == pytest.approx(1.0)
    for _ in range(12):
        run.window()
    score = run.validate()
    first, last = (point["scores"] for point in run.progress.validations)
    ratios = [after / before for before, after in zip(first, last, strict=True)]
    assert score == pytest.approx(math.prod(ratios) ** 0.5)
    assert first[1] > 20 * first[0]


def test_validations_train_on_the_split_they_are_told(tiny_task, monkeypatch):
    seen = []
    draw = tiny_task.stream
    monkeypatch.setattr(
        tiny_task, "stream", lambda sources, split: seen.append(split) or draw(sources, split)
    )
    for split in VALIDATION_SPLITS:
        seen.clear()
        make_run([tiny_task], validation_split=split).validate()
        assert set(seen) == {split}
    with pytest.raises(ValueError, match="validation_split"):
        make_run([tiny_task], validation_split="test")


def test_meta_training_on_two_tasks_beats_the_fresh_rule_on_both():
    trained = meta_train(
        [Quadratic(4), Scaled(6, 10.0)], steps=40_000, horizon=40, copies=4, validations=4,
        validation_copies=32,
    )  # fmt: skip
    first, best = trained.manifest["validations"][0], trained.manifest["validation"]["score"]
    (kept,) = [row for row in trained.manifest["validations"] if row["score"] == best]
    assert best < 0.8
    assert all(new < old for new, old in zip(kept["scores"], first["scores"], strict=True))


@pytest.mark.parametrize("balance", BALANCES)
def test_resuming_several_tasks_gives_the_same_numbers(tmp_path, tiny_task, balance):
    tasks = [tiny_task, Quadratic(3), Scaled(4, 9.0)]
    common = {**SMALL, "window": 4, "accumulate": 2, "proportions": (1, 2, 1), "balance": balance}
    whole = meta_train(tasks, steps=480, **common)

    def stop(run: Run, window) -> None:
        if run.progress.inner_steps >= 200:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="continue with resume=True"):
        meta_train(tasks, steps=480, out=tmp_path, on_window=stop, **common)
    resumed = meta_train(tasks, steps=480, out=tmp_path, resume=True, **common)
    assert resumed.fingerprint == whole.fingerprint
    scores = [[v["scores"] for v in t.manifest["validations"]] for t in (whole, resumed)]
    assert scores[0] == scores[1]
    manifest = load(tmp_path / "rule.safetensors").manifest
    assert manifest["tasks"] == ["tiny", "quadratic", "scaled-9"]
    assert manifest["parameters"] == [53, 3, 4]
    assert manifest["name"] == "3-tasks"
    with pytest.raises(CheckpointError, match="task"):
        meta_train(tasks[::-1], steps=480, out=tmp_path, resume=True, **common)


def test_names_of_several():
    assert joint_name([Quadratic(), Scaled(2, 3.0)]) == "quadratic+scaled-3"
    assert joint_name([Quadratic()] * 3) == "3-tasks"


@pytest.mark.parametrize(
    ("tasks", "config", "match"),
    [
        ([], {}, "got none"),
        ([Quadratic(2), "mlp-mnist"], {}, "got Quadratic, str"),
        ([Quadratic(2), Quadratic(2, device="meta")], {}, "one device, got cpu, meta"),
        ([Quadratic(2)], {"proportions": (1, 2)}, r"one a task \(1\), got 2"),
    ],
)
def test_tasks_that_do_not_go_together(tasks, config, match):
    with pytest.raises(ValueError, match=match):
        meta_train(tasks, steps=100, **config)


def test_a_task_that_is_never_finite_is_named():
    with pytest.raises(RuntimeError, match=r"on all tasks at once \(never on scaled-nan\)"):
        meta_train([Quadratic(2), Scaled(2, math.nan)], steps=48, **SMALL)


def test_losses_without_a_ratio_are_refused():
    with pytest.raises(ValueError, match="add a constant"):
        meta_train([Quadratic(2), Scaled(2, 1.0, -500.0)], steps=48, **SMALL)


def test_patience_ends_a_run_and_stays_ended(tmp_path):
    common = {**SMALL, "validations": 10, "lr": 1e-30, "patience": 3}
    trained = meta_train(Quadratic(3), steps=480, out=tmp_path, **common)
    assert len(trained.manifest["validations"]) == 4
    assert trained.manifest["inner_steps"] < 240
    again = meta_train(Quadratic(3), steps=480, out=tmp_path, resume=True, **common)
    assert again.manifest["inner_steps"] == trained.manifest["inner_steps"]


def test_validation_may_look_beyond_the_horizon():
    near, far = (make_run([Quadratic(3)], validation_horizon=steps) for steps in (None, 40))
    assert far.validate() < near.validate()
    (episodes,) = far.episodes
    short = make_run([Quadratic(3)], horizon=40, window=40).episodes[0]
    assert episodes.validate(far.weights) == short.validate(far.weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("windows", [0, 1, 3])
def test_a_validation_changes_nothing_of_the_training(device, windows, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    plain, validated = (make_run([Quadratic(3, device=device)], window=4) for _ in range(2))
    (episodes,) = validated.episodes
    places = set()

    def look(*given, **named):
        stepper = vars(episodes).get("stepper")
        places.add("nowhere" if stepper is None else next(iter(stepper.carry.values())).device.type)
        return roll(*given, **named)

    for run in (plain, validated):
        for _ in range(windows):
            run.window()
    with monkeypatch.context() as patched:
        patched.setattr("stepsmith.meta.episodes.roll", look)
        validated.validate()
    assert places == {"cpu" if windows else "nowhere"}
    for run in (plain, validated):
        run.window()
    for key, weight in plain.weights.items():
        assert torch.equal(weight, validated.weights[key]), key
