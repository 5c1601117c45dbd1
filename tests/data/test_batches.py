from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import PX, collect, load, numbers
from torch import Tensor

from qnas.common.errors import DataError
from qnas.data.augmentation import Augmentation
from qnas.data.batches import balanced_order, batch_count, batches
from qnas.data.image_data import Split


def test_batches_depend_on_seed_and_epoch_only(noise: Path) -> None:
    train = load(noise).train
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    x, y = collect(train, seed=3, epoch=4, augment=True)
    torch.rand(5)
    torch.set_rng_state(before[0])
    again_x, again_y = collect(load(noise).train, seed=3, epoch=4, augment=True)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    for other in ({"seed": 4, "epoch": 3}, {"seed": 3, "epoch": 5}, {"seed": 4, "epoch": 4}):
        assert not torch.equal(x, collect(train, augment=True, **other)[0])


def test_an_epoch_shows_every_image_once(plain: Path) -> None:
    train = load(plain).train
    for seed in (None, 0):
        x, y = collect(train, seed=seed)
        bytes_seen = (
            x * torch.tensor(train.std)[:, None, None] + torch.tensor(train.mean)[:, None, None]
        ) * 255
        seen = [(int(i), int(c)) for i, c in bytes_seen[:, :2, 0, 0].round()]
        assert [c for _, c in seen] == y.tolist()
        assert sorted(seen) == sorted(numbers(train))
        assert (seen == numbers(train)) == (seed is None)


def test_a_resumed_epoch_goes_on_as_it_would_have(noise: Path) -> None:
    train = load(noise).train
    options: dict[str, Any] = {"seed": 0, "epoch": 7, "augment": True}
    whole = list(batches(train, 6, **options))
    resumed = list(batches(train, 6, start=2, **options))
    assert len(resumed) == len(whole) - 2 > 1
    for (x, y), (resumed_x, resumed_y) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(x, resumed_x)
        assert torch.equal(y, resumed_y)


def test_the_parts_of_a_batch_are_the_batch(noise: Path) -> None:
    train = load(noise).train
    options: dict[str, Any] = {"seed": 5, "epoch": 2, "augment": True, "drop_last": True, "start": 1}
    whole = list(batches(train, 6, **options))
    parts = [list(batches(train, 6, part=(which, 3), **options)) for which in range(3)]
    assert len(whole) > 1
    for i, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[i][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[i][1] for part in parts]))


def test_augmentation_does_not_depend_on_the_batch_size(noise: Path) -> None:
    train = load(noise).train
    options: dict[str, Any] = {"seed": 0, "augment": True}
    assert torch.equal(collect(train, 6, **options)[0], collect(train, 32, **options)[0])


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_are_normalised_floats_in_the_asked_format(noise: Path, channels_last: bool) -> None:
    train = load(noise).train
    x, y = next(batches(train, 6, seed=0, augment=True, channels_last=channels_last))
    assert x.shape == (6, 3, PX, PX)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    everything = collect(load(noise).train_and_heldout)[0]
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [10, 10, 10, 2]), (True, [10, 10, 10])])
def test_batch_count_is_the_number_of_batches(noise: Path, drop_last: bool, sizes: list[int]) -> None:
    train = load(noise).train
    found = [len(y) for _, y in batches(train, 10, seed=0, drop_last=drop_last)]
    assert found == sizes
    assert batch_count(train, 10, drop_last=drop_last) == len(sizes)


def test_an_epoch_without_a_batch_is_refused_at_once(noise: Path) -> None:
    with pytest.raises(DataError, match="train: 32 images are fewer than one batch of 64"):
        batches(load(noise).train, 64, drop_last=True)


def draw_copies(flip: bool) -> tuple[Tensor, Tensor]:
    """Return an image and 200 augmented copies of it."""
    ramp = torch.arange(1, 1 + 3 * PX * PX, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, PX, PX)
    split = Split("train", ramp.repeat(200, 1, 1, 1), torch.zeros(200).long(), (0,) * 3, (1 / 255,) * 3, flip)
    return ramp.float(), next(batches(split, 200, seed=0, augment=True))[0].round()


@pytest.mark.parametrize("flip", [True, False])
def test_each_image_has_its_own_draw(flip: bool) -> None:
    image, copies = draw_copies(flip)
    assert copies.shape == (200, 3, PX, PX)
    variants = {tuple(copy.flatten().tolist()) for copy in copies}
    # 5 x 5 shifts, mirrored or not; 200 draws miss a few of 50
    assert (25 < len(variants) <= 50) if flip else (20 < len(variants) <= 25)
    assert tuple(image.flatten().tolist()) in variants
    assert (tuple(image.flip(2).flatten().tolist()) in variants) == flip


# ---- balanced draws


@pytest.mark.parametrize("counts", [(95, 5), (1, 50, 7), (3, 0, 3), (2, 1, 1, 0, 1)])
def test_balanced_draws_take_classes_and_their_images_equally_often(
    counts: tuple[int, ...],
) -> None:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    drawn_most = set[int]()
    for seed in range(20):
        order = balanced_order(labels, torch.Generator().manual_seed(seed))
        assert len(order) == len(labels)
        draws = torch.bincount(labels[order], minlength=len(counts))[torch.tensor(counts) > 0]
        assert int(draws.max() - draws.min()) <= 1
        drawn_most |= set((draws == draws.max()).nonzero()[:, 0].tolist())
        for label, count in enumerate(counts):
            of_image = torch.bincount(order, minlength=len(labels))[labels == label]
            assert not count or int(of_image.max() - of_image.min()) <= 1
    assert len(drawn_most) == len(draws), "no class is always the one with a draw more"


def test_balanced_draws_leave_out_other_images_in_each_epoch_and_are_shuffled() -> None:
    labels = torch.tensor([0] * 80 + [1] * 20)
    orders = [balanced_order(labels, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert set(torch.cat(orders).tolist()) == set(range(100))
    for order in orders:
        assert 15 < int(labels[order[:50]].sum()) < 35


def test_balanced_batches_depend_on_seed_epoch_and_number_only(noise: Path) -> None:
    train = load(noise).train
    rare = replace(train, labels=(torch.arange(len(train)) % 6 == 0).long())
    options: dict[str, Any] = {"seed": 5, "epoch": 2, "augment": True, "drop_last": True, "balanced": True}
    augmentation = Augmentation(classes=2, mixup=0.5, random_erasing=0.5)
    whole = list(batches(rare, 6, augmentation=augmentation, **options))
    shares = torch.cat([labels for _, labels in whole]).mean(0)
    assert shares.tolist() == pytest.approx([0.5, 0.5], abs=0.15)
    resumed = list(batches(rare, 6, start=1, augmentation=augmentation, **options))
    parts = [
        list(batches(rare, 6, part=(which, 2), augmentation=augmentation, **options)) for which in (0, 1)
    ]
    assert len(whole) > 2
    for i, (x, y) in enumerate(whole):
        joined = [torch.cat(each) for each in zip(*(part[i] for part in parts), strict=True)]
        assert torch.equal(x, joined[0])
        assert torch.equal(y, joined[1])
        if i:
            assert torch.equal(x, resumed[i - 1][0])
    again = next(batches(rare, 6, **options | {"epoch": 3}))
    assert not torch.equal(again[0], next(batches(rare, 6, **options))[0])


def test_images_that_are_drawn_twice_are_augmented_differently(noise: Path) -> None:
    train = load(noise).train
    rare = replace(train, labels=(torch.arange(len(train)) == 0).long(), flip=True)
    x, y = collect(rare, seed=0, augment=True, balanced=True)
    repeated = x[y == 1]
    assert len(repeated) == len(train) // 2
    assert len({each.numpy().tobytes() for each in repeated}) > 3


def test_balanced_batches_read_lazy_images(noise: Path) -> None:
    lazy = load(noise, memory_limit_bytes=0).train
    held = load(noise).train
    options: dict[str, Any] = {"seed": 1, "augment": True, "balanced": True}
    x, y = collect(replace(lazy, mean=held.mean, std=held.std), **options)
    expected_x, expected_y = collect(held, **options)
    assert torch.equal(y, expected_y)
    assert torch.equal(x, expected_x)
