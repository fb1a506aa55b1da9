"""Gradients as CUDA graphs: which tasks allow it, and that nothing else changes."""

from __future__ import annotations

import functools

import pytest
import torch

from stepsmith.subspace import random
from stepsmith.tasks import SubspaceTask, make_task
from stepsmith.unroll import Copies, TorchStepper, roll

DATA = "fashion_mnist@rgb32@crop@flip@standardised"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def image_task(device="cpu", batch_size=8):
    return make_task(f"resnet8-{DATA}", source="sample", batch_size=batch_size, device=device)


def subspace_of(task, seed):
    generator = torch.Generator().manual_seed(seed)
    return random(task.init(generator)[0], 4, generator=generator)


def test_which_tasks_can_be_captured(tiny_task):
    task = image_task()
    assert task.capturable
    assert SubspaceTask(task, subspace_of(task, 0)).capturable
    # Which of two bases a copy has is a number that the host looks at.
    assert not SubspaceTask(task, [subspace_of(task, 0), subspace_of(task, 1)]).capturable
    # A module of a user's may do anything.
    assert not tiny_task.capturable


def trained(task, steps=6):
    copies = Copies(task, [0])
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    losses = roll(copies, TorchStepper(sgd, copies.theta, copies.layout), steps)
    return losses, copies


@needs_gpu
@pytest.mark.parametrize("within", [False, True])
def test_a_captured_training_is_the_training(within):
    both = []
    for captured in (True, False):
        task = image_task("cuda")
        task = SubspaceTask(task, subspace_of(task, 0)) if within else task
        task.capturable = captured
        both.append(trained(task))
    (losses, one), (losses_2, two) = both
    torch.testing.assert_close(losses, losses_2, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(one.theta, two.theta, rtol=1e-2, atol=1e-2)
    for name, value in one.buffers.items():
        torch.testing.assert_close(value, two.buffers[name], rtol=1e-2, atol=1e-2)
    assert int(one.buffers["stem_norm.num_batches_tracked"]) == 6


@needs_gpu
def test_what_a_replay_hands_out_is_the_callers():
    copies = Copies(image_task("cuda"), [0])
    batch = copies.batches("train")
    first, grad = copies.gradients(batch)
    kept = grad.clone()
    copies.theta += 1
    second, other = copies.gradients(batch)
    assert torch.equal(grad, kept)
    assert not torch.equal(other, kept)
    assert float(first) != float(second)


@needs_gpu
def test_a_batch_of_another_size_is_captured_anew():
    copies = Copies(image_task("cuda"), [0])
    batch = copies.batches("train")
    copies.gradients(batch)
    half = tuple(part[:, :4] for part in batch)
    loss, _ = copies.gradients(half)
    copies.task.capturable = False
    alone = Copies(copies.task, [0])
    expected, _ = alone.gradients(half)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)
