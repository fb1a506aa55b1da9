"""The deep convolutional networks: sizes, formulas, initial values, running statistics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.tasks.test_tasks import random_images, seeded
from torch import nn

from stepsmith.tasks import ImageTask
from stepsmith.tasks.networks import convolutions, get_network
from stepsmith.tasks.networks.resnet_cifar import Block, Subsample
from stepsmith.unroll import Copies

NAMES = ("resnet8", "resnet20", "resnet18", "vgg-small", "vgg16", "mobilenetv2")
LIGHT = ("resnet8", "vgg-small", "mobilenetv2")
COLOUR, GREY = torch.Size([3, 32, 32]), torch.Size([1, 28, 28])


def count(name: str, shape: torch.Size = COLOUR, classes: int = 10) -> int:
    return sum(p.numel() for p in get_network(name)(shape, classes).parameters())


def normed(inputs: int, outputs: int, kernel: int = 3) -> int:
    """Weights of a convolution without bias and of the normalisation after it."""
    return kernel**2 * inputs * outputs + 2 * outputs


def thin_resnet(blocks: int) -> int:
    stages = [
        normed(inputs, outputs) + (2 * blocks - 1) * normed(outputs, outputs)
        for inputs, outputs in ((16, 16), (16, 32), (32, 64))
    ]
    return normed(3, 16) + sum(stages) + 64 * 10 + 10


def wide_resnet() -> int:
    stages = [
        normed(inputs, outputs) + 3 * normed(outputs, outputs)
        for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512))
    ]
    projections = normed(64, 128, 1) + normed(128, 256, 1) + normed(256, 512, 1)
    return normed(3, 64) + sum(stages) + projections + 512 * 10 + 10


def vgg(channels: list[int], bias: bool) -> int:
    pairs = zip([3, *channels[:-1]], channels, strict=True)
    convolved = sum(normed(inputs, outputs) + bias * outputs for inputs, outputs in pairs)
    return convolved + channels[-1] * 10 + 10


def mobilenet() -> int:
    """The paper's network, then what the customary form for 32x32 images adds."""
    total, inputs = normed(3, 32), 32
    for expansion, outputs, blocks in (
        (1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1),
    ):  # fmt: skip
        for _ in range(blocks):
            hidden = expansion * inputs
            expand = normed(inputs, hidden, 1) if expansion > 1 else 0
            total += expand + normed(1, hidden) + normed(hidden, outputs, 1)
            inputs = outputs
    paper = total + normed(320, 1280, 1) + 1280 * 10 + 10
    assert paper == 2_236_682  # 3,504,872 with 1,000 classes
    shortcuts = sum(normed(*pair, 1) for pair in ((32, 16), (16, 24), (64, 96), (160, 320)))
    assert (normed(32, 32, 1), shortcuts) == (1_088, 59_152)
    return paper + normed(32, 32, 1) + shortcuts


@pytest.mark.parametrize(
    ("name", "known", "derived"),
    [
        ("resnet8", 75_290, thin_resnet(1)),
        ("resnet20", 269_722, thin_resnet(3)),
        ("resnet18", 11_173_962, wide_resnet()),
        ("vgg-small", 242_474, vgg([32, 64, 128, 128], bias=False)),
        ("vgg16", 14_728_266, vgg([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6, bias=True)),
        ("mobilenetv2", 2_296_922, mobilenet()),
    ],
)
def test_networks_have_their_known_sizes(name, known, derived):
    assert count(name) == derived == known


@pytest.mark.parametrize("name", NAMES)
def test_networks_take_colour_and_grey_images_of_several_sizes(name):
    for shape in (COLOUR, GREY, torch.Size([3, 17, 22])):
        network = get_network(name)(shape, 7)
        images = torch.rand(2, *shape)
        assert network(images).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_every_parameter(name):
    network = get_network(name)(COLOUR, 10)
    images = torch.rand(4, 3, 16, 16, generator=seeded())
    F.cross_entropy(network(images), torch.arange(4)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert bool((parameter.grad != 0).any()), key


def test_biases_before_a_batch_norm_change_no_output_in_training():
    network = get_network("vgg16")(COLOUR, 10).double()
    images = torch.rand(3, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    before = network(images)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                assert part.bias is not None
                part.bias += torch.randn(part.bias.shape, dtype=torch.float64)
    torch.testing.assert_close(network(images), before)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("stacking", ["threads", "loop", "vmap"])
def test_copies_at_once_have_the_gradients_of_one(name, stacking):
    options = {"batch_size": 4, "dtype": torch.float64}
    task = ImageTask(name, random_images(1, 12), stacking=stacking, **options)
    both, alone = Copies(task, [0, 1]), Copies(task, [1])
    _, together = both.gradients(both.batches("train"))
    _, single = alone.gradients(alone.batches("train"))
    scale = float(single.abs().max())
    torch.testing.assert_close(together[1], single[0], rtol=1e-7, atol=1e-10 * scale)
    for key, value in alone.buffers.items():
        torch.testing.assert_close(both.buffers[key][1], value[0])


@pytest.mark.parametrize(("channels", "side", "stride"), [(4, 8, 2), (3, 7, 2), (2, 5, 1)])
def test_option_a_is_the_subsampled_identity_with_channels_of_zeros(channels, side, stride):
    hidden = torch.randn(2, channels, side, side, generator=seeded())
    made = Subsample(channels, stride)(hidden)
    rows = range(0, side, stride)
    assert made.shape == (2, 2 * channels, len(rows), len(rows))
    for y, row in enumerate(rows):
        for x, column in enumerate(rows):
            assert torch.equal(made[:, :channels, y, x], hidden[:, :, row, column])
    assert bool((made[:, channels:] == 0).all())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (8, 2), (6, 1)])
def test_a_block_is_its_formula(projection, outputs, stride):
    block = Block(4, outputs, stride, projection).double()
    hidden = torch.randn(3, 4, 7, 7, generator=seeded(), dtype=torch.float64)

    def norm(part: torch.Tensor) -> torch.Tensor:
        mean = part.mean((0, 2, 3), keepdim=True)
        return (part - mean) / (part.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    inner = torch.relu(norm(F.conv2d(hidden, block.first.weight, None, stride, 1)))
    inner = norm(F.conv2d(inner, block.second.weight, None, 1, 1))
    shortcut = hidden
    if (outputs, stride) != (4, 1) and projection:
        weight = block.shortcut.get_parameter("0.weight")
        shortcut = norm(F.conv2d(hidden, weight, None, stride))
    elif (outputs, stride) != (4, 1):
        zeros = torch.zeros(3, outputs - 4, 7, 7, dtype=torch.float64)
        shortcut = torch.cat([hidden, zeros], 1)[:, :, ::stride, ::stride]
    torch.testing.assert_close(block(hidden), torch.relu(shortcut + inner))
    has_parameters = any(True for _ in block.shortcut.parameters())
    assert has_parameters == (projection and (outputs, stride) != (4, 1))


def test_a_mobilenet_block_is_expand_depthwise_project():
    network = get_network("mobilenetv2")(COLOUR, 10)
    kernels = {
        (part.kernel_size, part.groups == part.in_channels)
        for part in network.blocks.modules()
        if isinstance(part, nn.Conv2d)
    }
    assert kernels == {((1, 1), False), ((3, 3), True)}
    shortcuts = [type(block.shortcut).__name__ for block in network.blocks]
    same, none, projected = "Identity", "NoneType", "Sequential"
    assert shortcuts == [
        projected, projected, same, none, same, same, none, same, same, same, projected, same, same,
        none, same, same, projected,
    ]  # fmt: skip
    assert network.blocks(torch.rand(2, 32, 32, 32)).shape == (2, 320, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_he_normal_and_their_seeds_own(name):
    build = get_network(name)
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(build(COLOUR, 10).state_dict())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert not torch.equal(made[0]["head.weight"], made[2]["head.weight"])
    for key, value in made[0].items():
        if value.dim() > 1:
            # Of each filter: its inputs are those of its own group.
            deviation = math.sqrt(2 / value[0].numel())
            error = 6 * deviation / math.sqrt(2 * value.numel())
            assert abs(float(value.std(correction=0)) - deviation) < error, key
            assert abs(float(value.mean())) < 6 * deviation / math.sqrt(value.numel()), key
        elif key.endswith("bias"):
            assert bool((value == 0).all()), key


@pytest.mark.parametrize("name", LIGHT)
def test_the_memory_layout_changes_nothing(name, monkeypatch):
    network = get_network(name)(COLOUR, 10).double().eval()
    images = torch.rand(3, *COLOUR, generator=seeded(), dtype=torch.float64)
    made = network(images)
    module = type(network).__module__
    monkeypatch.setattr(f"{module}.channels_last", lambda images: images)
    torch.testing.assert_close(made, network(images))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_reorders_memory_alone(channels):
    hidden = convolutions.convolution(channels, 8)(torch.rand(2, channels, 6, 5))
    made = convolutions.channels_last(hidden)
    assert torch.equal(made, hidden)
    # The layout is handed on.
    for part in (made, convolutions.convolution(8, 4)(made), nn.BatchNorm2d(8)(made)):
        assert part.is_contiguous(memory_format=torch.channels_last)
    stacked = torch.func.vmap(convolutions.channels_last)(hidden[None])
    assert torch.equal(stacked[0], hidden)


@pytest.mark.parametrize("stacking", ["threads", "vmap"])
def test_running_statistics_are_each_copys_own(stacking):
    task = ImageTask("resnet8", random_images(3, 12), batch_size=6, stacking=stacking)
    copies = Copies(task, [0, 1, 2])
    key = "stem_norm.running_mean"
    for step in range(3):
        moved = copies.gradients(copies.batches("train"))
        assert all(bool(part.isfinite().all()) for part in moved)
        counters = copies.buffers["stem_norm.num_batches_tracked"]
        assert counters.dtype == torch.int64
        assert counters.tolist() == [step + 1] * 3
    means = copies.buffers[key]
    assert not torch.equal(means[0], means[1])
    before = {name: value.clone() for name, value in copies.buffers.items()}
    copies.test()
    assert all(torch.equal(copies.buffers[name], value) for name, value in before.items())
    copies.restart(1)
    assert copies.buffers["stem_norm.num_batches_tracked"].tolist() == [3, 0, 3]
    assert bool((copies.buffers[key][1] == 0).all())
    assert torch.equal(copies.buffers[key][0], before[key][0])


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "vgg-small"])
def test_networks_learn_from_real_images(name):
    data = "fashion_mnist@400@rgb32@crop@flip@standardised"
    task = ImageTask(name, data, batch_size=32, source="sample")
    copies = Copies(task, [0])
    losses = []
    for _ in range(20):
        loss, gradient = copies.gradients(copies.batches("train"))
        copies.theta = copies.theta - 0.05 * gradient
        losses.append(float(loss))
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
