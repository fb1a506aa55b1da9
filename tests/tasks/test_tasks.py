"""Tasks by name, from modules, and the papers' networks."""

from __future__ import annotations

import math

import pytest
import torch
from tests.conftest import make_tiny_task
from torch import nn

from stepsmith import Task, make_task
from stepsmith.tasks import NETWORKS, ImageSet, ImageTask, Quadratic, task_names
from stepsmith.tasks.data import ArrayData, as_data
from stepsmith.tasks.networks.few_channels import Convolution


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(channels: int = 1, size: int = 28) -> ImageSet:
    generator = seeded()

    def draw(count: int) -> torch.Tensor:
        shape = (count, channels, size, size)
        return torch.randint(256, shape, generator=generator).to(torch.uint8)

    labels = torch.arange(40) % 10
    return ImageSet("noise", "test", draw(40), labels, draw(20), labels[:20], tuple("0123456789"))


@pytest.mark.parametrize(("network", "parameters"), [("mlp", 15_910), ("convnet", 6_010)])
def test_parameter_counts_of_the_paper(network, parameters):
    params, _ = ImageTask(network, random_images()).init(seeded())
    assert sum(p.numel() for p in params.values()) == parameters


@pytest.mark.parametrize(
    ("network", "deviations"),
    [
        ("mlp", {"layers.1.weight": 784**-0.5, "layers.3.weight": 20**-0.5}),
        ("convnet", {"first.weight": 27**-0.5, "second.weight": 1 / 9, "head.weight": 5880**-0.5}),
        ("convnet5x5", {"first.weight": 27**-0.5, "second.weight": 1 / 9}),
        ("convnet-sigmoid", {"first.weight": 27**-0.5, "head.weight": 5880**-0.5}),
    ],
)
def test_initial_weights_have_the_papers_variances(network, deviations):
    task = ImageTask(network, random_images())
    draws = [task.init(seeded(seed))[0] for seed in range(40)]
    for name, deviation in deviations.items():
        values = torch.stack([params[name] for params in draws])
        error = 6 * deviation / math.sqrt(2 * values.numel())
        assert abs(values.std() - deviation) < error, name
    for name in draws[0]:
        if name.endswith("bias") and not name.startswith("norm"):
            assert bool((draws[0][name] == 0).all()), name


def test_the_convnet_is_the_papers_formula():
    task = ImageTask("convnet", random_images(), dtype=torch.float64)
    params, buffers = task.init(seeded())
    images, labels = task.batch(seeded(), "train")
    hidden = torch.relu(nn.functional.conv2d(images, params["first.weight"], params["first.bias"],
                                             padding=1))  # fmt: skip
    hidden = nn.functional.conv2d(hidden, params["second.weight"], params["second.bias"], padding=1)
    hidden = torch.relu(hidden + images.repeat(1, 3, 1, 1))
    hidden = nn.functional.max_pool2d(hidden, 2)
    mean = hidden.mean((0, 2, 3), keepdim=True)
    variance = hidden.var((0, 2, 3), unbiased=False, keepdim=True)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt()
    hidden = hidden * params["norm.weight"].view(1, 3, 1, 1) + params["norm.bias"].view(1, 3, 1, 1)
    scores = hidden.flatten(1) @ params["head.weight"].T + params["head.bias"]
    want = nn.functional.cross_entropy(scores, labels)
    torch.testing.assert_close(task.loss(params, buffers, (images, labels), None, True)[0], want)
    tested = task.loss(params, buffers, (images, labels), None, False)[0]
    torch.testing.assert_close(tested, want)  # batch statistics in tests too


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_takes_grey_and_colour(network, channels):
    task = ImageTask(network, random_images(channels, 16), batch_size=8)
    params, buffers = task.init(seeded())
    loss, _, _ = task.loss(params, buffers, task.batch(seeded(), "train"), None, True)
    assert loss.isfinite()


def test_splits_divide_the_training_examples():
    inputs = torch.arange(23.0)
    data = ArrayData((inputs, inputs), (inputs + 100, inputs))
    seen = {
        split: set(data.draw([seeded()], split, 3000)[0].flatten().tolist())
        for split in ("train", "meta_train", "meta_valid", "test")
    }
    assert seen["train"] == set(inputs.tolist())
    assert seen["meta_valid"] == {0.0, 10.0, 20.0}
    assert seen["meta_train"] == seen["train"] - seen["meta_valid"]
    assert seen["test"] == {value + 100 for value in inputs.tolist()}
    with pytest.raises(ValueError, match="split must be one of"):
        data.draw([seeded()], "valid", 3)


def test_uint8_images_are_scaled_to_one():
    task = ImageTask("mlp", random_images())
    images, _ = task.batch(seeded(), "train")
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_from_module_takes_an_unmodified_module():
    inputs, targets = torch.randn(30, 4), torch.randn(30, 1)
    task = Task.from_module(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)),
        nn.functional.mse_loss, (inputs, targets), batch_size=5, name="mine",
    )  # fmt: skip
    params, buffers = task.init(seeded())
    assert "1.running_mean" in buffers
    before = buffers["1.running_mean"].clone()
    loss, moved, _ = task.loss(params, buffers, task.batch(seeded(), "train"), seeded(), True)
    assert loss.isfinite()
    assert torch.equal(buffers["1.running_mean"], before)  # nothing is written to
    assert not torch.equal(moved["1.running_mean"], before)
    assert task.name == "mine"
    assert not task.has_test


def test_frozen_parameters_are_buffers():
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        module[0].weight.requires_grad_(False)
        return module

    task = Task.from_module(make, nn.functional.mse_loss, (torch.randn(9, 4), torch.randn(9, 1)))
    params, buffers = task.init(seeded())
    assert "0.weight" in buffers
    assert "0.weight" not in params


def test_what_cannot_be_stacked_is_looped():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, inputs):
            out = self.linear(inputs)
            return out * 2 if out.sum() > 0 else out  # data-dependent control flow

    data = (torch.randn(9, 4), torch.randn(9, 1))
    assert Task.from_module(Branching, nn.functional.mse_loss, data).stacking == "loop"
    assert make_tiny_task().stacking == "vmap"
    assert ImageTask("convnet", random_images()).stacking == "threads"


def test_data_of_many_kinds():
    pairs = [(torch.full((2,), float(i)), i % 3) for i in range(6)]
    data = as_data(pairs)
    assert data.train[0].shape == (6, 2)
    assert data.train[1].tolist() == [0, 1, 2, 0, 1, 2]
    both = as_data(((torch.ones(4, 2), torch.ones(4)), (torch.ones(2, 2), torch.ones(2))))
    assert both.test is not None
    with pytest.raises(TypeError, match="data must be"):
        as_data(42)
    with pytest.raises(ValueError, match="4 inputs and 3 targets"):
        as_data((torch.ones(4, 2), torch.ones(3)))
    with pytest.raises(ValueError, match="at least 2"):
        as_data((torch.ones(1, 2), torch.ones(1)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"make": lambda: nn.Flatten()}, "no parameter requires a gradient"),
        ({"make": lambda: "module"}, "must return an nn.Module"),
        ({"loss": lambda out, t: (out - t).square()}, r"shape \(\)"),
        ({"make": lambda: nn.Linear(4, 1, dtype=torch.complex64)}, "complex"),
    ],
)
def test_bad_modules(options, match):
    make = options.pop("make", lambda: nn.Linear(4, 1))
    loss = options.pop("loss", nn.functional.mse_loss)
    data = (torch.randn(9, 4), torch.randn(9, 1))
    with pytest.raises(ValueError, match=match):
        Task.from_module(make, loss, data, **options)


def test_a_module_in_place_of_its_maker_is_refused():
    data = (torch.randn(9, 4), torch.randn(9, 1))
    with pytest.raises(TypeError, match="must be a function that builds a fresh module"):
        Task.from_module(nn.Linear(4, 1), nn.functional.mse_loss, data)  # type: ignore[arg-type]


def test_tasks_by_name(tmp_path, monkeypatch):
    assert "convnet5x5-fashion_mnist" in task_names()
    assert make_task("quadratic", source="auto").name == "quadratic"
    task = make_task("convnet-sigmoid-mnist", source="sample", batch_size=4)
    assert (task.network_name, task.name) == ("convnet-sigmoid", "convnet-sigmoid-mnist")
    with pytest.raises(ValueError, match="Did you mean 'quadratic'"):
        make_task("quadratik")
    with pytest.raises(ValueError, match=r"DATA one of mnist.*Did you mean 'mlp-mnist'"):
        make_task("mpl-mnist")
    with pytest.raises(ValueError, match="unknown network"):
        ImageTask("mpl", random_images())
    with pytest.raises(ValueError, match="sides"):
        make_task("quadratic", sides=3)
    (tmp_path / "mytasks.py").write_text(
        "from stepsmith.tasks import Quadratic\n"
        "def small():\n    return Quadratic(2)\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(make_task("mytasks:small"), Quadratic)
    for name, match in [("mytasks:wrong", "must return a Task"), ("mytasks:none", "has no 'none'"),
                        ("nothere:small", "cannot import")]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            make_task(name)


def test_quadratic_needs_a_dimension():
    with pytest.raises(ValueError, match="dimensions"):
        Quadratic(0)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_convolution_has_the_gradients_of_torchs(inputs, kernel, stacked):
    generator = torch.Generator().manual_seed(0)
    layer = Convolution(inputs, 3, kernel).double()
    plain = torch.nn.Conv2d(inputs, 3, kernel, padding=kernel // 2).double()
    copies = 2 if stacked else 1
    images = torch.randn(copies, 4, inputs, 6, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(copies, 3, inputs, kernel, kernel, generator=generator).double()
    bias = torch.randn(copies, 3, generator=generator, dtype=torch.float64)

    def gradients(module):
        leaves = [part.clone().requires_grad_() for part in (images, weight, bias)]

        def run(images, weight, bias):
            return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (images,))

        output = torch.func.vmap(run)(*leaves) if stacked else run(*(leaf[0] for leaf in leaves))
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    torch.testing.assert_close(gradients(layer), gradients(plain))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(inputs))


def test_a_shared_weight_is_one_parameter():
    data = (torch.randn(8, 3), torch.randn(8, 3))
    task = Task.from_module(Tied, nn.functional.mse_loss, data, batch_size=2)
    params, buffers = task.init(seeded())
    assert list(params) == ["first.weight", "first.bias", "second.bias"]
    zero = {key: torch.zeros_like(value) for key, value in params.items()}
    batch = (torch.ones(2, 3), torch.zeros(2, 3))
    assert float(task.loss(zero, buffers, batch, None, True)[0]) == 0


def test_the_convolution_under_autocast_and_its_kernel():
    layer, images = Convolution(1, 3, 3), torch.randn(2, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    output.float().sum().backward()
    assert layer.weight.grad is not None
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        Convolution(1, 3, 4)
