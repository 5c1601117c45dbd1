from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qnas.data.augmentation import Augmentation, shift_and_flip
from qnas.data.batches import batches
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec

ALL = Augmentation(10, randaugment=9, randaugment_std=0.5, random_erasing=0.5, mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


def epoch(
    data: ImageData,
    augmentation: Augmentation | None,
    *,
    batch_size: int = 32,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> list[tuple[Tensor, Tensor]]:
    return list(
        batches(
            data.train,
            batch_size,
            seed=3,
            augment=True,
            augmentation=augmentation,
            drop_last=True,
            start=start,
            part=part,
        )
    )


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def photos(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator)
    return images.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def test_nothing_asked_for_is_nothing_done(digits: ImageData) -> None:
    assert equal(epoch(digits, Augmentation(10)), epoch(digits, None))


def test_what_is_drawn_depends_on_the_seed_alone(digits: ImageData) -> None:
    before = torch.get_rng_state()
    first = epoch(digits, ALL)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers stay"
    torch.manual_seed(99)
    assert equal(epoch(digits, ALL), first)
    assert equal(epoch(digits, ALL, start=7), first[7:])


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_are_those_of_the_whole_one(parts: int, digits: ImageData) -> None:
    """Mixing included, where the first image of a part is mixed with the last of the one before."""
    whole = epoch(digits, ALL)
    pieces = [epoch(digits, ALL, part=(which, parts)) for which in range(parts)]
    joined = [
        (torch.cat([x for x, _ in row]), torch.cat([y for _, y in row])) for row in zip(*pieces, strict=True)
    ]
    for (images, labels), (x, y) in zip(whole, joined, strict=True):
        torch.testing.assert_close(images, x)
        torch.testing.assert_close(labels, y)


def test_images_are_changed_each_by_its_own_draw_whatever_the_batch(digits: ImageData) -> None:
    alone = replace(ALL, mixup=0, cutmix=0)
    small, large = epoch(digits, alone, batch_size=16), epoch(digits, alone, batch_size=32)
    for i, (images, _) in enumerate(large):
        assert torch.equal(images, torch.cat([small[2 * i][0], small[2 * i + 1][0]]))


def test_randaugment_grows_with_its_magnitude() -> None:
    images, seeds = photos(200), torch.arange(200)

    def change(magnitude: float) -> float:
        changed = Augmentation(10, randaugment=magnitude).change_pixels(images, seeds)
        assert changed.dtype == torch.uint8
        return float((changed.float() - images.float()).abs().mean())

    assert 0 < change(1) < change(5) < change(10)


def test_the_magnitude_varies_by_its_spread() -> None:
    images, seeds = photos(50), torch.arange(50)
    steady = Augmentation(10, randaugment=5)
    varied = replace(steady, randaugment_std=2.0)
    assert not torch.equal(varied.change_pixels(images, seeds), steady.change_pixels(images, seeds))


def test_a_share_of_the_images_has_noise_in_a_rectangle() -> None:
    images = torch.zeros(400, 3, 16, 16)
    erased = Augmentation(10, random_erasing=0.25).erase(images, torch.arange(400))
    changed = (erased != 0).any(1)  # (B, H, W)
    assert float(changed.flatten(1).any(1).float().mean()) == pytest.approx(0.25, abs=0.07)
    for places in changed[changed.flatten(1).any(1)]:
        rows, columns = places.any(1), places.any(0)
        assert int(places.sum()) == int(rows.sum()) * int(columns.sum())


@pytest.mark.parametrize("augmentation", [Augmentation(3, mixup=0.8), Augmentation(3, cutmix=1.0)])
def test_labels_are_mixed_as_the_pixels_are(augmentation: Augmentation) -> None:
    """Of images that are their label everywhere, the mean pixel is the mean label."""
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    images = labels.float()[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    seen = set()
    for seed in range(20):
        mixed, shares = augmentation.mix(images, labels, seed)
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(3.0))
        seen.add(round(float(shares[0, 0]), 3))
        # with its predecessor only
        assert all(shares[i, k] == 0 for i in range(6) for k in range(3) if k not in labels[[i, i - 1]])
    assert len(seen) > 5


def test_a_batch_has_one_of_both_kinds_of_mixing() -> None:
    labels = torch.tensor([0, 1])
    images = labels.float()[:, None, None, None].expand(-1, 1, 16, 16).contiguous()
    mixed = [Augmentation(2, mixup=1, cutmix=1).mix(images, labels, seed)[0] for seed in range(40)]
    kinds = [bool(((batch == 0) | (batch == 1)).all()) for batch in mixed]  # CutMix keeps whole pixels
    assert 10 < sum(kinds) < 30


def test_shift_and_flip_is_pad_crop_mirror_of_each_image() -> None:
    px, border = 17, 2
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (25, 3, px, px), dtype=torch.uint8, generator=rng)
    shifts = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    flips = torch.arange(25) % 2 == 0
    out = shift_and_flip(images, shifts, flips)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for image, (top, left), flip, found in zip(
        images.numpy(), shifts.tolist(), flips, out.numpy(), strict=True
    ):
        padded = np.pad(image, ((0, 0), (border, border), (border, border)))
        cut = padded[:, top : top + px, left : left + px]
        np.testing.assert_array_equal(found, cut[:, :, ::-1] if flip else cut)
