"""Batches of a split, with the order and the augmentation determined by a seed.

A batch depends only on the seed, the epoch and its number in the epoch, so a resumed run sees the same
batches as an uninterrupted one. Shifts and flips are a single gather over the batch. Random crops are cut
from the originals when these are decoded.
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
    """Return the number of batches in an epoch."""
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
    balanced: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised float32 images (B, C, H, W) and int64 labels (B,) on the device.

    With a seed (0 or more), images are shuffled; without one, they keep the split's order. Order and
    augmentation depend only on seed and epoch; the augmentation of an image does not depend on the batch
    size. torch's and numpy's global random states are kept. `start` is the number of the first batch, for a
    resumed epoch. `part` (i, n) yields the i-th of n equal parts of each batch, for one of n processes. With
    `balanced`, an epoch has as many images as the split, but draws all classes equally often
    (`balanced_order`); each draw of an image is augmented on its own.

    `augment` shifts each image by up to an eighth of its size, and mirrors half of the images if the split
    allows it. `augmentation` is applied in addition. Its random crops replace the shifts and need a split
    with originals. If it mixes images, labels are float32 shares of the classes (B, classes), and the parts
    of a mixed batch are the same as those of the whole batch.

    Raises DataError immediately if there is no whole batch, and when a damaged file is read.
    """
    assert batch_size >= 1, batch_size
    assert start >= 0, start
    assert seed is not None or not augment, "augmentation needs a seed"
    assert seed is not None or not balanced, "balanced draws need a seed"
    which, parts = part
    assert 0 <= which < parts, part
    assert parts == 1 or (drop_last and batch_size % parts == 0), "parts of a batch must be equal"
    count = batch_count(split, batch_size, drop_last=drop_last)
    if count == 0:
        raise DataError(f"{split.name}: {len(split)} images are fewer than one batch of {batch_size}")
    share = batch_size // parts
    # the last image of the previous part is mixed into the first image of this one
    skip = int(parts > 1 and augmentation is not None and augmentation.mixes)
    places = []
    for first in range(start * batch_size + which * share, count * batch_size, batch_size):
        place = torch.arange(first, min(first + share, len(split)))
        before = torch.tensor([first - 1 if which else first + batch_size - 1] * skip, dtype=torch.int64)
        places.append(torch.cat((before, place)))
    order, draws = torch.arange(len(split)), None
    if seed is not None:
        state = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
        rng = torch.Generator().manual_seed(state >> 1)
        order = balanced_order(split.labels, rng) if balanced else torch.randperm(len(split), generator=rng)
        draws = _draw(split, augmentation or Augmentation(classes=0), count, rng) if augment else None

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        raw = _raw_batches(split, order, draws, places)
        for number, (place, images) in enumerate(zip(places, raw, strict=True), start):
            images = images.to(device)  # transferred as bytes, a quarter of the size of floats
            labels = split.labels[order[place]].to(device)
            if draws is None:
                normal = normalise(images, split.mean, split.std)
            else:
                normal, labels = _augmented(split, images, labels, draws, place, number)
            yield normal[skip:].contiguous(memory_format=memory_format), labels[skip:]

    return read()


def balanced_order(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Draw as many indices as there are labels (N,), of each class equally often, up to one: (N,) int64.

    A class of few images is drawn in whole rounds and a random rest, so that each of its images occurs as
    often as the others, up to one. Of a frequent class, the images that are left out differ by epoch. Classes
    without images are not drawn.
    """
    members = torch.split(labels.argsort(stable=True), torch.bincount(labels).tolist())
    classes = [places for places in members if len(places)]
    count, rest = divmod(len(labels), len(classes))
    once_more = set(torch.randperm(len(classes), generator=rng)[:rest].tolist())
    drawn = []
    for number, places in enumerate(classes):
        rounds, left = divmod(count + (number in once_more), len(places))
        drawn += [places.repeat(rounds), places[torch.randperm(len(places), generator=rng)[:left]]]
    return torch.cat(drawn)[torch.randperm(len(labels), generator=rng)]


@dataclass(frozen=True)
class _Draws:
    """The random numbers of an epoch, for its images in their order and for its batches."""

    augmentation: Augmentation
    shifts: Tensor  # (N, 2)
    flips: Tensor  # (N,)
    image_seeds: Tensor  # (N, 2): one for change_pixels, one for erase
    batch_seeds: Sequence[int]
    crop_seeds: Tensor  # (N,)


def _draw(split: Split, augmentation: Augmentation, count: int, rng: torch.Generator) -> _Draws:
    """Draw the random numbers of an epoch of `count` batches."""
    border = split.images.shape[2] // 8
    shifts = torch.randint(0, 2 * border + 1, (len(split), 2), generator=rng)
    flips = torch.rand(len(split), generator=rng) < (0.5 if split.flip else 0.0)
    image_seeds = torch.randint(SEEDS, (len(split), 2), generator=rng)
    batch_seeds = torch.randint(SEEDS, (count,), generator=rng).tolist()
    crop_seeds = torch.randint(SEEDS, (len(split),), generator=rng)
    if augmentation.crops:
        shifts.fill_(border)  # no shift
    return _Draws(augmentation, shifts, flips, image_seeds, batch_seeds, crop_seeds)


def _augmented(
    split: Split, images: Tensor, labels: Tensor, draws: _Draws, place: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """Augment and normalise batch `number`, given as uint8 (B, C, H, W) and int64 (B,)."""
    shifts, flips = (draw[place].to(images.device) for draw in (draws.shifts, draws.flips))
    augmentation = draws.augmentation
    pixel_seeds, erasing_seeds = draws.image_seeds[place].unbind(1)
    images = augmentation.change_pixels(shift_and_flip(images, shifts, flips), pixel_seeds)
    normal = augmentation.erase(normalise(images, split.mean, split.std), erasing_seeds)
    if augmentation.mixes:
        return augmentation.mix(normal, labels, draws.batch_seeds[number])
    return normal, labels


def _raw_batches(split: Split, order: Tensor, draws: _Draws | None, places: list[Tensor]) -> Iterator[Tensor]:
    """Yield the images of each batch, (B, C, H, W) uint8, with random crops if there are any."""
    if draws is not None and draws.augmentation.crops:
        source = split.images if isinstance(split.images, LazyImages) else split.originals
        assert source is not None, "random crops need the originals"
        seeds, cut = draws.crop_seeds, partial(_cut, source, draws.augmentation)
        decoded = in_threads(cut, (zip(order[p].tolist(), seeds[p].tolist(), strict=True) for p in places))
    elif isinstance(split.images, LazyImages):
        decoded = in_threads(split.images.__getitem__, (order[place].tolist() for place in places))
    else:
        yield from (split.read(order[place]) for place in places)
        return
    for images in decoded:
        yield torch.stack(images).contiguous(memory_format=torch.channels_last)


def _cut(source: LazyImages, augmentation: Augmentation, drawn: tuple[int, int]) -> Tensor:
    """Return a random crop of an image, (C, H, W). `drawn` is the image's index and its seed."""
    place, seed = drawn
    return source.cut(place, partial(augmentation.draw_box, seed))
