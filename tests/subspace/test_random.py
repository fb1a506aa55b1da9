"""Random subspaces: orthonormal, uniform, as seeded."""

from __future__ import annotations

import pytest
import torch
from tests.subspace.runs import flat, network, seeded
from tests.subspace.test_basis import dense
from torch import nn

from stepsmith.subspace import gaussian, per_layer, random
from stepsmith.subspace.layers import _groups
from stepsmith.subspace.layout import TypedLayout


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("d", [1, 7, 63])
def test_rows_are_orthonormal(dtype, close, d, monkeypatch):
    monkeypatch.setattr(gaussian, "BLOCK", 10)
    made = random(network(dtype=dtype), d, generator=seeded())
    assert made.blocks[0].dtype == dtype
    assert made.deviation() < close


def test_a_seed_means_a_basis():
    first, again, other = (random(network(), 3, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.blocks[0], again.blocks[0])
    assert not torch.equal(first.blocks[0], other.blocks[0])
    torch.manual_seed(5)
    drawn = random(network(), 3)
    assert not torch.equal(drawn.blocks[0], first.blocks[0])


def test_directions_are_uniform():
    """E[P^T P] = d/N: every coordinate gets its share of a projected vector's square."""
    draws = [dense(random(network(), 8, generator=seeded(s))) for s in range(300)]
    mean = torch.stack([(p**2).sum(0) for p in draws]).mean(0)
    assert float((mean - 8 / 63).abs().max()) < 5 * (2 * 8 / 63**2 / 300) ** 0.5
    assert abs(float(torch.stack(draws).mean())) < 5 * (63 * 300 * 8 * 63) ** -0.5


def test_the_origin_is_the_model_as_it_is():
    model = network(seed=4)
    made = random(model, 3)
    assert torch.equal(made.origin, flat(model.parameters()))
    assert made.buffers.keys() == dict(model.named_buffers()).keys()
    before = made.origin.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(made.origin, before)


def test_per_layer_random_is_block_diagonal():
    made = per_layer(network(), 6, by="tensor", generator=seeded())
    assert [tuple(block.shape) for block in made.blocks] == [
        (6, 30), (5, 5), (5, 5), (5, 5), (6, 15), (3, 3),
    ]  # fmt: skip
    assert made.deviation() < 1e-12
    assert made.dim == 30


def test_more_directions_than_parameters():
    with pytest.raises(ValueError, match="d = 64 directions asked for, but the model has only 63"):
        random(network(), 64)
    for d in (0, 2.0, True, "four", None):
        with pytest.raises(ValueError, match=f"random: d must be a whole number, .* got {d!r}"):
            random(network(), d)


def test_parameters_may_come_by_name():
    model = network()
    made = [random(given, 2, generator=seeded(1)) for given in (model, model.named_parameters())]
    assert torch.equal(made[0].blocks[0], made[1].blocks[0])
    with pytest.raises(TypeError, match="a subspace goes by the names of parameters"):
        random(model.parameters(), 2)


def test_what_belongs_to_a_trajectory_is_refused_with_a_model():
    for given in ({"centred": False}, {"block": 8}, {"params": ["0.bias"]}):
        with pytest.raises(ValueError, match="belong to a trajectory, not to a model"):
            per_layer(network(), 2, **given)


@pytest.mark.parametrize("place", [0, 1])
def test_empty_tensors_join_the_first_layer(place):
    params = {"a": torch.ones(5), "b": torch.ones(4)}
    names = ["a", "b"]
    names.insert(2 * place, "none")
    tensors = {**params, "none": torch.empty(0)}
    layout = TypedLayout.of({name: tensors[name] for name in names})
    assert _groups(layout, "tensor") == [["a", "none"], ["b"]]
    with pytest.raises(ValueError, match="per_layer: all tensors are empty: none"):
        _groups(TypedLayout.of({"none": torch.empty(0)}), "tensor")


def test_models_without_a_subspace():
    with pytest.raises(ValueError, match="does any require a gradient"):
        random(nn.Tanh(), 1)
    broken = network()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model's weights are not finite"):
        random(broken, 2)
    with pytest.raises(ValueError, match="dtype must be one of"):
        random(network(), 2, dtype=torch.int8)


def test_generators_that_are_none():
    with pytest.raises(TypeError, match=r"random: generator must be a torch.Generator, got 0; "):
        random(network(), 2, generator=0)
    with pytest.raises(TypeError, match="per_layer: generator must be"):
        per_layer(network(), 2, generator=0)
