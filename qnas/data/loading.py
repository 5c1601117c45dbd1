"""Loading of the data that a user gives: reading, splitting, and decoding to one resolution if it fits.

The data are a shipped kind by its spec, or Datasets. A run records them and opens them again from its record.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qnas.common.errors import DataError, UsageError
from qnas.common.text import shown
from qnas.data.broken_images import MAX_BROKEN, BrokenImages, check_broken, find_broken, read_each
from qnas.data.datasets import SAMPLE, AnyDataset, Datasets, read_datasets
from qnas.data.decoding import chunked
from qnas.data.image_data import ImageData, Images, Split, take
from qnas.data.labelled_images import LabelledImages, digest_of
from qnas.data.lazy_images import LazyImages
from qnas.data.left_out import summary
from qnas.data.normalisation import Normalisation, channel_statistics
from qnas.data.pil_pixels import FULL_BITS
from qnas.data.sources import DataSpec, open_dataset, parse_data_spec
from qnas.data.splits import SPLITS, complete_splits, without_broken

GivenData = str | DataSpec | AnyDataset | Datasets

DATASET = "dataset"  # the kind recorded for Datasets, which a run cannot reopen by itself
SMALL_PX = 64  # images of Datasets up to this size get the settings of CIFAR-10, larger ones of photographs
MEMORY_LIMIT_BYTES = 3_000_000_000  # limit for the decoded images of all splits; above it they stay encoded


def load_data(
    data: GivenData,
    *,
    resolution_px: int,
    channels: int = 3,
    heldout_fraction: float = 0.2,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    max_broken: float | None = MAX_BROKEN,
    keep_originals: bool = False,
    bits: int | None = None,
    normalisation: Normalisation | None = None,
    quiet: bool = False,
) -> ImageData:
    """Read, split and decode a data set.

    `data` is a kind of data such as `digits` or `imagefolder:DIR`, a map-style Dataset, or `Datasets` for
    several splits or options. If the data set has train, val and test, val is the held-out split. Otherwise,
    held-out images are taken from the training images, the same ones in every run. If there are no test
    images, a fifth of the images are first taken as such.

    If the pixels of all splits take at most `memory_limit_bytes`, every image is decoded once, now.
    Otherwise, images are decoded for each batch, and `mean` and `std` are those of a sample of the training
    images. With `keep_originals`, the images at full size are kept too, for random crops.

    Broken images are left out, up to a share `max_broken` of all images. If it is None, images that are not
    decoded now are not checked, and a broken one raises when it is read.

    `bits` are the significant bits of images of more than 8; by default, those that the data set needs.
    `normalisation` replaces the mean and standard deviation of the data's own channels.

    Raises DataError if images are missing, damaged or too few, and UsageError for a fraction outside 0 to 1.
    """
    assert resolution_px >= 1, resolution_px
    assert channels >= 1, channels
    if not 0 < heldout_fraction < 1:
        raise UsageError(f"`heldout_fraction={heldout_fraction}`: expected a number between 0 and 1")
    if max_broken is not None and not 0 <= max_broken <= 1:
        raise UsageError(f"`max_broken={max_broken}`: expected a share of the images, 0 to 1")
    most = 0.0 if max_broken is None else max_broken
    source = open_given(data, memory_limit_bytes=memory_limit_bytes, max_broken=most, bits=bits, quiet=quiet)
    splits = complete_splits(source, heldout_fraction)
    if source.broken:
        splits = without_broken(source, splits, source.broken)
    order = np.concatenate([splits[split] for split in SPLITS])
    depth = source.bits or FULL_BITS
    lazy = LazyImages(source.images, order, resolution_px, channels, source.pads, depth)
    images: Images = lazy
    broken: BrokenImages = {}
    if int(np.prod(lazy.shape, dtype=object)) <= memory_limit_bytes:
        images, broken = _decode_all(lazy, most, source.source, quiet=quiet)
    elif max_broken is not None:
        broken = find_broken(source.images, max_broken, source.source, bits=depth, quiet=quiet)
    if broken:
        splits = without_broken(source, splits, broken)
        kept = np.flatnonzero(~np.isin(order, list(broken)))
        images, lazy = take(images, kept), lazy.take(kept)
    broken = {**source.broken, **broken}
    check_broken(broken, len(source), most, source.source)

    labels = torch.from_numpy(source.targets[lazy.order])
    heldout, test, end = np.cumsum([len(splits[split]) for split in SPLITS]).tolist()
    mean, std = normalisation or channel_statistics(take(images, slice(test)))
    assert len(mean) == len(std) == channels, (mean, std)

    def split(name: str, start: int, stop: int) -> Split:
        places = slice(start, stop)
        originals = lazy.take(places) if keep_originals else None
        return Split(name, take(images, places), labels[places], mean, std, source.flip, originals)

    return ImageData(
        name=source.name,
        classes=source.classes,
        train=split("train", 0, heldout),
        heldout=split("heldout", heldout, test),
        test=split("test", test, end),
        train_and_heldout=split("train_and_heldout", 0, test),
        resolution_px=resolution_px,
        channels=channels,
        pads=source.pads,
        bits=source.bits,
        digest=digest_of(source, broken),
        broken=tuple(each for _, each in sorted(broken.items())),
        notes=_notes(source, keeps=isinstance(images, Tensor) and not keep_originals),
        left_out=source.left_out,
        split_names=source.split_names,
    )


def open_given(
    data: GivenData,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    max_broken: float = MAX_BROKEN,
    bits: int | None = None,
    quiet: bool = False,
) -> LabelledImages:
    """Open the data that a user gives, before they are split and decoded. Raises DataError.

    `bits` are the significant bits of images of more than 8; by default, those that the data set needs.
    """
    if isinstance(data, str | DataSpec):
        return open_dataset(data, bits=bits)
    if isinstance(data, LabelledImages):
        return data
    return read_datasets(data, memory_limit_bytes=memory_limit_bytes, max_broken=max_broken, quiet=quiet)


def _notes(source: LabelledImages, *, keeps: bool) -> tuple[str, ...]:
    """Return a warning if files are left out, images change between readings, or that would go unnoticed.

    `keeps` says whether every image is read once and kept.
    """
    notes = []
    if source.left_out:
        notes.append(f"{shown(source.name)}: {summary(source.left_out)}")
    if source.changing:
        changing = f"{source.changing} was a different image when it was read again"
        notes.append(
            f"{changing}: this run keeps the images that it read, but a resumed run may see others"
            if keeps or isinstance(source.images[0], Tensor)
            else f"{changing}: images may differ in every epoch, and a resumed run is not exactly "
            "the same run"
        )
    elif source.fingerprint is not None:
        compared = f"{min(SAMPLE, len(source))} of {len(source)} images were compared"
        notes.append(
            f"{source.name}: a resumed run is exact if an index always gives the same image: {compared}"
        )
    return tuple(notes)


def _decode_all(lazy: LazyImages, most: float, where: str, *, quiet: bool) -> tuple[Tensor, BrokenImages]:
    """Return all images in one array (N, C, H, W), channels last in memory, and the broken ones by number.

    Broken images are black. Raises DataError as soon as more than a share `most` is broken.
    """
    count, channels, height, width = lazy.shape
    images = torch.zeros((count, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    if isinstance(lazy.originals, Tensor):
        chunks = list(chunked(count, 1024))
        for chunk in tqdm(chunks, desc="images", unit="", leave=False, disable=quiet or None):
            chosen = torch.from_numpy(lazy.order[chunk.start : chunk.stop])
            images[chunk.start : chunk.stop] = lazy.fit(lazy.originals[chosen], "images")
        return images, {}
    numbers = lazy.order.tolist()
    return images, read_each(lazy.__getitem__, images.__setitem__, numbers, most, where, quiet=quiet)


def recorded_data(data: GivenData, images: ImageData) -> str:
    """Return the data's entry in config.json: `digits`, `imagefolder:DIR` or `dataset:NAME`."""
    if isinstance(data, str | DataSpec):
        return str(parse_data_spec(str(data)))
    return f"{DATASET}:{images.name}"


def kind_of(data: GivenData) -> str:
    """Return the kind of data, which selects presets and recipes. Raises DataError."""
    if isinstance(data, str | DataSpec):
        return parse_data_spec(str(data)).kind
    datasets = data if isinstance(data, Datasets) else Datasets(data)
    return "cifar10" if max(datasets.first_size_px) <= SMALL_PX else "imagefolder"


def reopen(data: GivenData | None, config: Mapping[str, Any], default: str | None = None) -> GivenData:
    """Return the data of a run: those given, or those recorded in its config.json, or the default.

    Raises DataError if no data are given and the run had Datasets or records no data.
    """
    if data is not None:
        return data
    recorded = config.get("data", default)
    if recorded is None:
        raise DataError("the run does not record its data: give them as `data`")
    if str(recorded).partition(":")[0] == DATASET:
        raise DataError(f"the run had Datasets ({recorded}): give them again as `data`")
    return str(recorded)
