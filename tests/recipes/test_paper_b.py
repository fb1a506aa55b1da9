"""SL2O's recipes: bases made once and resumed, what is said of contests, principal directions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.evaluate.test_run import fresh as untrained
from tests.tasks.test_datasets import image_folder

from stepsmith.evaluate import Key, Records
from stepsmith.evaluate.epochs import Contest, Length
from stepsmith.evaluate.statistics import stability
from stepsmith.recipes import QUICK, Study
from stepsmith.recipes.paper_b import choices, comparisons, deep
from stepsmith.recipes.paper_b.clock import clock, outlasting, speed
from stepsmith.recipes.paper_b.comparisons import (
    accuracies,
    against_subspace,
    data_transfer,
    label_task,
    within_subspace,
)
from stepsmith.recipes.paper_b.full_space import FROM_NOTHING, RULES, memory
from stepsmith.recipes.paper_b.principal import claims, statements, updates
from stepsmith.recipes.study import SMALL
from stepsmith.tasks import SubspaceTask
from stepsmith.tasks.image_files import DataError
from stepsmith.unroll import Copies, TorchStepper

NETWORK = "cnn8-bn"  # small enough for every test, and with running statistics


@pytest.fixture
def study(tmp_path):
    return Study("test", QUICK, tmp_path)


def test_a_basis_is_made_once_through_its_start(study, monkeypatch):
    made = deep.place(study, NETWORK)
    assert made.basis.dim == deep.DEPTHS["quick"].directions
    start = Copies(made.task, [deep.SAVED])
    origin = made.basis.parameters(torch.zeros(made.basis.dim))
    assert torch.equal(start.layout.flatten(origin), start.theta[0])
    assert made.seconds > 0
    (spent,) = study.records.select("core_seconds", purpose="spent")
    assert spent.values.item() > 0
    monkeypatch.setattr(deep, "_make_basis", lambda *_: pytest.fail("made again"))
    assert deep.place(study, NETWORK).basis.fingerprint == made.basis.fingerprint
    with pytest.raises(pytest.fail.Exception, match="made again"):
        deep.place(study, NETWORK, seed=deep.FRESH)


def test_an_interrupted_basis_goes_on_to_the_same(study, tmp_path, monkeypatch):
    whole = deep.place(study, NETWORK).basis
    other = Study("test", QUICK, tmp_path / "other")
    written = deep._snapshot

    def stop(folder, copies, number):
        if number == 4:
            raise KeyboardInterrupt
        written(folder, copies, number)

    monkeypatch.setattr(deep, "_snapshot", stop)
    with pytest.raises(KeyboardInterrupt):
        deep.place(other, NETWORK)
    monkeypatch.setattr(deep, "_snapshot", written)
    assert deep.place(other, NETWORK).basis.fingerprint == whole.fingerprint
    assert not list((tmp_path / "other").rglob("snapshots"))


def test_tests_see_other_batches_than_the_basis(study, monkeypatch):
    drawn = []
    rolled = deep.roll

    def watched(copies, *arguments, **options):
        drawn.append(copies.generators[0].initial_seed())
        return rolled(copies, *arguments, **options)

    monkeypatch.setattr(deep, "roll", watched)
    made = deep.place(study, NETWORK)
    seen = {copies.generators[0].initial_seed() for copies in
            (Copies(made.full, [seed]) for seed in range(200))}  # fmt: skip
    assert drawn
    assert not seen & set(drawn)


def test_full_space_and_subspace_begin_alike(study):
    made = deep.place(study, NETWORK)
    full, sub = Copies(made.full, [3]), Copies(made.sub, [3])
    losses = [copies.gradients(copies.batches("train"))[0] for copies in (full, sub)]
    torch.testing.assert_close(*losses)
    assert isinstance(made.sub, SubspaceTask)
    assert sub.theta.shape == (1, made.basis.dim)


def test_rules_and_baselines_meet_under_both_protocols(study):
    here, fresh = deep.place(study, NETWORK), deep.fresh_places(study, NETWORK)
    other = deep.place(study, NETWORK, seed=7)
    rule = untrained("mine")
    against_subspace(
        study, NETWORK, here, fresh, {"mine": rule, "SL2O (elsewhere)": rule},
        homes={"SL2O (elsewhere)": other}, schedules={"cosine": deep.COSINE},
    )  # fmt: skip
    runs = {
        (block.key.protocol, block.key.optimizer): block
        for block in study.records.select("train_loss", purpose="test")
    }
    rules = [f"{rule}{pace}" for pace in ("", ", cosine") for rule in ("mine", "SL2O (elsewhere)")]
    names = {*rules, *deep.SUBSPACE}
    assert runs.keys() == {(p, name) for p in ("as-published", "corrected") for name in names}
    for name in deep.SUBSPACE:  # tuned once, from the saved start
        keys = [runs[protocol, name].key for protocol in ("as-published", "corrected")]
        assert keys[0].parameters == keys[1].parameters
        assert {key.tuned_for for key in keys} == {"final"}
    starts = {float(x) for x in runs["corrected", "mine"].values[:, 0]}
    assert len(starts) == len(fresh)
    found = study.records.select("meta_training_subspace_seconds")
    spent = {(b.key.protocol, b.key.optimizer): float(b.values.item()) for b in found}
    for pace in ("", ", cosine"):
        assert ("as-published", f"mine{pace}") not in spent
        assert spent["corrected", f"mine{pace}"] == here.seconds
        for protocol in ("as-published", "corrected"):
            assert spent[protocol, f"SL2O (elsewhere){pace}"] == other.seconds
            assert runs[protocol, f"SL2O (elsewhere){pace}"].key.meta_task == "elsewhere"
    assert within_subspace(study.records, NETWORK) == [*rules, *deep.SUBSPACE]
    held = [(row["protocol"], row["rule"]) for row in study.findings["against_subspace"]]
    assert held == [(p, name) for p in ("as-published", "corrected") for name in rules]
    assert all(row["with_basis"] is None or row["with_basis"] > row["seconds"]
               for row in study.findings["clock"])  # fmt: skip


def test_data_that_all_is_held_against_must_be_there(study):
    study.data_dir, study.source = "nowhere", "directory"
    with pytest.raises(DataError, match="nowhere"):
        data_transfer(study)


@pytest.fixture
def elsewhere(study, tmp_path, monkeypatch):
    """A data directory, and the sets that `data_transfer` asks for in it, changed by a call."""
    study.data_dir, study.source = str(tmp_path / "data"), "directory"
    monkeypatch.setattr(comparisons, "place", lambda *_: pytest.fail("a basis was begun"))

    def ask(*sets):
        own, *others = sets
        changed = replace(deep.DEPTHS["quick"], data=own, others=tuple(others), sources=())
        monkeypatch.setitem(deep.DEPTHS, "quick", changed)
        data_transfer(study)

    return ask


def test_one_folder_for_several_sets_is_no_transfer(elsewhere, tmp_path):
    image_folder(tmp_path / "data")  # the files themselves, in no folder of a set
    with pytest.raises(DataError, match="cifar10 and cifar100 would both be directory:"):
        elsewhere("cifar10", "cifar10@4", "cifar100")


def test_sets_too_small_are_found_before_anything_is_trained(elsewhere, tmp_path):
    for name in ("one", "two"):
        image_folder(tmp_path / "data" / name)
    with pytest.raises(ValueError, match="two@50000: a subset takes 2 to"):
        elsewhere("one", "two@50000")


def test_a_damaged_set_is_not_taken_for_one_that_is_not_here(elsewhere, tmp_path):
    image_folder(tmp_path / "data" / "one")
    image_folder(tmp_path / "data" / "two")
    damaged = next((tmp_path / "data" / "two").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(DataError, match=damaged.name):
        elsewhere("one", "two")


def test_meta_trainings_that_lost_are_paid_for(study, monkeypatch):
    monkeypatch.setattr(choices, "FACTORS_OF_DM", (0.01, 0.1))
    monkeypatch.setattr(choices, "RATES_OF_DM", (0.01, 0.1))
    monkeypatch.setattr(choices, "against_subspace", lambda *_, **__: None)
    scores = iter([3.0, 2.0, 4.0])  # as published, a larger factor, a larger rate

    def learned(study, label, task, rule=None, **_):
        score = next(scores, 1.0)
        told = {"seconds": 9.0, "core_seconds": score, "validation": {"score": score}}
        return replace(untrained(label), manifest={**told, "name": label})

    monkeypatch.setattr(choices, "learn", learned)
    choices.versus_dm(study)
    assert [row["validation"] for row in study.findings["tuning"]] == [3.0, 2.0, 4.0]
    seconds = study.records.select("meta_training_core_seconds")
    assert [float(block.values.item()) for block in seconds] == [3.0, 2.0, 4.0]


def test_rules_are_told_apart_by_where_they_learned(study):
    made = deep.place(study, NETWORK)
    one = deep.learn(study, "x", made.sub)
    again = deep.learn(study, "x", made.sub)
    other = deep.learn(study, "x", deep.place(study, NETWORK, seed=deep.FRESH).sub)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
    assert one.manifest["meta_training"]["window"] == deep.DEPTHS["quick"].unroll


def contest_records() -> Records:
    """`fast` reaches in 10 steps where `slow` ends after 100; `sub` never does."""
    records = Records()
    steps = np.arange(100)
    losses = {
        "slow": 2 - steps / 100, "fast": np.maximum(2 - steps / 10, 0.9),
        "sub": np.full(100, 1.5),
    }  # fmt: skip
    for name, loss_T in losses.items():
        kind = "learned" if name == "fast" else "baseline"
        key = Key(task="net", optimizer=name, kind=kind, tuned_for="mean,final", horizon=100)
        records.add(key, "train_loss", np.stack([loss_T, loss_T]), seeds=[0, 1], steps=steps)
        accuracy = {"slow": [0.5, 0.5, 0.5], "fast": [0.5, 0.6, 0.7], "sub": [0.1, 0.2, 0.1]}[name]
        records.add(key, "test_accuracy", [accuracy, accuracy], seeds=[0, 1], steps=[33, 66, 100])
        cost = Key(task="net", optimizer=name, purpose="cost")
        records.add(cost, "seconds_per_step", [2.0], seeds=[0], steps=[0])
    meta = Key(task="net", optimizer="fast", purpose="meta")
    records.add(meta, "meta_training_seconds", [500.0], seeds=[0], steps=[0])
    return records


def test_a_rules_own_contest_is_read_from_its_label():
    assert label_task("SL2O (resnet8-cifar10@classes0-4)") == "resnet8-cifar10@classes0-4"
    assert label_task("SL2O, windows of 5") == ""


def test_a_run_that_diverged_is_penalised_as_in_the_tables():
    records = contest_records()
    (block,) = records.select("train_loss", optimizer="slow")
    block.values[1, 50:] = np.nan
    found = speed(records, "net", "corrected", "fast", ["slow"])
    assert found["final_loss"] == pytest.approx((2 - np.arange(90, 100).mean() / 100 + 20) / 2)
    assert found["baseline_steps"] is not None


def test_a_longer_training_is_held_against_the_end_of_a_shorter_one():
    records = contest_records()
    key = Key(task="net, longer", optimizer="slow", kind="baseline", horizon=300)
    loss_T = 2 - np.arange(300) / 200
    records.add(key, "train_loss", np.stack([loss_T, loss_T]), seeds=[0, 1], steps=range(300))
    records.add(key, "test_accuracy", [[0.8], [0.8]], seeds=[0, 1], steps=[300])
    longer = Contest("net, longer", Length(3, 100), [0, 1], Key(), records)
    shorter = Contest("net", Length(1, 100), [0, 1], Key(), records)
    found = outlasting(longer, "slow", shorter, "fast", 70.0)
    end = 2 - np.arange(270, 300).mean() / 200
    assert found["ratio"] == pytest.approx(end / 0.9)
    assert found["ratio_of_each_seed"] == pytest.approx([end / 0.9] * 2)
    assert (found["steps"], found["steps_of_that"]) == (300, 100)
    assert 220 < found["met"] < 300  # smoothed, it lags
    assert found["points_of_accuracy"] == pytest.approx(10)
    assert (found["seconds"], found["with_all"]) == (600, 600)
    assert (found["seconds_of_that"], found["with_all_of_that"]) == (270, 770)
    assert outlasting(shorter, "sub", shorter, "fast", 0.0)["met"] is None


def test_an_optimizer_may_have_been_timed_under_another_name():
    contest = Contest("net", Length(1, 100), [0, 1], Key(), contest_records())
    own = outlasting(contest, "sub", contest, "slow", 0.0)
    other = outlasting(contest, "sub", contest, "slow", 0.0, timed_as="fast")
    assert (own["with_all"], other["with_all"]) == (200, 700)
    assert own["final_loss"] == other["final_loss"]


def test_speed_is_held_against_the_best_of_the_baselines_named():
    found = speed(contest_records(), "net", "corrected", "fast", ["slow", "sub"])
    assert found["against"] == "slow"
    assert found["final_loss"] == pytest.approx(2 - np.arange(90, 100).mean() / 100)
    assert found["baseline_steps"] == 100
    assert found["ratio"] == pytest.approx(found["steps"] / 100)
    assert found["steps"] < 20
    assert found["ratio_of_each_seed"] == [found["ratio"]] * 2
    assert found["points_of_accuracy"] == pytest.approx(20)
    assert found["points_of_each_seed"] == pytest.approx([20, 20])
    assert found["share"] == found["steps"] / 100
    assert found["close"] <= found["steps"]
    assert found["baseline_close"] < found["baseline_steps"]
    assert found["loss_at_half"] == pytest.approx(0.9 / found["final_loss"])
    never = speed(contest_records(), "net", "corrected", "sub", ["slow"])
    assert never["steps"] is None
    assert never["ratio"] is None


def test_accuracies_of_runs_that_diverged_count_as_none():
    records = contest_records()
    (block,) = records.select("train_loss", optimizer="fast")
    block.values[1, 50:] = np.nan
    found = speed(records, "net", "corrected", "fast", ["slow"])
    assert found["points_of_each_seed"] == pytest.approx([20, -50])
    (fast,) = (row for row in accuracies(records) if row["optimizer"] == "fast")
    assert (fast["low"], fast["mean"], fast["high"]) == pytest.approx((0, 35, 70))


def test_stability_is_the_spread_about_a_line_in_the_last_third():
    records = Records()
    steps = [10 * (number + 1) for number in range(12)]
    late_E = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3])
    unrest_E = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, -1, -1, 1]) / 100
    for name, curve_E in (("climbs", 0.5 + late_E / 50), ("shakes", 0.5 + unrest_E)):
        key = Key(task="net", optimizer=name, horizon=120)
        accuracies, losses_ST = [curve_E, curve_E, curve_E], np.ones((3, 120))
        losses_ST[2, 60:] = np.nan  # at rest where it diverged to
        records.add(key, "train_loss", losses_ST, seeds=[0, 1, 2], steps=range(120))
        records.add(key, "test_accuracy", accuracies, seeds=[0, 1, 2], steps=steps)
    steady, other = stability(records, "net", "corrected")
    assert (steady["optimizer"], steady["tests"]) == ("climbs", 4)
    assert steady["spread"] == pytest.approx(0, abs=1e-9)
    # Four residuals of a point each, two degrees of freedom.
    assert other["spread_of_each_seed"] == pytest.approx([2**0.5] * 2)
    assert stability(contest_records(), "net", "corrected") == []


def test_the_clock_counts_basis_and_meta_training_to_both_targets():
    found = clock(
        contest_records(), "net", "corrected", basis_seconds=70.0, subspace=["fast", "sub"]
    )
    rows = {(row["against"], row["optimizer"]): row for row in found}
    assert rows["slow", "slow"]["seconds"] == rows["slow", "slow"]["with_all"] == 200
    fast = rows["slow", "fast"]
    assert fast["with_basis"] == fast["seconds"] + 70
    assert fast["with_all"] == fast["seconds"] + 570
    assert rows["slow", "sub"]["steps"] is None
    assert rows["slow", "sub"]["with_all"] is None
    assert rows["sub", "sub"]["target"] == pytest.approx(1.5)
    records = contest_records()
    own = Key(task="net", optimizer="fast", purpose="meta")
    records.add(own, "meta_training_subspace_seconds", [30.0], seeds=[0], steps=[0])
    found = clock(records, "net", "corrected", basis_seconds=70.0, subspace=["fast", "sub"])
    assert next(row for row in found if row["optimizer"] == "fast")["meta_seconds"] == 530
    assert rows["sub", "sub"]["steps"] is not None


def test_updates_are_the_changes_of_the_coefficients(study):
    made = deep.place(study, NETWORK)
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731

    def make(group):
        return TorchStepper(sgd, group.theta, group.layout)

    losses_ST, updates_STK = updates(made.sub, make, [0, 1], 4, directions=2)
    assert losses_ST.shape == (2, 4)
    copies = Copies(made.sub, [0])
    _, grad_CP = copies.gradients(copies.batches("train"))
    np.testing.assert_allclose(updates_STK[0, 0], -0.1 * grad_CP[0, :2], rtol=1e-5)


def test_what_is_said_of_principal_directions():
    steps = np.arange(100)
    late, early = np.exp(-(((steps - 60) / 8) ** 2)), np.exp(-steps / 10)
    entry = statements(np.stack([late, early, -early], 1)[None])[0]
    assert entry["others_before_first"]
    assert entry["half"][0] == 61
    assert entry["decay"] < 0.1
    flat = statements(np.full((1, 100, 3), 0.2))[0]
    assert flat["spread"] == pytest.approx(0)
    assert flat["decay"] == pytest.approx(1)
    assert not flat["others_before_first"]
    for still in (np.zeros((1, 8, 3)), np.full((1, 8, 3), np.nan)):
        assert set(statements(still)[0].values()) == {None}


def test_claims_are_counted_by_seeds():
    calm = {"size": [1.0], "spread": 0.1, "decay": 0.9, "others_before_first": False}
    wild = {"size": [1.0], "spread": 0.5, "decay": 0.2, "others_before_first": True}
    still = dict.fromkeys(calm)
    found = claims([wild, wild, still, calm], [calm, wild, calm, calm])
    assert [entry["holds"] for entry in found] == [1, 1, 2]
    assert {entry["seeds"] for entry in found} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("label", RULES)
def test_the_memory_of_meta_training_is_that_of_deployment(study, label):
    [found] = memory(study, "resnet8", [label])
    assert 0 < found["training"] < 2 * found["deployment"]
    # A few steps replay a large share of the coordinates: 2 to 3 times, by what the allocator does.
    assert 0.8 < found["ratio"] < 4
    assert found["inner_steps_per_second"] > 0


@pytest.mark.slow
def test_all_of_resnet20_is_meta_trained_in_the_memory_of_deployment(tmp_path):
    [found] = memory(Study("test", SMALL, tmp_path), "resnet20", [FROM_NOTHING])
    assert found["training"] < found["deployment"]
    assert 0.8 < found["ratio"] < 1.3
    assert found["ratio_amid"] > found["ratio"]
