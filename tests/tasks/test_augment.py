"""Random changes of training images: what each does, to which split, from which numbers."""

from __future__ import annotations

import math

import pytest
import torch

from stepsmith.tasks import ImageTask, make_task
from stepsmith.tasks.augment import AUGMENTATIONS, Augment, crop, flip, noise, rotate, shift

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


def test_crops_are_cut_from_the_image_in_a_border_of_zeros():
    given = images(2, 200, (3, 9, 12)) + 1
    cut = crop(given, seeded(0, 1))
    bordered = torch.zeros(2, 200, 3, 17, 20)
    bordered[..., 4:13, 4:16] = given
    # Every cut equals exactly one of the 81 windows there are.
    windows = torch.stack(
        [bordered[..., y : y + 9, x : x + 12] for y in range(9) for x in range(9)]
    )
    equal = (windows == cut).flatten(3).all(-1)
    assert bool((equal.sum(0) == 1).all())


def test_every_crop_is_equally_likely():
    draws = 8100
    given = torch.zeros(1, draws, 1, 9, 9)
    given[..., 4, 4] = 1
    places = crop(given, seeded(0)).flatten(2).argmax(-1)
    counts = torch.bincount(places.flatten(), minlength=81).double()
    # Chi-square with 80 degrees of freedom: mean 80, standard deviation 12.6.
    assert float(((counts - draws / 81) ** 2 / (draws / 81)).sum()) < 80 + 5 * 160**0.5
    assert float(counts.min()) > 0


def test_flips_exchange_left_and_right_in_half_of_the_images():
    given = images(2, 2000, (3, 4, 5))
    turned = flip(given, seeded(0, 1))
    same = (turned == given).flatten(2).all(-1)
    mirrored = (turned == given[..., [4, 3, 2, 1, 0]]).flatten(2).all(-1)
    assert bool((same ^ mirrored).all())
    for copy in mirrored:
        assert abs(float(copy.double().mean()) - 0.5) < 5 * 0.5 / 2000**0.5
    assert not torch.equal(*mirrored)


def test_changes_follow_each_other():
    given = images(1, 40, (3, 9, 12))
    one, two = seeded(3), seeded(3)
    together = Augment(("crop", "flip"))(given, one)
    assert torch.equal(together, flip(crop(given, two), two))


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
