"""The small architectures: names, shapes, formulas, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tasks.test_tasks import random_images
from torch import nn

from stepsmith.tasks import ImageTask, make_task, split_name
from stepsmith.tasks.networks import FORMS, NETWORKS, find_network, get_network
from stepsmith.unroll import Copies

NAMES = (
    "linear", "mlp64-relu", "mlp12x9-silu-bn", "mlp20x20x20-gelu-ln", "cnn8", "cnn4x6-tanh-bn",
    "resnet-small", "resnet-small-gn", "vit-small", "mixer-small", "gru-rows",
)  # fmt: skip
GREY = torch.Size([1, 28, 28])


def count(name: str, shape: torch.Size = GREY, classes: int = 10) -> int:
    return sum(p.numel() for p in get_network(name)(shape, classes).parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", 7_850),
        ("mlp64-relu", 784 * 64 + 64 + 64 * 10 + 10),
        ("mlp32x16-tanh", 784 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10),
        ("mlp20-gelu-ln", 15_910 + 40),
        ("cnn8", 9 * 8 + 8 + 14 * 14 * 8 * 10 + 10),
        ("cnn8x16-bn", 80 + 9 * 8 * 16 + 16 + 2 * 24 + 7 * 7 * 16 * 10 + 10),
        ("gru-rows", 3 * 32 * (28 + 32 + 2) + 330),
    ],
)
def test_names_mean_these_sizes(name, parameters):
    assert count(name) == parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 18)])
def test_every_network_adapts_to_images_and_trains(name, channels, size):
    task = ImageTask(name, random_images(channels, size), batch_size=16)
    copies = Copies(task, [0, 1])
    losses, gradients = copies.gradients(copies.batches("train"))
    assert losses.shape == (2,)
    # Near log 10 at the start, and no parameter is left without a gradient in both copies.
    assert bool(((losses - math.log(10)).abs() < 1).all())
    for name_of, span in zip(copies.layout.names, copies.layout.spans, strict=True):
        assert bool((gradients[:, span] != 0).any()), name_of
    tested = copies.test()
    assert 0 <= float(tested["accuracy"].min()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_copies_at_once_have_the_gradients_of_one(name):
    task = ImageTask(name, random_images(1, 12), batch_size=4, dtype=torch.float64)
    both, alone = Copies(task, [0, 1]), Copies(task, [1])
    _, together = both.gradients(both.batches("train"))
    _, single = alone.gradients(alone.batches("train"))
    torch.testing.assert_close(together[1], single[0], rtol=1e-8, atol=1e-10)


def test_the_number_of_classes_is_the_outputs():
    for name in NAMES:
        assert get_network(name)(GREY, 3)(torch.rand(2, *GREY)).shape == (2, 3), name


def test_initial_values_of_named_mlps_are_torchs():
    torch.manual_seed(3)
    network = get_network("mlp30-relu")(GREY, 10)
    torch.manual_seed(3)
    want = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10))
    images = torch.rand(5, *GREY)
    torch.testing.assert_close(network(images), want(images), rtol=0, atol=0)


def test_attention_is_torchs():
    network = get_network("vit-small")(GREY, 10).double()
    ours = network.blocks[0].attention
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    hidden = torch.randn(3, 16, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(hidden), theirs(hidden, hidden, hidden)[0])


def test_patches_are_squares_of_the_image():
    network = get_network("mixer-small")(torch.Size([3, 8, 8]), 10)
    image = torch.zeros(1, 3, 8, 8)
    image[0, :, 2:4, 6:8] = 1  # the second row of patches, the last of its four
    embedded = network.patches(image) - network.patches(torch.zeros_like(image))
    assert [bool(row.abs().sum() > 0) for row in embedded[0]] == [i == 7 for i in range(16)]


def test_a_residual_block_is_its_formula():
    task = ImageTask("resnet-small-gn", random_images(), dtype=torch.float64)
    block = task.module().stages[1]
    hidden = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    conv = nn.functional.conv2d
    first = conv(hidden, block.first.weight, block.first.bias, stride=2, padding=1)
    inner = torch.relu(block.first_norm(first))
    second = block.second_norm(conv(inner, block.second.weight, block.second.bias, padding=1))
    shortcut = block.shortcut[1](conv(hidden, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(hidden), torch.relu(shortcut + second))


def test_a_task_name_is_the_longest_network_and_the_data():
    assert split_name("mlp-mnist") == ("mlp", "mnist")
    assert split_name("convnet-sigmoid-mnist") == ("convnet-sigmoid", "mnist")
    assert split_name("cnn8-tanh-bn-some/data-set") == ("cnn8-tanh-bn", "some/data-set")
    assert split_name("cnn8-some-bn") == ("cnn8", "some-bn")
    assert split_name("quadratic") == ("", "")
    task = make_task("mlp8x6-elu-mnist", source="sample", batch_size=4)
    assert (task.network_name, task.name) == ("mlp8x6-elu", "mlp8x6-elu-mnist")


@pytest.mark.parametrize("name", ["mlp0-relu", "mlp64", "mlp64-rely", "cnn", "cnn8x", "cnn8-ln"])
def test_names_of_no_form_are_refused(name):
    assert find_network(name) is None
    with pytest.raises(ValueError, match="unknown network"):
        get_network(name)


def test_no_name_is_read_by_two():
    for parse in FORMS.values():
        assert not any(parse(name) for name in NETWORKS)
