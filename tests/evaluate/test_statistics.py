"""From records to rows, each by its definition."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stepsmith.evaluate.records import Key, Records
from stepsmith.evaluate.statistics import (
    diverged,
    first_reach,
    resamples,
    score,
    smoothed,
    summarise,
)

STEPS, SEEDS = 50, 12
STEP = np.arange(STEPS)


def curve(rate: float, seed: int = 0, noise: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 2 * np.exp(-rate * STEP) + 0.1 + noise * rng.random((SEEDS, STEPS))


def made(**runs: np.ndarray) -> Records:
    """Records of `learned` and tuned baselines named otherwise."""
    records = Records()
    for name, losses in runs.items():
        learned = name == "learned"
        key = Key(
            task="toy", optimizer=name, horizon=STEPS, kind="learned" if learned else "baseline",
            tuned_for="" if learned else "mean,final", hyper_parameters=json.dumps({"lr": 0.1}),
        )  # fmt: skip
        steps = range(losses.shape[1])
        records.add(key, "train_loss", losses, seeds=range(len(losses)), steps=steps, split="train")
    return records


def row(records: Records, optimizer: str, metric: str) -> dict:
    (found,) = [
        r for r in summarise(records) if r["optimizer"] == optimizer and r["metric"] == metric
    ]
    return found


def test_mean_and_final_loss():
    losses = curve(0.1)
    np.testing.assert_allclose(score(losses, "mean"), losses.mean(1))
    np.testing.assert_allclose(score(losses, "final"), losses[:, -5:].mean(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_a_diverged_run_counts_as_ten_times_its_initial_loss(bad):
    losses = curve(0.1)
    losses[3, 20] = bad
    assert diverged(losses).tolist() == [i == 3 for i in range(SEEDS)]
    for criterion in ("mean", "final"):
        assert score(losses, criterion)[3] == pytest.approx(10 * losses[3, 0])
    found = row(made(learned=losses, adam=curve(0.2)), "learned", "final_train_loss")
    assert found["diverged"] == 1
    assert found["seeds"] == SEEDS


def test_ratio_is_against_the_best_baseline_with_a_paired_interval():
    learned, adam, nag = curve(0.2, 1), curve(0.1, 2), curve(0.05, 3)
    found = row(made(learned=learned, adam=adam, nag=nag), "learned", "mean_train_loss")
    assert found["against"] == "adam"
    assert found["ratio"] == pytest.approx(learned.mean() / adam.mean())
    index = resamples(SEEDS)
    ratios = learned.mean(1)[index].mean(1) / adam.mean(1)[index].mean(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert found["ratio_low"] == pytest.approx(low, rel=1e-3)
    assert found["ratio_high"] == pytest.approx(high, rel=1e-3)
    assert row(made(learned=learned, adam=adam), "adam", "mean_train_loss")["ratio"] == 1


def test_pairing_cancels_what_seeds_share():
    hardness = np.random.default_rng(0).random((SEEDS, 1)) * 5
    learned, adam = (curve(0.1) + hardness) * 0.9, curve(0.1) + hardness
    found = row(made(learned=learned, adam=adam), "learned", "mean_train_loss")
    assert found["ratio_high"] - found["ratio_low"] < 1e-9
    assert found["high"] - found["low"] > 1


def test_each_metric_takes_the_baseline_tuned_for_it():
    records = made(learned=curve(0.1))
    for tuned_for, rate in (("mean", 0.3), ("final", 0.01)):
        key = Key(
            task="toy", optimizer="adam", horizon=STEPS, kind="baseline", tuned_for=tuned_for,
            hyper_parameters=json.dumps({"lr": rate}),
        )  # fmt: skip
        records.add(key, "train_loss", curve(rate), seeds=range(SEEDS), steps=STEP)
    assert row(records, "adam", "mean_train_loss")["hyper_parameters"] == {"lr": 0.3}
    assert row(records, "adam", "final_train_loss")["hyper_parameters"] == {"lr": 0.01}


def test_smoothing_is_a_trailing_mean():
    values = np.random.default_rng(0).random(30)
    want = [values[max(0, i - 9) : i + 1].mean() for i in range(30)]
    np.testing.assert_allclose(smoothed(values), want)


def test_noise_does_not_meet_a_target_that_the_curve_stays_above():
    noise_ST = np.random.default_rng(0).normal(0, 0.1, (20, 1000))
    assert np.isinf(first_reach(1.05 + noise_ST, 1.0)).all()


def test_the_steps_to_a_baseline_lie_within_their_interval():
    generator = np.random.default_rng(1)
    base_T = 0.2 + 2.0 / (1 + np.arange(1000) / 20)
    runs = {name: factor * base_T + generator.normal(0, 0.1, (16, 1000))
            for name, factor in (("learned", 0.97), ("nag", 1.0))}  # fmt: skip
    for name in runs:
        found = row(made(**runs), name, "steps_to_baseline")
        assert found["low"] <= found["mean"] <= found["high"], name


def test_few_seeds_have_the_range_of_single_ones():
    learned, nag = curve(0.3)[:3], curve(0.1)[:3]
    found = row(made(learned=learned, nag=nag), "learned", "mean_train_loss")
    assert (found["low"], found["high"]) == (learned.mean(1).min(), learned.mean(1).max())
    ratios_S = learned.mean(1) / nag.mean(1)
    assert (found["ratio_low"], found["ratio_high"]) == (ratios_S.min(), ratios_S.max())


def test_steps_until_the_smoothed_curve_first_meets_the_target():
    line = np.linspace(1, 0, 101)
    # Smoothed over 10: the mean of steps t-9..t is 1 - (t - 4.5) / 100; it meets 0.5 at t = 54.5,
    # so at step 55, after which 56 steps' losses have been seen.
    assert first_reach(line, 0.5) == 56
    # A horizon of 20 is smoothed over its last tenth, 2 steps.
    assert first_reach(np.linspace(1, 0, 21)[:20], 0.5) == 12
    assert first_reach(line, -1.0) == math.inf
    # A target that is the mean of few steps is met over as few.
    assert first_reach(line, 0.5, 1) == 51
    # What a curve comes down to is not lost beside where it began.
    steep = 100 * np.exp(-0.02 * np.arange(1000))
    assert first_reach(steep, steep[-100:].mean()) == 1000
    lucky = np.ones(100)
    lucky[0] = 0.0
    assert first_reach(lucky, 0.5) == math.inf


def test_steps_to_baseline_and_a_target_never_reached():
    fast, adam, slow = curve(0.3, noise=0), curve(0.1, noise=0), curve(0.01, noise=0)
    records = made(learned=fast, adam=adam, sgd=slow)
    learned = row(records, "learned", "steps_to_baseline")
    own = row(records, "adam", "steps_to_baseline")
    target = adam[0, -5:].mean()
    assert learned["mean"] == first_reach(fast[0], target)
    assert learned["ratio"] == pytest.approx(learned["mean"] / own["mean"])
    assert own["ratio"] == 1
    never = row(records, "sgd", "steps_to_baseline")
    assert never["mean"] is None
    assert never["ratio"] is None


def test_seconds_are_steps_times_seconds_per_step():
    records = made(learned=curve(0.3), adam=curve(0.1))
    for name, seconds in (("learned", 0.004), ("adam", 0.001)):
        key = Key(task="toy", optimizer=name, purpose="cost", horizon=STEPS)
        times = seconds * np.array([1.0, 1.1, 0.9, 1.0, 9.0])
        records.add(key, "seconds_per_step", times, seeds=range(5), steps=[0])
    per_step = row(records, "learned", "seconds_per_step")
    assert per_step["median"] == pytest.approx(0.004)
    assert per_step["ratio"] == pytest.approx(4)
    steps = row(records, "learned", "steps_to_baseline")
    seconds = row(records, "learned", "seconds_to_baseline")
    assert seconds["mean"] == pytest.approx(steps["mean"] * 0.004)
    assert seconds["ratio"] == pytest.approx(steps["ratio"] * 4)


def test_accuracies_are_compared_in_points():
    records = made(learned=curve(0.3), adam=curve(0.1))
    for block in list(records.blocks):
        value = 0.9 if block.key.optimizer == "learned" else 0.8
        records.add(
            block.key, "test_accuracy", np.full((SEEDS, 1), value), seeds=range(SEEDS), steps=[50]
        )
    found = row(records, "learned", "test_accuracy")
    assert found["ratio"] == pytest.approx(10)
    assert found["against"] == "adam"


def test_no_baseline_no_ratio():
    found = row(made(learned=curve(0.1)), "learned", "mean_train_loss")
    assert found["ratio"] is None
    assert found["against"] == ""


def test_summaries_are_json():
    losses = curve(0.1)
    losses[:, 5] = np.nan
    json.dumps(summarise(made(learned=losses, adam=curve(0.1))), allow_nan=False)
