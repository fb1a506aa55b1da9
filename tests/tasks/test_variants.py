"""Variants of image sets by name: what each does, to which split, in which order."""

from __future__ import annotations

import pytest
import torch
from tests.tasks.test_augment import SAMPLE, seeded
from torch import Tensor

from stepsmith.tasks import ImageSet, ImageTask, load_images, load_variant, make_task
from stepsmith.tasks import variants as module
from stepsmith.tasks.augment import crop
from stepsmith.tasks.data import as_data
from stepsmith.tasks.published import PublishedHalves
from stepsmith.tasks.standardise import Standardise


def colours(shape=(3, 6, 8), count: int = 50, classes: int = 10) -> ImageSet:
    """Images whose channels differ in mean and deviation; labels in a mixed order."""
    generator = seeded(4)[0]
    spread = torch.tensor([20, 90, 250])[: shape[0], None, None]

    def draw(size: int) -> tuple[Tensor, Tensor]:
        images = torch.rand(size, *shape, generator=generator) * spread + 5 - spread / 50
        labels = torch.randperm(size, generator=generator) % classes
        return images.to(torch.uint8), labels

    names = tuple("abcdefghijklmnop"[:classes])
    return ImageSet("blots", "test", *draw(count), *draw(30), names)


@pytest.fixture
def blots(monkeypatch) -> ImageSet:
    """What any name means."""
    images = colours()
    monkeypatch.setattr(module, "load_images", lambda name, **options: images)
    return images


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


def test_a_range_of_classes_is_theirs_in_both_splits_from_zero(blots):
    chosen, augment = load_variant("blots@classes3-7")
    assert (chosen.name, chosen.classes, augment) == ("blots@classes3-7", tuple("defgh"), None)
    for split in ("train", "test"):
        images, labels = (getattr(blots, f"{split}_{part}") for part in ("images", "labels"))
        want = [(i, y - 3) for i, y in zip(images, labels.tolist(), strict=True) if 3 <= y <= 7]
        assert getattr(chosen, f"{split}_labels").tolist() == [label for _, label in want]
        torch.testing.assert_close(
            getattr(chosen, f"{split}_images"), torch.stack([image for image, _ in want])
        )


def test_halves_of_the_classes_divide_a_set(blots):
    halves = [load_variant(f"blots@classes{span}")[0] for span in ("0-4", "5-9")]
    assert sum(len(half.train_labels) for half in halves) == len(blots.train_labels)
    assert [half.num_classes for half in halves] == [5, 5]
    for half in halves:
        assert sorted(half.test_labels.unique().tolist()) == [0, 1, 2, 3, 4]
    task = ImageTask("mlp", halves[1])
    assert task.module()(torch.zeros(2, 3, 6, 8)).shape == (2, 5)


def test_variants_are_made_in_their_order(blots):
    chosen = load_variant("blots@classes0-4@10")[0]
    of_classes = load_variant("blots@classes0-4")[0]
    order = torch.randperm(25, generator=seeded(module.SUBSET_SEED)[0])
    assert torch.equal(chosen.train_images, of_classes.train_images[order[:10]])
    assert len(chosen.test_labels) == len(of_classes.test_labels)
    # The other way round: those of ten images of any class that are of the five.
    first = load_variant("blots@10")[0].train_labels
    assert len(load_variant("blots@10@classes0-4")[0].train_labels) == int((first < 5).sum())
    # A border of zeros is black, or white where it is inverted after it was added.
    assert int(load_variant("blots@rgb32@invert")[0].test_images[0, 0, 0, 0]) == 255
    assert int(load_variant("blots@invert@rgb32")[0].test_images[0, 0, 0, 0]) == 0


@pytest.mark.parametrize(
    ("shape", "top", "left"), [((1, 28, 28), 2, 2), ((3, 9, 32), 11, 0), ((1, 5, 6), 13, 13)]
)
def test_rgb32_is_a_border_of_zeros_around_three_channels(monkeypatch, shape, top, left):
    given = colours(shape, count=4)
    monkeypatch.setattr(module, "load_images", lambda name, **options: given)
    made = load_variant("blots@rgb32")[0]
    for split in ("train_images", "test_images"):
        before, after = getattr(given, split), getattr(made, split)
        want = torch.zeros(len(before), 3, 32, 32, dtype=torch.uint8)
        want[:, :, top : top + shape[1], left : left + shape[2]] = before
        assert torch.equal(after, want)
        assert after.is_contiguous()


def test_standardised_training_images_have_mean_zero_and_deviation_one(blots):
    task = ImageTask("mlp", "blots@standardised", dtype=torch.float64)
    train, test = (part / 255.0 for part in (blots.train_images, blots.test_images))
    mean = train.mean((0, 2, 3), keepdim=True)
    deviation = train.std((0, 2, 3), correction=0, keepdim=True)
    drawn, labels = task.data.draw(seeded(0), "train", 5000)
    assert float(drawn.mean((0, 1, 3, 4)).abs().max()) < 0.05
    assert float((drawn.std((0, 1, 3, 4)) - 1).abs().max()) < 0.05
    plain, same = as_data(blots).draw(seeded(0), "train", 5000)
    assert torch.equal(labels, same)
    torch.testing.assert_close(drawn, (plain - mean) / deviation, rtol=1e-4, atol=1e-4)
    # The test split by the training images' statistics, in both ways to it.
    whole = torch.cat([images for images, _ in task.test_batches()])
    torch.testing.assert_close(whole.float(), (test - mean) / deviation, rtol=1e-4, atol=1e-4)
    for images, target in zip(*task.data.draw(seeded(1), "test", 8), strict=True):
        assert len(images) == len(target)
        assert bool(
            (images[:, None] - whole.float()).flatten(2).abs().amax(-1).amin(-1).lt(1e-4).all()
        )


def test_standardising_comes_after_the_zeros_of_crops_wherever_it_is_named(blots):
    first, last = (
        ImageTask("mlp", f"blots@{names}").batches(seeded(0, 1), "train")[0]
        for names in ("standardised@crop", "crop@standardised")
    )
    assert torch.equal(first, last)
    standardise = as_data(load_variant("blots@standardised")[0]).standardise
    assert standardise is not None
    black = -standardise(torch.zeros(3, 1, 1))
    # Rows or columns of a gap hold black as it is after standardising, channel by channel.
    assert float(black.min()) > 0.1
    corner = -first[:, :, :, 0, 0]
    gaps = (corner - black[:, 0, 0]).abs().amax(-1) < 1e-6
    assert 0.5 < float(gaps.float().mean()) < 1
    plain = ImageTask("mlp", "blots@crop").batches(seeded(0, 1), "train")[0]
    assert torch.equal(gaps, plain[:, :, :, 0, 0].abs().amax(-1) == 0)


def test_the_statistics_are_those_of_the_images_other_variants_leave(blots):
    chosen = load_variant("blots@standardised@classes0-4@10@invert")[0]
    task = ImageTask("mlp", chosen)
    assert task.data.standardise is not None
    want = (chosen.train_images / 255.0).mean((0, 2, 3))
    torch.testing.assert_close(task.data.standardise.mean_K, want)


def test_a_constant_channel_is_standardised_to_zeros():
    images = torch.randint(256, (20, 3, 4, 4), generator=seeded(0)[0]).to(torch.uint8)
    images[:, 1] = 200
    made = Standardise.of(images)(images / 255)
    torch.testing.assert_close(made[:, 1], torch.zeros(20, 4, 4), rtol=0, atol=1e-6)
    assert bool(made.isfinite().all())


@pytest.mark.parametrize(
    ("mean", "deviation", "match"),
    [([0.5], [0.1, 0.2], r"must be \(K,\) both"), ([0.5, 0.5], [0.1, 0.0], "must be > 0")],
)
def test_statistics_that_do_not_fit_are_refused(mean, deviation, match):
    with pytest.raises(ValueError, match=match):
        Standardise(torch.tensor(mean), torch.tensor(deviation))


def test_published_halves_are_standardised_too(blots):
    chosen = load_variant("blots@standardised")[0]
    halves = PublishedHalves.of(chosen).to(torch.device("cpu"))
    standardise = as_data(chosen).standardise
    assert standardise is not None
    plain = PublishedHalves.of(blots)
    for split in ("train", "meta_train"):
        made, given = (next(data.stream(seeded(0), split, 6))[0] for data in (halves, plain))
        torch.testing.assert_close(made, standardise(given))


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


def test_images_too_large_for_rgb32_are_refused(monkeypatch):
    monkeypatch.setattr(module, "load_images", lambda name, **options: colours((1, 33, 8), 4))
    with pytest.raises(ValueError, match=r"blots@rgb32: takes images of up to 32x32 .* are 33x8"):
        load_variant("blots@rgb32")


def test_a_subset_of_the_test_images_leaves_the_training_images():
    whole, _ = load_variant("mnist", source="sample")
    part, _ = load_variant("mnist@test50", source="sample")
    assert torch.equal(part.train_images, whole.train_images)
    smaller, _ = load_variant("mnist@test20", source="sample")
    assert len(part.test_labels) == 50
    assert torch.equal(part.test_images[:20], smaller.test_images)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mnist@shfit", "unknown variant of mnist 'shfit'; known: a number of images, classesA-B, "
                        "crop, flip, invert, noise, rgb32, rotate, shift, standardised, testN. "
                        "Did you mean 'shift'"),
        ("mnist@", "unknown variant of mnist ''"),
        ("mnist@-5", "unknown variant"),
        ("mnist@10001", "mnist@10001: a subset takes 2 to 10000 training images"),
        ("mnist@1", "a subset takes 2"),
        ("mnist@100@200", "give one subset"),
        ("mnist@noise@noise", "give one variant 'noise'"),
        ("mnist@classes0-4@classes1-3", "give one range of classes"),
        ("mnist@classes4-4", "two numbers in rising order, at most 9"),
        ("mnist@classes5-10", "mnist has 10 classes, numbered from 0"),
        ("mnist@classes5", "unknown variant"),
        ("mnist@test2001", "takes 2 to 2000 test images, as many as mnist has here"),
        ("mnist@test9@test8", "give one subset of the test images"),
        ("mnist@classes0-4@5001", "takes 2 to 5000 training images, as many as mnist@classes0-4"),
        ("mnits@noise", "did you mean 'mnist'"),
    ],
)  # fmt: skip
def test_names_that_are_refused(name, match):
    with pytest.raises(ValueError, match=match):
        load_variant(name, **SAMPLE)


def test_meta_training_variants_for_transfer_have_one_shape():
    grey, augment = load_variant("fashion_mnist@rgb32@crop@flip@standardised", **SAMPLE)
    assert grey.train_images.shape == (10_000, 3, 32, 32)
    assert augment is not None
    assert augment == module.Augment(("crop", "flip"))
    plain = load_images("fashion_mnist", **SAMPLE)
    assert torch.equal(grey.test_images[:, 1, 2:30, 2:30], plain.test_images[:, 0])
    assert torch.equal(crop(torch.zeros(1, 2, 3, 32, 32), seeded(0)), torch.zeros(1, 2, 3, 32, 32))
