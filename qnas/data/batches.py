"""Batches of a split, in an order and with an augmentation that a seed fixes.

A batch depends only on the seed, the epoch and its place in the epoch: a resumed run sees the batches that
it would have seen. Shifts and flips are one gather over the whole batch; random crops are cut from the
originals while these are decoded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qnas.common.errors import DataError
from qnas.data.augmentation import SEEDS, Augmentation, shift_and_flip
from qnas.data.decoding import in_threads
from qnas.data.image_data import Split
from qnas.data.lazy_images import LazyImages
from qnas.data.normalisation import normalise


def batch_count(split: Split, batch_size: int, *, drop_last: bool = False) -> int:
    """Count the batches of an epoch."""
    return len(split) // batch_size if drop_last else -(-len(split) // batch_size)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    augment: bool = False,
    augmentation: Augmentation | None = None,
    drop_last: bool = False,
    start: int = 0,
    channels_last: bool = True,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised float32 images (B, C, H, W) and int64 labels (B,) on the device.

    With a seed (0 or more) the order is shuffled; without one it is the split's. Order and augmentation
    depend on seed and epoch only, and the augmentation of an image does not depend on the batch size. The
    global random states of torch and numpy do not change. `start` is the number of the first batch, for a
    resumed epoch. `part` (i, n) yields the i-th of n equal parts of every batch, for one of n processes.

    `augment` shifts each image by up to an eighth of its size, and mirrors half of them where the split
    allows it. `augmentation` comes on top; its random crops replace the shifts, and need a split with
    originals. Where it mixes images, labels are float32 shares of the classes (B, classes), and the parts of
    a mixed batch are those of the whole batch.

    Raises DataError at once where there is no whole batch, and for a damaged file when it is read.
    """
    assert batch_size >= 1, batch_size
    assert start >= 0, start
    assert seed is not None or not augment, "augmentation needs a seed"
    which, parts = part
    assert 0 <= which < parts, part
    assert parts == 1 or (drop_last and batch_size % parts == 0), "parts of a batch must be equal"
    count = batch_count(split, batch_size, drop_last=drop_last)
    if count == 0:
        raise DataError(f"{split.name}: {len(split)} images are fewer than one batch of {batch_size}")
    mixes_parts = augmentation is not None and augmentation.mixes and parts > 1
    share = batch_size // parts
    places = []
    for number in range(start, count):
        first = number * batch_size + which * share
        place = torch.arange(first, min(first + share, len(split)))
        if mixes_parts:  # the last image of the part before is mixed into the first of this one
            before = first - 1 if which else first + batch_size - 1
            place = torch.cat((torch.tensor([before]), place))
        places.append(_Place(number, place, skip=int(mixes_parts)))
    order, draws = torch.arange(len(split)), None
    if seed is not None:
        state = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
        rng = torch.Generator().manual_seed(state >> 1)
        order = torch.randperm(len(split), generator=rng)
        draws = _draw(split, augmentation, count, rng) if augment else None
    return _batches(split, order, draws, places, channels_last, torch.device(device))


@dataclass(frozen=True)
class _Draws:
    """The random numbers of an epoch, for its images in their order, and for its batches."""

    shifts: Tensor  # (N, 2)
    flips: Tensor  # (N,)
    augmentation: Augmentation | None = None
    image_seeds: Tensor | None = None  # (N, 2): one for pixels, one for erasing
    batch_seeds: Sequence[int] = ()
    crop_seeds: Tensor | None = None  # (N,), where images are cropped


def _draw(split: Split, augmentation: Augmentation | None, count: int, rng: torch.Generator) -> _Draws:
    """Draw the random numbers of an epoch of `count` batches."""
    border = split.images.shape[2] // 8
    shifts = torch.randint(0, 2 * border + 1, (len(split), 2), generator=rng)
    flips = torch.rand(len(split), generator=rng) < (0.5 if split.flip else 0.0)
    if augmentation is None:
        return _Draws(shifts, flips)
    image_seeds = torch.randint(SEEDS, (len(split), 2), generator=rng)
    batch_seeds = torch.randint(SEEDS, (count,), generator=rng).tolist()
    crop_seeds = None
    if augmentation.crops:
        crop_seeds = torch.randint(SEEDS, (len(split),), generator=rng)
        shifts.fill_(border)  # in the middle
    return _Draws(shifts, flips, augmentation, image_seeds, batch_seeds, crop_seeds)


@dataclass(frozen=True)
class _Place:
    """The place of a batch in its epoch. The first `skip` images are only mixed into the ones after them."""

    number: int
    images: Tensor
    skip: int


def _batches(
    split: Split,
    order: Tensor,
    draws: _Draws | None,
    places: list[_Place],
    channels_last: bool,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    raw = _raw_batches(split, order, draws, [place.images for place in places])
    for place, images in zip(places, raw, strict=True):
        images = images.to(device)  # as bytes, a quarter of what floats would take
        labels = split.labels[order[place.images]].to(device)
        if draws is None:
            normal = normalise(images, split.mean, split.std)
        else:
            normal, labels = _augmented(split, images, labels, draws, place)
        yield normal.contiguous(memory_format=memory_format), labels


def _augmented(
    split: Split, images: Tensor, labels: Tensor, draws: _Draws, place: _Place
) -> tuple[Tensor, Tensor]:
    """Return augmented, normalised images and their labels: uint8 (B, C, H, W) and int64 (B,)."""
    shifts, flips = (draw[place.images].to(images.device) for draw in (draws.shifts, draws.flips))
    images = shift_and_flip(images, shifts, flips)
    augmentation = draws.augmentation
    if augmentation is None:
        return normalise(images, split.mean, split.std), labels
    assert draws.image_seeds is not None
    pixel_seeds, erasing_seeds = draws.image_seeds[place.images].unbind(1)
    normal = normalise(augmentation.change_pixels(images, pixel_seeds), split.mean, split.std)
    normal = augmentation.erase(normal, erasing_seeds)
    if augmentation.mixes:
        normal, labels = augmentation.mix(normal, labels, draws.batch_seeds[place.number])
    return normal[place.skip :], labels[place.skip :]


def _raw_batches(split: Split, order: Tensor, draws: _Draws | None, places: list[Tensor]) -> Iterator[Tensor]:
    if draws is not None and draws.augmentation is not None and draws.crop_seeds is not None:
        source = split.images if isinstance(split.images, LazyImages) else split.originals
        assert source is not None, "random crops need the originals"
        cut = partial(_cut, source, draws.augmentation)
        chunks = (
            zip(order[place].tolist(), draws.crop_seeds[place].tolist(), strict=True) for place in places
        )
        decoded = in_threads(cut, chunks)
    elif isinstance(split.images, LazyImages):
        decoded = in_threads(split.images.__getitem__, (order[place].tolist() for place in places))
    else:
        for place in places:
            yield split.read(order[place])
        return
    for images in decoded:
        yield torch.stack(images).contiguous(memory_format=torch.channels_last)


def _cut(source: LazyImages, augmentation: Augmentation, drawn: tuple[int, int]) -> Tensor:
    """Return the part (C, H, W) of an image that its seed draws; `drawn` is (place of the image, seed)."""
    place, seed = drawn
    return source.cut(place, partial(augmentation.draw_box, seed))
