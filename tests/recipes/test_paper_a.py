"""Paper A: protocols, the price, what recipes derive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepsmith.evaluate import Key, Records
from stepsmith.evaluate.statistics import interval, resamples
from stepsmith.recipes import QUICK, Study
from stepsmith.recipes.paper_a import published
from stepsmith.recipes.paper_a.figures import halved
from stepsmith.recipes.paper_a.preprocessing import harm
from stepsmith.recipes.paper_a.price import CostModel, Costs, trainings
from stepsmith.recipes.paper_a.rules import TECHNIQUES, learned
from stepsmith.recipes.paper_a.techniques import against_plain


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_published_transfers_ran_at_half_the_multiplier(cache):
    trained = learned(Study("one", QUICK, cache), "published-quadratic")
    assert halved(trained).rule.config()["step_scale"] == 0.5
    assert halved(trained).fingerprint == trained.fingerprint


def test_published_tasks_train_batch_norm_for_adam_alone(cache):
    made = [
        published.task(Study("one", QUICK, cache), "convnet-mnist", affine=affine)
        for affine in (True, False)
    ]
    with_norm, without = (set(task.init(seeded())[0]) for task in made)
    assert with_norm - without == {"norm.weight", "norm.bias"}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_published_rate_names_a_task_that_can_be_made(cache):
    for name in published.RATES:
        assert published.task(Study("one", QUICK, cache), name).name == name


def noisy_records() -> Records:
    records, seeds, steps = Records(), range(6), range(40)
    clean = np.ones((6, 40))
    for name, after in (("steady", 1.1), ("shaken", 3.0)):
        shaken = clean.copy()
        shaken[:, 20:25] = after
        shaken[:, 19] = 50.0  # the noisy batch's own loss is not counted
        for task, values in (("toy", clean), ("toy, noisy", shaken)):
            key = Key(task=task, optimizer=name, kind="learned", horizon=40)
            records.add(key, "train_loss", values, seeds=seeds, steps=steps, split="train")
    return records


def test_harm_is_that_of_the_steps_after_a_noisy_batch():
    found = harm(noisy_records(), "toy", "toy, noisy", every=20)
    assert [entry["optimizer"] for entry in found] == ["steady", "shaken"]
    assert [entry["ratio"] for entry in found] == pytest.approx([1.1, 3.0])
    assert found[0]["low"] == pytest.approx(1.1)


def made_costs(parameters: int, batch: int) -> Costs:
    gradient = 1e-4 + 2e-10 * parameters * batch
    rule, baseline = 5e-5 + 1e-8 * parameters, 2e-5 + 1e-9 * parameters
    meta = 3e-4 + 1.5e-8 * parameters + 2e-10 * parameters * batch
    return Costs(parameters, batch, gradient, rule, baseline, meta)


def test_the_cost_model_finds_the_costs_it_was_made_from():
    fitted = CostModel.fit(
        [made_costs(p, b) for p in (1000, 30_000, 200_000) for b in (32, 128, 512)]
    )
    truth, guess = made_costs(70_000, 256), fitted.seconds(70_000, 256)
    for name in ("gradient", "rule", "baseline", "meta"):
        assert getattr(guess, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert all(value >= 0 for values in fitted.coefficients.values() for value in values)


def test_trainings_until_repaid():
    costs = Costs(10, 10, gradient=4.0, rule=1.0, baseline=0.0, meta=6.0)
    steps = {"rule_steps": 60, "baseline_steps": 100, "meta_steps": 500}
    assert trainings(costs, **steps) == pytest.approx(500 * 6 / (100 * 4 - 60 * 5))
    slow = Costs(10, 10, gradient=1.0, rule=5.0, baseline=0.0, meta=6.0)
    assert trainings(slow, **steps) is None


def techniques(levels: dict[str, float], noise: float = 0.0) -> Records:
    """Losses of rules by name: their level, times the same noise for all on the same seed."""
    records = Records()
    noise_S = 1 + noise * np.random.default_rng(0).standard_normal((8, 1))
    for optimizer, level in levels.items():
        key = Key(recipe="t", scale="t", task="toy", optimizer=optimizer, kind="learned",
                  purpose="test", horizon=20)  # fmt: skip
        values = level * noise_S * np.ones((8, 20))
        records.add(key, "train_loss", values, seeds=range(8), steps=range(20), split="train")
    return records


def test_techniques_are_compared_with_the_plain_meta_training_of_their_seed():
    levels = {"plain, seed 0": 1.0, "plain, seed 1": 2.0, "x, seed 0": 0.5, "x, seed 1": 4.0}
    rows = against_plain(techniques(levels), ["plain", "x"], [0, 1])
    found = {(row["criterion"], row["technique"]): row for row in rows}
    assert found["mean", "x"]["ratios"] == [0.5, 2.0]
    assert found["final", "x"]["ratio"] == pytest.approx(1.0)
    assert found["mean", "plain"]["ratio"] == 1.0


def test_a_techniques_interval_is_that_of_paired_test_seeds():
    records = techniques({"plain, seed 0": 1.0, "x, seed 0": 0.5}, noise=0.1)
    (paired,) = (row for row in against_plain(records, ["plain", "x"], [0])
                 if (row["criterion"], row["technique"]) == ("mean", "x"))  # fmt: skip
    assert (paired["low"], paired["high"]) == pytest.approx((0.5, 0.5))
    blocks = {block.key.optimizer: block for block in records.blocks}
    blocks["x, seed 0"].values[0] *= 3  # a seed on which the technique does worse
    (found,) = (row for row in against_plain(records, ["plain", "x"], [0])
                if (row["criterion"], row["technique"]) == ("mean", "x"))  # fmt: skip
    losses = {name: block.values.mean(1) for name, block in blocks.items()}
    index = resamples(8)
    drawn = losses["x, seed 0"][index].mean(1) / losses["plain, seed 0"][index].mean(1)
    assert (found["low"], found["high"]) == pytest.approx(interval(drawn))
    assert found["low"] < found["ratio"] < found["high"]


def test_absolute_units_differ_from_the_plain_technique_in_the_rule_alone():
    plain, absolute = TECHNIQUES["plain"], TECHNIQUES["absolute units"]
    assert (plain.tasks, plain.config) == (absolute.tasks, absolute.config)
    assert plain.rule.config()["scaling"] == "relative"
    assert absolute.rule.config() == plain.rule.config() | {
        "scaling": "absolute", "step_scale": 0.1,
    }  # fmt: skip
