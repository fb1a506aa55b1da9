"""Variants of image sets: what each does, to which split, from which random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from stepsmith.tasks import ImageTask, load_images, load_variant, make_task
from stepsmith.tasks.augment import AUGMENTATIONS, noise, rotate, shift

SAMPLE = {"source": "sample"}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images(copies: int = 2, batch: int = 30, shape=(1, 9, 12)) -> torch.Tensor:
    return torch.rand(copies, batch, *shape, generator=seeded(5)[0])


def test_shifts_move_whole_pixels_up_to_two_each_way():
    given = torch.zeros(2, 300, 1, 9, 12)
    given[..., 4, 6] = 1
    moved = shift(given, seeded(0, 1))
    assert bool((moved.sum((-3, -2, -1)) == 1).all())
    places = moved.nonzero()[:, -2:] - torch.tensor([4, 6])
    assert {tuple(place) for place in places.tolist()} == {
        (down, right) for down in range(-2, 3) for right in range(-2, 3)
    }


def test_shifts_repeat_the_border():
    column = torch.arange(12.0).expand(1, 200, 1, 9, 12)
    moved = shift(column, seeded(0))[0, :, 0, 4]
    for row in moved:
        by = int(row[5]) - 5
        torch.testing.assert_close(row, (torch.arange(12.0) + by).clamp(0, 11))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 36)])
def test_rotations_turn_about_the_centre_by_up_to_fifteen_degrees(shape):
    _, high, wide = shape
    y, x = torch.meshgrid(
        torch.arange(high) - (high - 1) / 2, torch.arange(wide) - (wide - 1) / 2, indexing="ij"
    )
    # A plane stays a plane; its slope turns with the image.
    plane = (x + 0 * y).expand(1, 400, *shape)
    turned = rotate(plane, seeded(0))[0, :, 0]
    inner = slice(high // 2 - 4, high // 2 + 4), slice(wide // 2 - 4, wide // 2 + 4)
    right = (turned[:, inner[0], inner[1]].diff(dim=-1)).mean((-2, -1))
    down = (turned[:, inner[0], inner[1]].diff(dim=-2)).mean((-2, -1))
    torch.testing.assert_close(right**2 + down**2, torch.ones(400), atol=1e-4, rtol=0)
    angles = torch.rad2deg(torch.atan2(down, right))
    assert float(angles.abs().max()) <= 15.01
    assert float(angles.max()) > 14
    assert float(angles.min()) < -14
    assert abs(float(angles.mean())) < 4 * 15 / math.sqrt(3 * 400)


def test_noise_has_its_deviation():
    given = images(2, 200)
    added = noise(given, seeded(0, 1)) - given
    count = added.numel()
    assert abs(float(added.mean())) < 5 * 0.1 / count**0.5
    assert abs(float(added.std()) - 0.1) < 5 * 0.1 / (2 * count) ** 0.5
    assert not torch.equal(added[0], added[1])


@pytest.mark.parametrize("change", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_a_seed_sees_the_same_images_whatever_runs_beside_it(change):
    given = images(3)
    together = change(given, seeded(7, 8, 9))
    alone = change(given[1:2], seeded(8))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    assert not torch.equal(together, given)
    assert together.shape == given.shape
    assert not torch.equal(change(given, seeded(1, 2, 3)), together)


@pytest.mark.parametrize("split", ["train", "meta_train", "meta_valid", "test"])
def test_only_training_batches_change(split):
    plain = ImageTask("mlp", "mnist", **SAMPLE)
    varied = ImageTask("mlp", "mnist@noise", **SAMPLE)
    one, two = (task.batches(seeded(0, 1), split) for task in (plain, varied))
    torch.testing.assert_close(one[1], two[1])
    assert torch.equal(one[0], two[0]) == (split == "test")


def test_the_whole_test_split_is_untouched():
    plain, varied = (make_task(f"mlp-mnist{v}", **SAMPLE) for v in ("", "@shift@rotate@500"))
    for one, two in zip(plain.test_batches(), varied.test_batches(), strict=True):
        assert torch.equal(one[0], two[0])


def test_inverting_inverts_both_splits():
    plain, _ = load_variant("mnist", **SAMPLE)
    inverted, augment = load_variant("mnist@invert", **SAMPLE)
    assert augment is None
    for split in ("train_images", "test_images"):
        total = getattr(plain, split).int() + getattr(inverted, split).int()
        assert bool((total == 255).all())


def test_subsets_are_nested_fixed_and_leave_the_test_split_whole():
    whole = load_images("mnist", **SAMPLE)
    small, large = (load_variant(f"mnist@{size}", **SAMPLE)[0] for size in (100, 1000))
    assert torch.equal(small.train_images, large.train_images[:100])
    assert torch.equal(load_variant("mnist@100", **SAMPLE)[0].train_labels, small.train_labels)
    assert torch.equal(small.test_images, whole.test_images)
    assert len(large.train_labels) == 1000
    assert len(whole.train_labels) == 10_000
    assert large.train_labels.unique().numel() == 10


def test_names_say_the_variants():
    task = make_task("convnet-sigmoid-fashion_mnist@200@rotate@noise", **SAMPLE)
    assert task.name == "convnet-sigmoid-fashion_mnist@200@rotate@noise"
    assert task.data_name == "fashion_mnist@200@rotate@noise (sample, 200 images)"


def test_a_folder_of_the_users_own_has_variants(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "blots" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("L", (8, 6), 40 * number).save(folder / f"{number}.png")
    task = make_task("mlp-blots@4@shift", data_dir=tmp_path)
    assert task.data_name == "blots@4@shift (directory, 4 images)"
    inputs, _ = task.batches(seeded(0), "train")
    assert inputs.shape == (1, 128, 1, 6, 8)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mnist@shfit", "unknown variant of mnist 'shfit'; known: a number of images, invert, noise"
                        ", rotate, shift. Did you mean 'shift'"),
        ("mnist@", "unknown variant of mnist ''"),
        ("mnist@-5", "unknown variant"),
        ("mnist@10001", "mnist@10001: a subset takes 2 to 10000 training images"),
        ("mnist@1", "a subset takes 2"),
        ("mnist@100@200", "give one subset"),
        ("mnist@noise@noise", "give one variant 'noise'"),
        ("mnits@noise", "did you mean 'mnist'"),
    ],
)  # fmt: skip
def test_variants_that_are_none(name, match):
    with pytest.raises(ValueError, match=match):
        load_variant(name, **SAMPLE)
