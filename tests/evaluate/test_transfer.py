"""Rules on tasks they were not meta-trained for."""

from __future__ import annotations

import numpy as np
import pytest
from tests.conftest import make_tiny_task
from tests.evaluate.test_run import fresh

from stepsmith.evaluate import evaluate, run, transfer, transfer_matrix
from stepsmith.tasks import Quadratic

FEW = {"steps": 12, "seeds": 3, "tuning_seeds": 2, "timing_rounds": 0}


def test_a_transfer_is_an_evaluation_of_every_task():
    tasks = [Quadratic(3), make_tiny_task()]
    whole = transfer({"mine": fresh()}, tasks, ["adam"], **FEW)
    parts = [evaluate(task, {"mine": fresh()}, ["adam"], **FEW) for task in tasks]
    assert set(whole.tuned) == {"quadratic/adam", "tiny/adam"}
    rows = [row for part in parts for row in part.rows()]
    assert whole.rows() == rows
    cells = transfer_matrix(rows)
    assert [(cell["rule"], cell["task"], cell["own"]) for cell in cells] == [
        ("mine", "quadratic", True), ("mine", "tiny", False),
    ]  # fmt: skip
    (row,) = (
        row for row in parts[1].rows()
        if row["metric"] == "mean_train_loss" and row["kind"] == "learned"
    )  # fmt: skip
    assert [cells[1][key] for key in ("ratio", "low", "high", "against")] == [
        row[key] for key in ("ratio", "ratio_low", "ratio_high", "against")
    ]


def test_the_ratio_is_to_the_best_baseline_and_diverged_runs_are_a_share(monkeypatch):
    def pretend(task, make, seeds, steps, copies, test=False):
        learned = "by_rule" in make.__qualname__
        losses = np.full((len(seeds), steps), 1.0 if learned else 2.0)
        if learned and task.name == "tiny":
            losses[0, 5] = np.nan
        return losses, {}

    monkeypatch.setattr(run, "train", pretend)
    tasks = [Quadratic(3), make_tiny_task()]
    result = transfer({"mine": fresh()}, tasks, ["adam", "sgd"], **{**FEW, "seeds": 4})
    for metric in ("mean_train_loss", "final_train_loss"):
        one, two = transfer_matrix(result.rows(), metric)
        assert (one["ratio"], one["diverged"]) == (0.5, 0.0)
        # Three runs of loss 1 and one that counts as ten times its initial loss.
        assert (two["ratio"], two["diverged"]) == (pytest.approx(13 / 4 / 2), 0.25)


def test_an_interrupted_transfer_goes_on_where_it_stopped(tmp_path, monkeypatch):
    original, trained = run.train, []

    def counted(task, *arguments):
        trained.append(task.name)
        return original(task, *arguments)

    monkeypatch.setattr(run, "train", counted)

    class Stopped(Quadratic):
        name = "stopped"

        def batch(self, generator, split):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer([fresh()], [Quadratic(3), Stopped(3)], ["adam"], cache=tmp_path, **FEW)
    assert set(trained) == {"quadratic"}
    trained.clear()
    transfer([fresh()], [Quadratic(3), make_tiny_task()], ["adam"], cache=tmp_path, **FEW)
    assert set(trained) == {"tiny"}


def test_nothing_to_transfer():
    for rules, tasks in (([], [Quadratic(3)]), ([fresh()], [])):
        with pytest.raises(ValueError, match="needs a rule and a task"):
            transfer(rules, tasks, ["adam"], **FEW)
    with pytest.raises(ValueError, match="2 tasks are called 'quadratic'"):
        transfer([fresh()], [Quadratic(3), Quadratic(4)], ["adam"], **FEW)
