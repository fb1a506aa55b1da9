"""The data as published, and noisy batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepsmith.tasks import ArrayData, ImageTask, Quadratic, load_images
from stepsmith.tasks.noisy import NoisyData, with_noisy_batches
from stepsmith.tasks.published import PublishedHalves


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def halves() -> PublishedHalves:
    return PublishedHalves.of(load_images("mnist", source="sample"))


def test_halves_of_training_and_test_images(halves):
    assert halves.test is not None
    assert (len(halves.train[0]), len(halves.test[0])) == (5000, 1000)
    assert halves.name.endswith("halves as published")
    again = PublishedHalves.of(load_images("mnist", source="sample"))
    assert torch.equal(again.train[1], halves.train[1])


def test_what_is_called_training_goes_through_test_images_in_epochs(halves):
    batches = list(itertools.islice(halves.stream(generators(1, 2), "train", 128), 9))
    sizes = [inputs.shape[1] for inputs, _ in batches]
    assert sizes == [128] * 7 + [1000 - 7 * 128] + [128]  # the last of an epoch is what is left
    epoch = torch.cat([inputs for inputs, _ in batches[:8]], dim=1)
    for copy in range(2):  # every image once, in an order of the copy's own
        seen = epoch[copy].flatten(1).double().sum(1).sort().values
        whole = halves._cast(halves.test[0]).flatten(1).double().sum(1).sort().values
        torch.testing.assert_close(seen, whole)
    assert not torch.equal(batches[0][0][0], batches[0][0][1])
    assert not torch.equal(batches[0][0], batches[8][0])


def test_meta_training_draws_from_the_training_half(halves):
    inputs, _ = next(halves.stream(generators(1), "meta_train", 64))
    rows = {tuple(row) for row in halves._cast(halves.train[0]).flatten(1)[:, 300:420].tolist()}
    assert all(tuple(row) in rows for row in inputs[0].flatten(1)[:, 300:420].tolist())


def test_noisy_batches_repeat_a_few_examples_and_leave_the_others_alone():
    data = ArrayData((torch.arange(1000.0)[:, None], torch.arange(1000)))
    noisy = NoisyData(*vars(data).values(), every=3, distinct=2)  # type: ignore[misc]
    pairs = zip(
        data.stream(generators(4, 5), "train", 6), noisy.stream(generators(4, 5), "train", 6),
        strict=False,
    )  # fmt: skip
    for number, (clean, shaken) in enumerate(itertools.islice(pairs, 7), 1):
        if number % 3:
            assert torch.equal(clean[0], shaken[0])
        else:
            assert torch.equal(shaken[1], clean[1][:, [0, 1, 0, 1, 0, 1]])


def test_noisy_tasks_say_so_and_need_data():
    task = with_noisy_batches(ImageTask("mlp", "mnist", source="sample"), every=5)
    assert task.name == "mlp-mnist, noisy"
    with pytest.raises(TypeError, match="needs a ModuleTask, got Quadratic"):
        with_noisy_batches(Quadratic(2))
    with pytest.raises(ValueError, match="every and distinct must be at least 1"):
        with_noisy_batches(ImageTask("mlp", "mnist", source="sample"), every=0)
