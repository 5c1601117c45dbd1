from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import PX, collect, load, numbers
from torch import Tensor

from qnas.common.errors import DataError
from qnas.data.batches import batch_count, batches
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
