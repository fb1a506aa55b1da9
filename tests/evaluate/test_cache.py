"""Tuned baselines and runs of rules on disk: read only where everything is the same."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import make_tiny_task
from tests.evaluate.test_run import fresh
from torch import nn

from stepsmith.evaluate import BASELINES, Baseline, evaluate, run
from stepsmith.evaluate.cache import identity, together
from stepsmith.evaluate.records import Records
from stepsmith.optim import LearnedOptimizer
from stepsmith.store import CheckpointError
from stepsmith.tasks import ModuleTask, Quadratic
from stepsmith.tasks.wrapped import WrappedTask

FEW = {"steps": 12, "seeds": 3, "tuning_seeds": 2, "timing_rounds": 0}


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """Steps of every call of `train`."""
    calls = []
    original = run.train

    def counted(task, make, seeds, steps, *arguments):
        calls.append(steps)
        return original(task, make, seeds, steps, *arguments)

    monkeypatch.setattr(run, "train", counted)
    return calls


def values(result, **wanted):
    return [(b.key, b.metric, b.values.tolist()) for b in result.records.select(**wanted)]


def test_the_second_time_nothing_is_trained(tmp_path, trainings, tiny_task):
    first = evaluate(tiny_task, {"mine": fresh()}, ["adam", "nag"], cache=tmp_path, **FEW)
    assert len(trainings) >= 2 * 9 + 3
    trainings.clear()
    again = evaluate(tiny_task, {"mine": fresh()}, ["adam", "nag"], cache=tmp_path, **FEW)
    assert trainings == []
    for purpose in ("tuning", "test", "spent"):
        assert values(again, purpose=purpose) == values(first, purpose=purpose)
    assert again.tuned == first.tuned
    assert again.rows() == first.rows()


def test_what_is_read_equals_what_a_run_without_a_cache_gives(tmp_path, tiny_task):
    plain = evaluate(tiny_task, [], ["rmsprop"], **FEW)
    for _ in range(2):
        kept = evaluate(tiny_task, [], ["rmsprop"], cache=tmp_path, **FEW)
        assert values(kept, purpose="test") == values(plain, purpose="test")
        assert kept.tuned == plain.tuned


def test_records_name_the_present_experiment(tmp_path, trainings):
    evaluate(Quadratic(3), {"a": fresh()}, ["adam"], cache=tmp_path, recipe="one", **FEW)
    trainings.clear()
    other = evaluate(
        Quadratic(3), {"b": fresh()}, ["adam"], cache=tmp_path, recipe="two", scale="quick", **FEW
    )
    assert trainings == []
    assert {(b.key.recipe, b.key.scale) for b in other.records.blocks} == {("two", "quick")}
    assert {b.key.optimizer for b in other.records.blocks} == {"adam", "b"}


@pytest.mark.parametrize(
    "changed",
    [
        {"seeds": 4}, {"tuning_seeds": 3}, {"steps": 13}, {"points": 10}, {"protocol": "other"},
        {"tune_around": {"adam": 0.02}},
    ],
)  # fmt: skip
def test_whatever_decides_the_numbers_misses(changed, tmp_path, trainings):
    evaluate(Quadratic(3), [], ["adam"], cache=tmp_path, **FEW)
    trainings.clear()
    evaluate(Quadratic(3), [], ["adam"], cache=tmp_path, **{**FEW, **changed})
    assert trainings


def test_copies_decide_where_stacked_ones_share_their_dropout():
    def task(dropout: float) -> ModuleTask:
        return ModuleTask(
            lambda: nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1)),
            nn.functional.mse_loss, (torch.ones(8, 3), torch.ones(8, 1)), stacking="vmap",
        )  # fmt: skip

    assert together(task(0.5), 4) == {"copies": 4}
    assert together(task(0.0), 4) == {}
    assert together(Quadratic(3), 4) == {}


@pytest.mark.parametrize(
    "entry",
    [
        replace(BASELINES["adam"], centre=0.05),
        replace(BASELINES["adam"], fixed={"eps": 1e-4}),
        replace(BASELINES["adam"], make=torch.optim.NAdam),
    ],
)
def test_another_baseline_of_the_same_name_misses(entry, tmp_path, trainings):
    evaluate(Quadratic(3), [], ["adam"], cache=tmp_path, **FEW)
    trainings.clear()
    evaluate(Quadratic(3), [], [entry], cache=tmp_path, **FEW)
    assert trainings


def test_a_nameless_optimizer_is_never_read(tmp_path, trainings):
    entry = Baseline("mine", lambda params, lr: torch.optim.SGD(params, lr=lr), 0.1)
    for _ in range(2):
        trainings.clear()
        evaluate(Quadratic(3), [], [entry], cache=tmp_path, **FEW)
        assert trainings
    assert not list(tmp_path.glob("*.parquet"))


def test_an_optimizer_taken_as_it_is_is_kept_too(tmp_path, trainings):
    def measured(**arguments):
        trainings.clear()
        given = {"given": functools.partial(torch.optim.SGD, **arguments)}
        found = evaluate(Quadratic(3), [], [], optimizers=given, cache=tmp_path, **FEW)
        return values(found, purpose="test"), len(trainings)

    first, again = measured(lr=0.01), measured(lr=0.01)
    assert (first[1], again[1]) == (1, 0)
    assert again[0] == first[0]
    assert measured(lr=0.02)[1] == 1
    assert measured(lr=0.01, momentum=0.5)[1] == 1
    # What is not plain is never read.
    assert [measured(lr=torch.tensor(0.01))[1] for _ in range(2)] == [1, 1]


def test_a_learned_optimizer_taken_as_it_is_is_never_read(tmp_path, trainings):
    for _ in range(2):
        trainings.clear()
        given = {"given": functools.partial(LearnedOptimizer, rule=fresh())}
        evaluate(Quadratic(3), [], [], optimizers=given, cache=tmp_path, **FEW)
        assert len(trainings) == 1


def test_a_learned_optimizer_as_a_baseline_is_never_read(tmp_path, trainings):
    entry = Baseline("mine", LearnedOptimizer, 1.0, {"rule": "mlp-mnist"})
    seen = []
    for _ in range(2):
        trainings.clear()
        evaluate(Quadratic(3), [], entry, cache=tmp_path, **FEW)
        seen.append(len(trainings))
    assert seen[0] == seen[1] > 0


def test_other_weights_miss(tmp_path, trainings):
    evaluate(Quadratic(3), {"a": fresh()}, [], cache=tmp_path, **FEW)
    trainings.clear()
    other = replace(fresh(), weights={k: 1.01 * v for k, v in fresh().weights.items()})
    evaluate(Quadratic(3), {"a": other}, [], cache=tmp_path, **FEW)
    assert len(trainings) == 1


@pytest.mark.parametrize(
    "options",
    [{"name": "other"}, {"batch_size": 9}, {"dtype": torch.float32}],
)
def test_tasks_are_told_apart(options):
    assert identity(make_tiny_task(**options)) != identity(make_tiny_task())
    assert identity(make_tiny_task()) == identity(make_tiny_task())


def test_tasks_of_one_name_are_told_apart_by_what_they_do(tiny_task):
    data, test = (tiny_task.data.train[0], tiny_task.data.train[1]), tiny_task.data.test

    def task(factor=1.0, scale=1.0, activation=nn.Tanh):
        def make():
            return nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 3))

        def loss(output, target):
            return factor * nn.functional.cross_entropy(output, target)

        return type(tiny_task)(
            make, loss, ((data[0] * scale, data[1]), test), batch_size=8, dtype=torch.float64,
            name="tiny",
        )  # fmt: skip

    found = [identity(task()), identity(task(factor=2.0)), identity(task(scale=2.0)),
             identity(task(activation=nn.ReLU))]  # fmt: skip
    assert len({str(each) for each in found}) == 4


def test_users_tasks_that_begin_alike_are_told_apart(tiny_task):
    data, labels = tiny_task.data.train
    other = labels.roll(1)

    def task(activation=nn.Tanh, smoothing=0.0, dropout=0.0, tested=labels):
        def make():
            head = nn.Linear(5, 3)
            nn.init.zeros_(head.weight)  # so that nothing before it shows in the first loss
            return nn.Sequential(nn.Linear(6, 5), activation(), nn.Dropout(dropout), head)

        loss = functools.partial(nn.functional.cross_entropy, label_smoothing=smoothing)
        long = data.repeat(600, 1), tested.repeat(600)
        late = torch.cat([labels.repeat(600)[:700], long[1][700:]])
        return type(tiny_task)(
            make, loss, ((data, labels), (long[0], late)), batch_size=8, dtype=torch.float64,
            name="tiny",
        )  # fmt: skip

    alike = [task(), task(nn.ReLU), task(smoothing=0.1), task(dropout=0.5), task(tested=other)]
    assert len({str(identity(each)) for each in alike}) == len(alike)
    assert identity(task()) == identity(task())


class Penalised(WrappedTask):
    """Another task with a penalty that its start at zero does not show."""

    def init(self, generator):
        return self.task.init(generator)

    def loss(self, params, buffers, batch, generator, train):
        loss, buffers, metrics = self.task.loss(params, buffers, batch, generator, train)
        return loss + sum(value.square().sum() for value in params.values()), buffers, metrics


def test_a_users_wrapped_task_is_told_from_what_it_wraps():
    assert identity(Penalised(Quadratic(3))) != identity(Quadratic(3))


def mine(params, lr):
    return torch.optim.SGD(params, lr=lr)


def test_a_users_own_optimizer_is_never_read(tmp_path, trainings):
    for _ in range(2):
        trainings.clear()
        evaluate(Quadratic(3), [], [Baseline("mine", mine, 0.1)], cache=tmp_path, **FEW)
        assert trainings
    assert not list(tmp_path.glob("*.parquet"))


def test_tasks_are_told_apart_by_a_single_batch(tiny_task):
    class Spiky(type(tiny_task)):
        def stream(self, generators, split):
            for step, (inputs, targets) in enumerate(super().stream(generators, split)):
                yield inputs + 9 * (step == 80), targets

    spiky = make_tiny_task()
    spiky.__class__ = Spiky
    assert identity(spiky) != identity(tiny_task)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_damaged_entry_is_measured_again_and_said_so(place, tmp_path, trainings, caplog):
    first = evaluate(Quadratic(3), [], ["adam"], cache=tmp_path, **FEW)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if place == 1.0:
        path.write_bytes(content[:-40])
    else:
        at = 4 + int(place * (len(content) // 2))
        content[at : at + 8] = bytes(255 - byte for byte in content[at : at + 8])
        path.write_bytes(content)
    trainings.clear()
    with caplog.at_level(logging.WARNING, "stepsmith"):
        again = evaluate(Quadratic(3), [], ["adam"], cache=tmp_path, **FEW)
    assert trainings
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    np.testing.assert_equal(values(again, purpose="test"), values(first, purpose="test"))
    trainings.clear()
    evaluate(Quadratic(3), [], ["adam"], cache=tmp_path, **FEW)
    assert trainings == []


def test_a_cache_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is no folder"):
        evaluate(Quadratic(3), [], ["adam"], cache=tmp_path / "file", **FEW)


def test_an_entry_that_cannot_be_written_is_said_and_loses_nothing(
    tmp_path, monkeypatch, caplog, tiny_task
):
    def full(records, path):
        raise CheckpointError(f"{path}: could not be written (No space left on device)")

    with monkeypatch.context() as patched:
        patched.setattr(Records, "save", full)
        given = evaluate(tiny_task, {"mine": fresh()}, ["adam"], cache=tmp_path, **FEW)
    assert caplog.text.count("No space left") == 2  # of the rule and of the baseline
    again = evaluate(tiny_task, {"mine": fresh()}, ["adam"], cache=tmp_path, **FEW)
    assert values(again, purpose="test") == values(given, purpose="test")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("place", ["file", "file/sub", "/dev/full"])
def test_a_cache_is_tried_before_anything_is_measured(tmp_path, trainings, tiny_task, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is no folder that can be written to"):
        evaluate(tiny_task, [], ["adam"], cache=tmp_path / place, **FEW)
    assert not trainings
