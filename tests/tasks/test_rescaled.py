"""Random scaling leaves what is computed as it was, and changes what a good step is."""

from __future__ import annotations

import math

import pytest
import torch

from stepsmith.meta import meta_train
from stepsmith.rules import make_rule
from stepsmith.tasks import Quadratic, RandomlyScaled, make_task
from stepsmith.unroll import Copies


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("per", ["coordinate", "tensor"])
def test_the_start_computes_what_it_did(per):
    plain = make_task("mlp-mnist", source="sample", dtype=torch.float64)
    scaled = RandomlyScaled(plain, per=per)
    batch = plain.batch(seeded(1), "train")
    want, _, _ = plain.loss(*plain.init(seeded(0)), batch, None, True)
    got, _, _ = scaled.loss(*scaled.init(seeded(0)), batch, None, True)
    torch.testing.assert_close(got, want)


def test_gradients_are_multiplied_by_the_units():
    plain = make_task("mlp-mnist", source="sample", dtype=torch.float64)
    scaled = RandomlyScaled(plain, 2.0)
    pair = [Copies(plain, [0, 1]), Copies(scaled, [0, 1])]
    batch = plain.batches([seeded(5), seeded(6)], "train")
    (losses, grads), (same, turned) = (copies.gradients(batch) for copies in pair)
    torch.testing.assert_close(same, losses)
    units = pair[1].layout.flatten(
        {name: pair[1].buffers[f"unit of {name}"][1] for name in pair[1].layout.names}
    )
    torch.testing.assert_close(turned[1], grads[1] * units)
    torch.testing.assert_close(pair[1].theta[1] * units, pair[0].theta[1])
    logs = units.log()
    # Uniform in [-2, 2]: standard deviation 4 / sqrt(12).
    assert float(logs.abs().max()) <= 2
    assert float(logs.std()) == pytest.approx(4 / math.sqrt(12), rel=0.02)
    assert float(logs.mean()) == pytest.approx(0, abs=0.05)


def test_a_tensor_has_one_unit_and_every_start_its_own():
    scaled = RandomlyScaled(Quadratic(4), per="tensor")
    units = [scaled.init(seeded(seed))[1]["unit of x"] for seed in range(3)]
    assert all(unit.shape == () for unit in units)
    assert len({float(unit) for unit in units}) == 3


def test_meta_training_runs_on_it_and_its_name_says_so():
    scaled = RandomlyScaled(Quadratic(4), 1.5)
    assert scaled.name == "quadratic, scaled by coordinate 1.5"
    trained = meta_train(scaled, make_rule("joined", hidden=4), steps=200, horizon=10, copies=2)
    assert all(map(math.isfinite, (v["score"] for v in trained.manifest["validations"])))


@pytest.mark.parametrize("spread", [0.0, -1.0, 25.0, math.nan])
def test_refused_spreads(spread):
    with pytest.raises(ValueError, match="spread must lie in"):
        RandomlyScaled(Quadratic(), spread)


def test_refused_choice():
    with pytest.raises(ValueError, match="per must be one of"):
        RandomlyScaled(Quadratic(), per="layer")
