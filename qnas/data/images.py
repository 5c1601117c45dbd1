"""Images with labels: read, split, kept as bytes at one resolution, handed out in batches.

Choices made. All images of a data set lie in one uint8 array, channels last in memory, in the order
training, held-out, test, so that splits are views and no image is held twice; what does not fit is
decoded when a batch asks for it. Splits are stratified and drawn with a constant, not with the run's
seed: runs with different seeds choose on the same images and can be compared. A batch depends only on
(seed, epoch, place in the epoch): a resumed run sees the batches that it would have seen. Shifts and
flips are one gather over the whole batch; random crops are cut from the originals while these are decoded;
what else is done to images is in `qnas.data.augmentation`. Broken images are taken out after the splits are
drawn, so that these stay what they were when one is mended.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qnas.common.errors import BrokenImageError, DataError, UsageError
from qnas.data.augmentation import SEEDS, Augmentation
from qnas.data.broken_images import MAX_BROKEN, Broken, BrokenImage, check_broken, find_broken
from qnas.data.decoding import LazyImages, chunked, in_threads
from qnas.data.image_files import Indices, Originals
from qnas.data.sources import KINDS, DataSpec

MEMORY_LIMIT_BYTES = 3_000_000_000  # decoded images of all splits together; above it they stay encoded
HASHED_BYTES = 1_000_000_000  # a folder above it is identified by names and sizes, not by its bytes
TEST_FRACTION = 0.2  # where the data set has no test images of its own
STATISTICS_IMAGES = 1000  # of how many images mean and std are taken where not all are in memory

# Constants, so that splits are the same in every run; two, so that the draws are independent.
_TEST_DRAW = 20231117
_HELDOUT_DRAW = 19560

_PARTS = ("train", "heldout", "test")
_MISSING = -1  # bytes of a file that is not there


# ---- what is given back


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, with what normalises and augments them.

    `images` (N, C, H, W) are uint8, channels last in memory, or decoded when asked for. `labels` (N,)
    are int64. `mean` and `std` have a value a channel, with bytes counted as 0 to 1. `flip` says
    whether a mirrored image still shows its class. `originals` are the same images to cut crops from, where
    these were asked for.
    """

    name: str
    images: Tensor | LazyImages
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    originals: LazyImages | None = None

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels) > 0, self.name
        assert self.images.shape[1] == len(self.mean) == len(self.std), self.images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        """Return these images (B, C, H, W) as uint8. Raises DataError for a damaged file."""
        if isinstance(self.images, Tensor):
            return _take(self.images, indices)
        return torch.stack([self.images[int(i)] for i in indices])


def _take(images: Tensor, indices: Tensor) -> Tensor:
    """Return some images (N, C, H, W), channels last in memory as they are."""
    # (N, H, W, C) has whole images as rows, so that the gather copies them at once
    return images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set at one resolution, split three ways.

    `train` is for weights, `heldout` for architecture steps and for choosing, and `test` for nothing
    but the final figure. `digest` identifies the original images, labels and classes, whatever the
    resolution.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    heldout: Split
    test: Split
    train_and_heldout: Split  # for the final training, once nothing is left to choose
    resolution_px: int
    channels: int
    digest: str
    broken: tuple[BrokenImage, ...] = ()  # of the originals, left out of all splits

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over `train_and_heldout`, bytes counted as 0 to 1."""
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, as `mean`."""
        return self.train.std

    @property
    def flip(self) -> bool:
        """Whether augmentation mirrors images."""
        return self.train.flip

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {split.name: len(split) for split in (self.train, self.heldout, self.test)}

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded."""
        return isinstance(self.train.images, Tensor)


# ---- splits, digest, statistics


def load_data(
    spec: DataSpec,
    *,
    resolution_px: int,
    channels: int = 3,
    heldout_fraction: float = 0.2,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    max_broken: float | None = MAX_BROKEN,
    keep_originals: bool = False,
    quiet: bool = False,
) -> ImageData:
    """Read, split and decode a data set.

    Held-out images are taken from the training images, the same ones in every run; a folder with all
    of train, val and test has val as its held-out images. Without test images of its own, a data set
    first gives up a fifth of its images as such. Up to `memory_limit_bytes` of pixels over all splits
    every image is decoded now; while it loads, the originals are held beside them, and afterwards too with
    `keep_originals`, for random crops. Above, `mean` and `std` are those of some of the training images.

    Broken images are left out, up to a share `max_broken` of all; with None they are not looked for where
    images are not decoded now, and raise when they are met.

    Raises DataError where files are missing, damaged or too few, and UsageError for a fraction outside
    0 to 1.
    """
    assert resolution_px >= 1, resolution_px
    assert channels >= 1, channels
    if not 0 < heldout_fraction < 1:
        raise UsageError(f"the held-out fraction must lie between 0 and 1, got {heldout_fraction}")
    if max_broken is not None and not 0 <= max_broken <= 1:
        raise UsageError(f"--max-broken {max_broken}: expected a share of the images, 0 to 1")
    kind, where = KINDS[spec.kind], str(spec)
    source = kind.read(spec.path)
    parts = _split_parts(source, where, heldout_fraction)
    order = np.concatenate([parts[part] for part in _PARTS])
    lazy = LazyImages(source.images, order, resolution_px=resolution_px, channels=channels, pads=kind.pads)
    digest = _digest(source)
    fits = int(np.prod(lazy.shape, dtype=object)) <= memory_limit_bytes
    images: Tensor | LazyImages = lazy
    broken: Broken = {}
    if fits:
        images, broken = _decode_all(lazy, 0.0 if max_broken is None else max_broken, where, quiet=quiet)
    elif max_broken is not None and not isinstance(source.images, Tensor):
        broken = find_broken(source.images, max_broken, where, quiet=quiet)
    if broken:
        kept = np.flatnonzero(~np.isin(order, list(broken)))
        lazy = lazy.take(kept)
        images = lazy if isinstance(images, LazyImages) else _take(images, torch.from_numpy(kept))
        order = order[kept]
        parts = {part: places[~np.isin(places, list(broken))] for part, places in parts.items()}
        _check_whole(source, parts, where)
        digest = _digest_without(digest, broken)
    labels = torch.from_numpy(source.labels[order])

    ends = np.cumsum([len(parts[part]) for part in _PARTS]).tolist()
    mean, std = _statistics(_part(images, 0, ends[1]))

    def split(name: str, start: int, end: int) -> Split:
        originals = lazy.take(slice(start, end)) if keep_originals else None
        return Split(name, _part(images, start, end), labels[start:end], mean, std, kind.flip, originals)

    return ImageData(
        name=spec.path.name if kind.is_folder and spec.path else spec.kind,
        classes=source.classes,
        train=split("train", 0, ends[0]),
        heldout=split("heldout", ends[0], ends[1]),
        test=split("test", ends[1], ends[2]),
        train_and_heldout=split("train_and_heldout", 0, ends[1]),
        resolution_px=resolution_px,
        channels=channels,
        digest=digest,
        broken=tuple(each for _, each in sorted(broken.items())),
    )


def _part(images: Tensor | LazyImages, start: int, end: int) -> Tensor | LazyImages:
    return images[start:end] if isinstance(images, Tensor) else images.take(slice(start, end))


def _split_parts(source: Originals, where: str, heldout_fraction: float) -> dict[str, Indices]:
    """Complete the splits that the data set makes by taking images from its training images."""
    parts = dict(source.parts)
    to_take = [part for part in ("test", "heldout") if part not in parts]
    counts = np.bincount(source.labels[parts["train"]], minlength=len(source.classes))
    fewest = int(counts.argmin())
    if counts[fewest] <= len(to_take):
        raise DataError(
            f"{where}: class {source.classes[fewest]!r} has {counts[fewest]} training images, expected at "
            f"least {len(to_take) + 1}, as {' and '.join(to_take)} images are split off"
        )
    for part in to_take:
        draw, fraction = (_TEST_DRAW, TEST_FRACTION) if part == "test" else (_HELDOUT_DRAW, heldout_fraction)
        parts["train"], parts[part] = _take_stratified(parts["train"], source.labels, fraction, draw)
    return parts


def _take_stratified(
    indices: Indices, labels: Indices, fraction: float, draw: int
) -> tuple[Indices, Indices]:
    """Split off a fraction of every class, at least one image of it, and leave at least one."""
    # RandomState, as numpy promises that its numbers never change
    rng = np.random.RandomState(draw)
    taken = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken.append(rng.permutation(members)[:count])
    picked = np.isin(indices, np.concatenate(taken))
    return indices[~picked], indices[picked]


def _check_whole(source: Originals, parts: dict[str, Indices], where: str) -> None:
    """Raise DataError where the broken images leave a class without training, or a split with nothing."""
    counts = np.bincount(source.labels[parts["train"]], minlength=len(source.classes))
    if not counts.all():
        name = source.classes[int(counts.argmin())]
        raise DataError(f"{where}: all training images of class {name!r} are broken")
    for part in _PARTS:
        if not len(parts[part]):
            raise DataError(f"{where}: all {part} images are broken")


def _digest_without(digest: str, broken: Broken) -> str:
    """Identify what is left of a data set, as that of a large one does not go by its bytes."""
    return hashlib.sha256(json.dumps([digest, sorted(broken)]).encode()).hexdigest()[:16]


def _digest(source: Originals) -> str:
    """Identify classes, labels, the data set's own splits, and the images."""
    digest = hashlib.sha256()
    digest.update(json.dumps([source.classes, {k: len(v) for k, v in source.parts.items()}]).encode())
    digest.update(source.labels.astype("<i8").tobytes())
    if isinstance(source.images, Tensor):
        digest.update(repr(tuple(source.images.shape)).encode())
        digest.update(source.images.contiguous().numpy().data)
        return digest.hexdigest()[:16]
    where = ""
    try:
        sizes = []
        for file in source.images:
            where = file.where
            try:
                sizes.append(file.size_bytes())
            except FileNotFoundError:  # a broken image like any other
                sizes.append(_MISSING)
        whole = sum(sizes) <= HASHED_BYTES
        for file, size in zip(source.images, sizes, strict=True):
            where = file.where
            digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
            if whole and size != _MISSING:
                digest.update(file.read())
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _decode_all(lazy: LazyImages, most: float, where: str, *, quiet: bool) -> tuple[Tensor, Broken]:
    """Decode everything into one array (N, C, H, W), channels last in memory, and say what is broken.

    In the array that is black. Raises DataError once more than a share `most` is.
    """
    count, channels, height, width = lazy.shape
    images = torch.zeros((count, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    broken: dict[int, BrokenImage] = {}
    with tqdm(total=count, desc="images", unit="", leave=False, disable=quiet or None) as bar:
        if isinstance(lazy.originals, Tensor):
            for chunk in chunked(count, 1024):
                chosen = torch.from_numpy(lazy.order[chunk.start : chunk.stop])
                images[chunk.start : chunk.stop] = lazy.fit(lazy.originals[chosen], "images")
                bar.update(len(chunk))
        else:
            # in chunks, so that too many damaged files end it early
            chunks = in_threads(partial(_try, lazy), chunked(count))
            for chunk, decoded in zip(chunked(count), chunks, strict=True):
                for place, image in zip(chunk, decoded, strict=True):
                    if isinstance(image, Tensor):
                        images[place] = image
                    else:
                        broken[int(lazy.order[place])] = image
                check_broken(broken, count, most, where)
                bar.update(len(chunk))
    return images, broken


def _try(lazy: LazyImages, place: int) -> Tensor | BrokenImage:
    try:
        return lazy[place]
    except BrokenImageError as error:
        return BrokenImage(error.where, error.problem)


def _whole_of(lazy: LazyImages, chunks: Iterable[Iterable[int]]) -> Iterator[Tensor]:
    """Yield the images (B, C, H, W) of each chunk of places, less what is broken of it."""
    for decoded in in_threads(partial(_try, lazy), chunks):
        if whole := [image for image in decoded if isinstance(image, Tensor)]:
            yield torch.stack(whole)


def _statistics(images: Tensor | LazyImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel, bytes counted as 0 to 1.

    A channel that is almost constant has a std of one byte's step, so that it can be divided by. Broken
    images that are still there are passed over; where all are, both are those of black ones.
    """
    if isinstance(images, LazyImages):
        images = images.take(_spread(len(images), STATISTICS_IMAGES))
    chunks = list(chunked(len(images)))
    counted = torch.zeros(images.shape[1], 256, dtype=torch.int64)  # of every channel and byte
    parts = (
        _whole_of(images, chunks)
        if isinstance(images, LazyImages)
        else (images[chunk.start : chunk.stop] for chunk in chunks)
    )
    for part in parts:
        for channel, row in enumerate(counted):
            row += torch.bincount(part[:, channel].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64)
    shares = counted.double() / counted.sum(1, keepdim=True).clamp(min=1)
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt().clamp(min=1)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _spread(count: int, wanted: int) -> Indices:
    """Return `wanted` places evenly over `count`, or all of them."""
    kept = min(count, wanted)
    return np.arange(kept, dtype=np.int64) * count // kept


def subset(split: Split, n: int) -> Split:
    """Return `n` of the split's images, evenly over its order (all of them if there are fewer).

    Folders are ordered by class, so the first `n` would show one class only.
    """
    assert n >= 1, n
    places = _spread(len(split), n)
    images = split.images
    some = images.take(places) if isinstance(images, LazyImages) else split.read(torch.from_numpy(places))
    return replace(split, images=some, labels=split.labels[torch.from_numpy(places)])


def sample_images(split: Split, n: int) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W) as uint8 and labels (n,) of `subset(split, n)`, less what is broken of it.

    Raises DataError where all of it is.
    """
    some = subset(split, n)
    if isinstance(some.images, Tensor):
        return some.read(torch.arange(len(some))), some.labels
    ((*found,),) = in_threads(partial(_try, some.images), [range(len(some))])
    whole = [place for place, image in enumerate(found) if isinstance(image, Tensor)]
    if not whole:
        problem = found[0]
        assert isinstance(problem, BrokenImage)
        why = f"{problem.file}: {problem.problem}"
        raise DataError(f"{split.name}: not one of {len(some)} images is whole: {why}")
    return torch.stack([image for image in found if isinstance(image, Tensor)]), some.labels[whole]


# ---- batches


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images / 255 - mean) / std as float32: uint8 (B, C, H, W) -> (B, C, H, W).

    The memory format stays. This is the one definition; an exported network expects it.
    """
    assert images.dtype == torch.uint8, images.dtype
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float64)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
    # As rows (C, 1, W) with the strides of images, which is six times as fast as (C, 1, 1).
    width = images.shape[3]
    rows = torch.stack((scale, shift)).float().to(images.device).repeat_interleave(width, 0)
    scale, shift = rows.view(2, width, -1).transpose(1, 2)[:, :, None]
    return images.to(torch.float32).mul_(scale).add_(shift)


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Cut every image out of itself with a black border, mirrored where asked.

    Images (B, C, H, W) are uint8, channels last in memory; so is what is returned. The border is
    H // 8 wide; `shifts` (B, 2), from 0 to twice the border, say where the cut starts from the top
    and from the left; `flips` (B,) are true where the cut is then mirrored.
    """
    batch, channels, height, width = images.shape
    border = height // 8
    device = images.device
    # (B, H, W, C) -> (B, H + 2 border, W + 2 border, C)
    padded = torch.nn.functional.pad(
        images.permute(0, 2, 3, 1), (0, 0, border, border, border, border)
    ).contiguous()
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height, device=device) + shifts[:, :1]
    rows = rows + torch.arange(batch, device=device)[:, None] * padded.shape[1]
    pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # (B, H, W), into all pixels
    cut = padded.view(-1, channels).index_select(0, pixels.view(-1))
    return cut.view(batch, height, width, channels).permute(0, 3, 1, 2)


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

    With a seed (0 or more) the order is shuffled; without, it is the split's. Order and augmentation
    depend on seed and epoch only, and an image's augmentation not on the batch size; torch's and
    numpy's own random numbers are not touched. `start` is the first batch to give: a resumed epoch goes
    on as it would have. `part` is (which, of how many): only this part of every batch, the others are left
    to other processes; the batch size must be a multiple. `augment` shifts each image by up to an eighth,
    and mirrors half of them where the split allows it; `augmentation` is done besides, but its random crops
    in place of the shifts, which needs a split with its originals. Where it mixes images, labels are float32
    shares of the classes (B, classes). The parts of a mixed batch are those of the whole one.

    Raises DataError at once where there is no whole batch, and for a damaged file when it is met.
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
    order = torch.arange(len(split))
    draws = None
    if seed is not None:
        state = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
        rng = torch.Generator().manual_seed(state >> 1)
        order = torch.randperm(len(split), generator=rng)
        if augment:
            border = split.images.shape[2] // 8
            shifts = torch.randint(0, 2 * border + 1, (len(split), 2), generator=rng)
            flips = torch.rand(len(split), generator=rng) < (0.5 if split.flip else 0.0)
            draws = _Draws(shifts, flips)
            if augmentation is not None:
                image_seeds = torch.randint(SEEDS, (len(split), 2), generator=rng)
                batch_seeds = torch.randint(SEEDS, (count,), generator=rng).tolist()
                crop_seeds = None
                if augmentation.crops:
                    crop_seeds = torch.randint(SEEDS, (len(split),), generator=rng)
                    shifts.fill_(border)  # in the middle
                draws = _Draws(shifts, flips, augmentation, image_seeds, batch_seeds, crop_seeds)
    share = batch_size // parts
    mixes_parts = augmentation is not None and augmentation.mixes and parts > 1
    places = []
    for number in range(start, count):
        first = number * batch_size + which * share
        place = torch.arange(first, min(first + share, len(split)))
        if mixes_parts:  # the last image of the part before is mixed into the first of this one
            before = first - 1 if which else first + batch_size - 1
            place = torch.cat((torch.tensor([before]), place))
        places.append(_Place(number, place, skip=int(mixes_parts)))
    return _batches(split, order, draws, places, channels_last, torch.device(device))


@dataclass(frozen=True)
class _Draws:
    """What was drawn for an epoch's images, by their place in it, and for its batches."""

    shifts: Tensor  # (N, 2)
    flips: Tensor  # (N,)
    augmentation: Augmentation | None = None
    image_seeds: Tensor | None = None  # (N, 2): one for pixels, one for erasing
    batch_seeds: Sequence[int] = ()
    crop_seeds: Tensor | None = None  # (N,), where images are cropped


@dataclass(frozen=True)
class _Place:
    """Where a batch lies in its epoch. The first `skip` images are there to be mixed into the next."""

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
    """Cut the box of a seed out of an image: (C, H, W)."""
    place, seed = drawn
    return source.cut(place, partial(augmentation.draw_box, seed))
