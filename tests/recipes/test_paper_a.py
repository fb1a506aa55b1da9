"""Paper A: protocols, the price, what recipes derive."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stepsmith import load
from stepsmith.evaluate import Key, Records
from stepsmith.evaluate.cost import StepTime
from stepsmith.evaluate.statistics import interval, resamples
from stepsmith.meta import meta_train
from stepsmith.meta.trainer import Run
from stepsmith.recipes import QUICK, Study
from stepsmith.recipes.paper_a import price, published
from stepsmith.recipes.paper_a.cost_model import CostModel, Costs, trainings
from stepsmith.recipes.paper_a.figures import halved
from stepsmith.recipes.paper_a.meta_cost import MetaCost, Spent, meta_cost, validation_share
from stepsmith.recipes.paper_a.preprocessing import harm
from stepsmith.recipes.paper_a.rules import TECHNIQUES, learned
from stepsmith.recipes.paper_a.techniques import against_plain
from stepsmith.recipes.study import Horizon
from stepsmith.tasks import Quadratic


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
    assert all(entry["same"] for entry in found)


def test_harm_counts_what_is_no_number_as_ten_times_the_start():
    records = noisy_records()
    (block,) = records.select("train_loss", task="toy, noisy", optimizer="steady")
    block.values[0, 30:] = np.nan
    (found,) = [e for e in harm(records, "toy", "toy, noisy", 20) if e["optimizer"] == "steady"]
    assert found["ratio"] == pytest.approx((10 + 5 * 1.1) / 6)


def made_costs(parameters: int, batch: int) -> Costs:
    gradient = 1e-4 + 2e-10 * parameters * batch
    rule, baseline = 5e-5 + 1e-8 * parameters, 2e-5 + 1e-9 * parameters
    meta = 3e-4 + 1.5e-8 * parameters + 2e-10 * parameters * batch
    return Costs(parameters, batch, gradient, rule, baseline, meta)


def made_model() -> CostModel:
    sizes, batches = (16_000, 100_000, 320_000), (32, 128, 512)
    return CostModel.fit([made_costs(size, batch) for size in sizes for batch in batches])


def test_the_cost_model_finds_the_costs_it_was_made_from():
    truth, guess = made_costs(70_000, 256), made_model().seconds(70_000, 256)
    for name in ("gradient", "rule", "baseline", "meta"):
        assert getattr(guess, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    coefficients = made_model().coefficients.values()
    assert all(value >= 0 for values in coefficients for value in values)


@pytest.mark.parametrize("outside", [(15_999, 128), (320_001, 128), (70_000, 31), (70_000, 513)])
def test_nothing_outside_the_fit_is_predicted(outside):
    model = made_model()
    assert model.covers(16_000, 32)
    assert model.covers(320_000, 512)
    assert not model.covers(*outside)
    with pytest.raises(ValueError, match="outside what it was fitted to, 16,000 to 320,000"):
        model.seconds(*outside)


def test_what_the_model_is_asked_about_lies_within_the_fit(cache):
    study = Study("one", QUICK, cache)
    sizes = [
        sum(value.numel() for value in study.task(f"{net}-mnist").init(seeded())[0].values())
        for net in price.FITTED
    ]
    assert min(sizes) <= min(price.SIZES)
    assert max(price.SIZES) <= max(sizes)
    held_out, batch = price.HELD_OUT
    parameters = sum(value.numel() for value in study.task(held_out).init(seeded())[0].values())
    assert min(sizes) < parameters < max(sizes)
    assert parameters not in sizes
    assert batch not in price.BATCHES
    assert min(price.BATCHES) < batch < max(price.BATCHES)


def test_trainings_until_repaid():
    costs = Costs(10, 10, gradient=4.0, rule=1.0, baseline=0.0, meta=6.0)
    steps = {"rule_steps": 60, "baseline_steps": 100, "meta_steps": 500}
    assert trainings(costs, **steps) == pytest.approx(500 * 6 / (100 * 4 - 60 * 5))
    assert trainings(costs, **{**steps, "rule_steps": None}) is None
    slow = Costs(10, 10, gradient=1.0, rule=5.0, baseline=0.0, meta=6.0)
    assert trainings(slow, **steps) is None


PAIR = {"against": "nag", "horizon": 100, "steps": 40.0, "baseline_steps": 90.0}


def test_predictions_keep_to_the_measured_horizon_and_the_rules_own_inner_steps():
    found = price.pays(made_model(), PAIR, inner_steps=300_000)
    assert len(found["repaid_after"]) == len(price.SIZES) * len(price.BATCHES)
    for entry in found["repaid_after"]:
        assert entry["horizon"] == 100
        costs = made_costs(entry["parameters"], entry["batch"])
        saved = 90 * (costs.gradient + costs.baseline) - 40 * (costs.gradient + costs.rule)
        want = 300_000 * costs.meta / saved if saved > 0 else None
        assert entry["trainings"] == (want and pytest.approx(want))
    assert any(entry["trainings"] is not None for entry in found["repaid_after"])
    assert "the MLP's" in found["assumption"]
    assert "nag's final loss" in found["assumption"]
    assert "16,000 to 320,000" in found["range"]
    never = price.pays(made_model(), {**PAIR, "steps": None}, inner_steps=300_000)
    assert {entry["trainings"] for entry in never["repaid_after"]} == {None}


def judged(own: dict, scale: float = 1.0) -> dict:
    truth = made_costs(178_310, 256)
    truth = dataclasses.replace(truth, meta=truth.meta * scale)
    found = price.judged(made_model(), truth, PAIR, own, inner_steps=1000)
    return found["predictions"]


def test_the_end_result_is_judged_too():
    costs = made_costs(178_310, 256)
    own = {
        "against": "momentum", "steps": 40.0, "baseline_steps": 90.0, "trainings": 1.0,
        "seconds": 40 * (costs.gradient + costs.rule),
        "baseline_seconds": 90 * (costs.gradient + costs.baseline),
    }  # fmt: skip
    found = judged(own)
    assert all(entry["within"] for entry in found.values())
    assert found["trainings until repaid"]["error"] == pytest.approx(0, abs=1e-6)
    found = judged(own, scale=2.0)
    assert found["rule's training step, s"]["within"]
    for name in ("inner step of meta-training, s", "trainings until repaid"):
        assert found[name]["error"] == pytest.approx(-0.5)
        assert not found[name]["within"]
    slower = judged({**own, "trainings": None})["trainings until repaid"]
    assert slower["error"] is None
    assert not slower["within"]


def test_validations_are_a_part_of_what_meta_training_costs():
    cost = MetaCost(Spent(3.0, 4.0), Spent(2.0, 1.0), validation_share=0.5, inner_steps=10)
    assert cost.inner_step == pytest.approx((3.0 + 0.5 * 2.0, 4.0 + 0.5 * 1.0))
    assert cost.whole == pytest.approx((40.0, 45.0))


def test_meta_training_is_timed_in_its_own_configuration(monkeypatch):
    config = {"horizon": 12, "window": 4, "copies": 3, "samples": None, "validation_copies": 5,
              "validation_horizon": 30, "lr": 1e-3}  # fmt: skip
    task = Quadratic(3)
    trained = meta_train(task, steps=72, validations=2, **config)
    assert validation_share(trained.manifest) == pytest.approx(3 * 5 * 30 / 72)
    seen = []
    window = Run.window

    def watched(run: Run):
        seen.append(run.config)
        return window(run)

    monkeypatch.setattr(Run, "window", watched)
    cost = meta_cost([task], trained, rounds=2)
    assert len(seen) == 3 * 12 // 4  # a round that warms up, then two; three windows an episode
    for name, value in {**config, "validation_horizon": 25}.items():
        assert getattr(seen[0], name) == value
    assert cost.inner_steps == 72
    assert cost.validation_share == validation_share(trained.manifest)
    assert min(*cost.step, *cost.validation_step) > 0
    further = meta_train(task, trained, steps=72, validations=2, **config)
    with pytest.raises(ValueError, match="meta-trained in stages"):
        meta_cost([task], further, rounds=1)


def test_the_cost_of_an_optimizee_is_beside_the_pairs_own_baseline(cache, monkeypatch):
    made = {}

    def timed(task, optimizers, rounds):
        for name, make in optimizers.items():
            made[name] = make([torch.nn.Parameter(torch.zeros(3))])
        return {"rule": [StepTime(5.0, 1.0, 1.0)], "baseline": [StepTime(3.0, 1.0, 1.0)]}

    monkeypatch.setattr(price, "seconds_per_step", timed)
    cost = MetaCost(Spent(3.0, 3.0), Spent(2.0, 2.0), 0.5, 10)
    monkeypatch.setattr(price, "meta_cost", lambda tasks, trained, rounds: cost)
    study = Study("one", QUICK, cache)
    found = price.measure(study, "mlp20-relu-mnist", 32, load("mlp-mnist"), "nag")
    assert made["baseline"].defaults["nesterov"] is True
    assert (found.batch, found.gradient, found.rule, found.baseline) == (32, 1.0, 4.0, 2.0)
    assert found.meta == pytest.approx(4.0)


def add_pair(records: Records, protocol: str, step: float, checkpoint: str) -> None:
    """A rule that reaches Adam's final loss in fewer steps, on the task `toy`."""
    curves = {"LSTM": 0.3, "adam": 0.06}
    for name, rate in curves.items():
        learned_one = name == "LSTM"
        key = Key(
            protocol=protocol, task="toy", optimizer=name, horizon=100, checkpoint=checkpoint,
            kind="learned" if learned_one else "baseline",
            tuned_for="" if learned_one else "mean,final",
        )  # fmt: skip
        losses = np.tile(2 * np.exp(-rate * np.arange(100)) + 0.3, (4, 1))
        records.add(key, "train_loss", losses, seeds=range(4), steps=range(100), split="train")
        cost = dataclasses.replace(key, purpose="cost")
        for metric, value in (("seconds_per_step", step), ("core_seconds_per_step", 2 * step)):
            records.add(cost, metric, [value] * 3, seeds=range(3), steps=[0])
        if learned_one:
            meta = dataclasses.replace(key, purpose="meta")
            records.add(meta, "meta_training_seconds", [999.0], seeds=[0], steps=[0])
            records.add(meta, "meta_training_core_seconds", [999.0], seeds=[0], steps=[0])


def test_pairs_are_priced_by_what_meta_training_takes_here():
    records = Records()
    add_pair(records, "corrected", 1e-3, "a")
    add_pair(records, "as-published", 2e-3, "b")
    costs = {
        "a": MetaCost(Spent(0.1, 0.3), Spent(0.0, 0.0), 0.0, 100),
        "b": MetaCost(Spent(0.5, 0.5), Spent(0.0, 0.0), 0.0, 100),
    }
    price.record_again(records, costs)
    corrected, as_published = price.price_pairs(records)
    assert (corrected["protocol"], as_published["protocol"]) == ("corrected", "as-published")
    assert corrected["meta_seconds"] == pytest.approx(10)
    assert as_published["meta_seconds"] == pytest.approx(50)
    assert corrected["training_seconds"] == pytest.approx(100 * 1e-3)
    assert corrected["training_core_seconds"] == pytest.approx(100 * 2e-3)
    assert corrected["meta_to_training"] == pytest.approx(10 / 0.1)
    assert corrected["meta_to_training_cores"] == pytest.approx(30 / 0.2)
    assert as_published["step_ms"] == pytest.approx(2)  # not mixed with the other protocol's
    saved = (corrected["baseline_steps"] - corrected["steps"]) * 1e-3
    assert corrected["trainings"] == pytest.approx(10 / saved)


def test_published_rules_are_timed_beside_the_papers_baselines(cache):
    study = Study("one", dataclasses.replace(QUICK, first=Horizon(4, 2, 1)), cache)
    trained = learned(study, "published-quadratic")
    published.compare(study, "quadratic", {"LSTM": trained})
    assert not list(study.records.select(purpose="cost"))
    published.compare(study, "quadratic", {"LSTM": trained}, timing=True)
    timed = list(study.records.select("core_seconds_per_step", protocol=published.PROTOCOL))
    names = {block.key.optimizer for block in timed}
    assert names == {"LSTM", *published.RATES["quadratic"]}
    assert all((block.values > 0).all() for block in timed)


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
