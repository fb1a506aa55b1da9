"""A saved start is where every run starts; its batches are the task's own."""

from __future__ import annotations

import pytest
import torch

from stepsmith.evaluate.cache import identity
from stepsmith.tasks import make_task
from stepsmith.tasks.started import StartedTask
from stepsmith.unroll import Copies


def test_starts_are_the_saved_one_and_batches_the_tasks():
    task = make_task("mlp-mnist", source="sample")
    params, buffers = task.init(torch.Generator().manual_seed(7))
    started = StartedTask(task, params, buffers)
    copies, others = Copies(started, [1, 2]), Copies(task, [1, 2])
    assert torch.equal(copies.theta[0], copies.theta[1])
    assert torch.equal(copies.theta[0], copies.layout.flatten(params))
    for one, two in zip(copies.batches("train"), others.batches("train"), strict=True):
        assert torch.equal(one, two)
    given, _ = started.init(torch.Generator().manual_seed(1))
    for value in given.values():
        value.zero_()
    assert all(bool(value.any()) for key, value in params.items() if key.endswith("weight"))


def test_running_statistics_are_the_saved_ones_in_the_tasks_dtype():
    task = make_task("mlp8-relu-bn-mnist", source="sample", dtype=torch.float64)
    params, buffers = task.init(torch.Generator().manual_seed(7))
    saved = {key: (value + 3).float() for key, value in buffers.items() if "mean" in key}
    assert saved
    _, given = StartedTask(task, params, saved).init(torch.Generator().manual_seed(1))
    for key, value in given.items():
        assert value.dtype == buffers[key].dtype
        assert torch.equal(value, saved[key].to(value) if key in saved else buffers[key])
        value.add_(1)
    _, again = StartedTask(task, params, saved).init(torch.Generator().manual_seed(1))
    assert all(torch.equal(again[key], saved[key].double()) for key in saved)


def test_starts_are_told_apart_and_must_fit():
    task = make_task("mlp-mnist", source="sample")
    one, two = (task.init(torch.Generator().manual_seed(seed))[0] for seed in (1, 2))
    assert identity(StartedTask(task, one)) != identity(StartedTask(task, two))
    with pytest.raises(ValueError, match="does not fit mlp-mnist"):
        StartedTask(task, {key: value for key, value in one.items() if "bias" not in key})
    wrong = {**one, next(iter(one)): torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"'{next(iter(one))}' has shape \(2,\) in the start"):
        StartedTask(task, wrong)
    with pytest.raises(
        ValueError, match=r"'mean' has shape \(3,\) in the start, is missing in the"
    ):
        StartedTask(task, one, {"mean": torch.zeros(3)})


def test_a_start_must_be_finite():
    task = make_task("mlp-mnist", source="sample")
    params, _ = task.init(torch.Generator().manual_seed(1))
    name = next(iter(params))
    with pytest.raises(ValueError, match=f"mlp-mnist is not finite .*'{name}'"):
        StartedTask(task, {**params, name: params[name] * torch.nan})


def test_a_start_does_not_move_with_the_model_it_came_from():
    task = make_task("mlp-mnist", source="sample")
    params, _ = task.init(torch.Generator().manual_seed(1))
    started = StartedTask(task, params)
    before = identity(started)
    for value in params.values():
        value.add_(1)
    assert identity(started) == before


def test_a_problem_held_fast_is_told_from_a_fresh_one_each_seed():
    task = make_task("quadratic")
    params, buffers = task.init(torch.Generator().manual_seed(0))
    told = [identity(StartedTask(task, params, given)) for given in (None, buffers)]
    assert told[0] != told[1]


def test_starts_are_told_apart_by_their_running_statistics():
    task = make_task("cnn8-bn-mnist", source="sample")
    params, buffers = task.init(torch.Generator().manual_seed(1))
    moved = {k: v + 1 if v.is_floating_point() else v for k, v in buffers.items()}
    plain = identity(StartedTask(task, params))
    assert identity(StartedTask(task, params, buffers)) == plain
    assert identity(StartedTask(task, params, moved)) != plain
