"""The ConvNet's compiled block is its layers."""

from __future__ import annotations

import pytest
import torch

from stepsmith.tasks import make_task
from stepsmith.tasks.networks import residual_block as block
from stepsmith.tasks.networks.residual_block import by_layers, residual_block
from stepsmith.unroll import Copies

pytest.importorskip("numba")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def given(inputs: int, kernel: int, size=(9, 12), batch: int = 5):
    draw = seeded(3)
    images = torch.randn(batch, inputs, *size, generator=draw)
    shapes = [(3, inputs, kernel, kernel), (3,), (3, 3, kernel, kernel), (3,)]
    weights = [torch.randn(shape, generator=draw).div(2).requires_grad_() for shape in shapes]
    return images, tuple(weights)


@pytest.mark.parametrize("size", [(8, 10), (9, 13)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_values_and_gradients_are_those_of_the_layers(activation, inputs, kernel, size):
    images, weights = given(inputs, kernel, size)
    found = residual_block(images, weights, activation)
    assert found.grad_fn is not None
    assert "_Block" in type(found.grad_fn).__name__
    want = by_layers(images, weights, activation)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    by = torch.randn(want.shape, generator=seeded(4))
    got, right = (torch.autograd.grad((out * by).sum(), weights) for out in (found, want))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_gradient():
    images, weights = given(1, 3, (6, 6))

    def twice(run):
        first = torch.autograd.grad(
            run(images, weights, "sigmoid").square().sum(), weights, create_graph=True
        )
        return torch.autograd.grad(sum(part.square().sum() for part in first), weights)

    torch.testing.assert_close(twice(residual_block), twice(by_layers), rtol=1e-4, atol=1e-4)


def test_what_diverged_stays_diverged_in_its_image_alone():
    images, weights = given(1, 3)
    images[2, 0, 4, 4] = torch.nan
    found, want = (run(images, weights, "relu") for run in (residual_block, by_layers))
    assert torch.equal(found.isnan(), want.isnan())
    assert found[2].isnan().any()
    assert not found[[0, 1, 3, 4]].isnan().any()


def test_stacked_copies_have_weights_of_their_own():
    task = make_task("convnet-mnist", source="sample")
    pair = [Copies(task, [1, 2]) for _ in range(2)]
    batch = task.batches([seeded(5), seeded(6)], "train")
    alone = pair[0].gradients(batch)
    task.stacking = "vmap"
    torch.testing.assert_close(pair[1].gradients(batch), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["double", "images", "kernel", "autocast", "numba"])
def test_where_it_does_not_suit_the_layers_run(change, monkeypatch):
    images, weights = given(1, 7 if change == "kernel" else 3)
    if change == "double":
        images, weights = images.double(), tuple(w.detach().double() for w in weights)
    if change == "images":
        images.requires_grad_()
    if change == "numba":
        monkeypatch.setattr(block, "_native", lambda: None)
    monkeypatch.setattr(block, "_forward", lambda *_: pytest.fail("the compiled block ran"))
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert residual_block(images, weights, "relu").shape == (5, 3, 4, 6)
