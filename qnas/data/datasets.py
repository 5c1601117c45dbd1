"""A user's map-style Datasets, read as one labelled data set.

If all items fit into memory at full size, they are read once and kept, as for shipped data sets that are in
memory. In larger Datasets, each item is read when it is needed. Some items are read twice. If an image then
differs, it is reported, and the digest leaves out the images, as it could never be reproduced.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from qnas.common.errors import DataError, one_line
from qnas.data.broken_images import BrokenImage, BrokenImages, or_broken, read_each
from qnas.data.decoding import spread
from qnas.data.image_files import Labels
from qnas.data.labelled_images import (
    LabelledImages,
    check_class_names,
    check_training,
    name_splits,
    update_with_pixels,
)
from qnas.data.lazy_images import DatasetItem, DatasetReader, Loader
from qnas.data.pil_pixels import FULL_BITS

SAMPLE = 32  # items to read twice
ARGUMENTS = {"train": "train", "val": "validation", "test": "test"}  # the arguments of Datasets
_UNKNOWN = np.iinfo(np.int64).min  # label of an item that was not or cannot be read


class MapDataset(Protocol):
    """A map-style Dataset: items by index, each (image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


AnyDataset = MapDataset | Dataset[Any]  # torch's Dataset declares no __len__


@dataclass(frozen=True, eq=False)
class Datasets:
    """Map-style Datasets for training and optionally validation and test, with their options.

    Items are (image, label). The image is a PIL image, a uint8 tensor (C, H, W) or (H, W), a uint8 array
    (H, W, C) or (H, W), or one of these in floats from 0 to 1, which are rounded to bytes. The label is a
    class number from 0. `loader` converts the first part of an item to such an image if it is not one; it
    runs in several threads. `classes` are the names of the classes, by default `train.classes`, or else their
    numbers. `flip` says whether training may mirror images. `bits` are the significant bits of PIL images of
    more than 8, such as 12; None stands for 16, with an error for an image whose values need fewer. Raises
    DataError for an argument that is empty or not a map-style Dataset.

    >>> from torch.utils.data import TensorDataset
    >>> images = TensorDataset(torch.zeros(20, 3, 32, 32), torch.arange(20) % 2)
    >>> Datasets(images, classes=("cat", "dog"), flip=False).first_size_px
    (32, 32)
    """

    train: AnyDataset
    validation: AnyDataset | None = None  # the test split if there is no `test`
    test: AnyDataset | None = None
    classes: Sequence[str] | None = None
    name: str = ""  # by default the name of the class of `train`
    loader: Loader | None = None
    flip: bool = True
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not (isinstance(self.bits, int) and 8 <= self.bits <= FULL_BITS):
            raise DataError(f"`bits={one_line(self.bits, 50)}`: expected 8 to {FULL_BITS}")
        for name in ("train", "validation", "test"):
            dataset = getattr(self, name)
            if dataset is not None or name == "train":
                _check_map_style(name, dataset)

    @property
    def first_size_px(self) -> tuple[int, int]:
        """Height and width of the first training image. Raises DataError if it cannot be read."""
        image, _ = DatasetReader(self.train, "train", self.loader, self.bits).read(0)
        return image.shape[1], image.shape[2]


def _check_map_style(name: str, dataset: Any) -> None:
    kind = type(dataset)
    is_map_style = hasattr(kind, "__len__") and hasattr(kind, "__getitem__")
    if not is_map_style or isinstance(dataset, IterableDataset | str | bytes | Mapping):
        raise DataError(
            f"{name}: expected a map-style Dataset with __len__ and __getitem__, got {kind.__name__}"
        )
    if len(dataset) == 0:
        raise DataError(f"{name}: the Dataset is empty")


@dataclass(frozen=True, eq=False)
class _Items(Sequence[DatasetItem]):
    """The concatenated items of several readers."""

    words: tuple[str, ...]  # for each reader: train, val or test
    readers: tuple[DatasetReader, ...]
    starts: tuple[int, ...]  # number of each reader's first item, and of all items
    labels: Labels

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: Any) -> Any:
        assert not isinstance(number, slice), number
        number = range(len(self))[number]
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        label = int(self.labels[number])
        index = number - self.starts[which]
        return DatasetItem(self.readers[which], index, None if label == _UNKNOWN else label)

    def read(self, number: int) -> tuple[Tensor, int]:
        item: DatasetItem = self[number]
        return item.reader.read(item.index)


Reading = tuple[Tensor, int] | BrokenImage


def read_datasets(
    given: Datasets | AnyDataset, *, memory_limit_bytes: int, max_broken: float, quiet: bool
) -> LabelledImages:
    """Read the labels of Datasets, and also the images if they fit into memory at full size.

    Raises DataError, naming the argument and the index, for items of another form, for labels that are not
    classes, and if more than a share `max_broken` of the items cannot be read.
    """
    if not isinstance(given, Datasets):
        _check_map_style("data", given)
    datasets = given if isinstance(given, Datasets) else Datasets(given)
    name = datasets.name or type(datasets.train).__name__
    items = _list_items(datasets, "train" if datasets is given else "data")
    sample = spread(len(items), SAMPLE).tolist()
    first, second = (list(map(or_broken(items.read), sample)) for _ in range(2))
    changing = [n for n, a, b in zip(sample, first, second, strict=True) if not _are_equal(a, b)]
    whole = {n: each for n, each in zip(sample, first, strict=True) if not isinstance(each, BrokenImage)}
    if any(items.labels[n] not in (_UNKNOWN, label) for n, (_, label) in whole.items()):
        items = replace(items, labels=np.full(len(items), _UNKNOWN))  # use the items' own labels

    images: Tensor | Sequence[Any] = items
    broken: BrokenImages = {}
    sampled = hashlib.sha256()
    for each in first:
        update_with_pixels(sampled, torch.empty(0) if isinstance(each, BrokenImage) else each[0])
    fingerprint: str | None = sampled.hexdigest()
    bytes_each = sum(pixels.numel() for pixels, _ in whole.values()) / max(len(whole), 1)
    fits = bytes_each * len(items) <= memory_limit_bytes
    if fits or (items.labels == _UNKNOWN).any():
        pixels, labels, broken = _read_all(items, max_broken, name, keep=fits, quiet=quiet)
        images = items = replace(items, labels=labels)
        if fits:
            images, fingerprint = pixels, None
    classes = _name_classes(datasets, items)
    known = items.labels != _UNKNOWN
    names = name_splits(items.words) or {"train": "train"}
    splits = {}
    for number, word in enumerate(items.words):
        start, end = items.starts[number : number + 2]
        splits[names[word]] = start + np.flatnonzero(known[start:end])
    check_training(classes, items.labels[splits["train"]], name)
    return LabelledImages(
        classes,
        images,
        items.labels,
        splits,
        name=name,
        source=name,
        flip=datasets.flip,
        broken=broken,
        bits=datasets.bits,
        fingerprint="" if changing else fingerprint,
        changing=items[changing[0]].where if changing else "",
        split_names={names[word]: ARGUMENTS[word] for word in items.words} if len(items.words) > 1 else {},
    )


def _list_items(datasets: Datasets, argument: str) -> _Items:
    """Return the items of all Datasets. `argument` is the name of the training Dataset in messages."""
    each = {
        "train": (datasets.train, argument),
        "val": (datasets.validation, "validation"),
        "test": (datasets.test, "test"),
    }
    readers = {
        word: DatasetReader(*named, datasets.loader, datasets.bits)
        for word, named in each.items()
        if named[0] is not None
    }
    starts = np.cumsum([0, *(len(reader.dataset) for reader in readers.values())])
    labels = [_own_labels(reader.dataset) for reader in readers.values()]
    return _Items(tuple(readers), tuple(readers.values()), tuple(starts.tolist()), np.concatenate(labels))


def _own_labels(dataset: Any) -> Labels:
    """Return the labels that a Dataset lists as `targets` or `labels`, without reading items."""
    if isinstance(dataset, Subset):
        labels: Labels = _own_labels(dataset.dataset)[np.asarray(dataset.indices)]
        return labels
    for attribute in ("targets", "labels"):
        found = getattr(dataset, attribute, None)
        if found is None or getattr(dataset, "target_transform", None) is not None:
            continue
        try:
            labels = np.asarray(found)
        except (TypeError, ValueError, RuntimeError):  # such as a ragged list, or a tensor on a GPU
            continue
        if labels.shape == (len(dataset),) and labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    return np.full(len(dataset), _UNKNOWN)


def _are_equal(first: Reading, second: Reading) -> bool:
    if isinstance(first, BrokenImage) or isinstance(second, BrokenImage):
        return type(first) is type(second)
    return torch.equal(first[0], second[0]) and first[1] == second[1]


def _read_all(
    items: _Items, max_broken: float, name: str, *, keep: bool, quiet: bool
) -> tuple[Tensor | list[Tensor], Labels, BrokenImages]:
    """Read every item once. Return the images (if `keep`), the labels and the broken images.

    If all images have the same size, they are one tensor (N, C, H, W); broken ones are black. Raises
    DataError as soon as more than a share `max_broken` of the items is broken.
    """
    pixels: dict[int, Tensor] = {}
    labels = items.labels.copy()

    def take(number: int, item: tuple[Tensor, int]) -> None:
        image, labels[number] = item
        if keep:
            pixels[number] = image

    broken = read_each(items.read, take, range(len(items)), max_broken, name, quiet=quiet)
    shapes = {each.shape for each in pixels.values()}
    black = torch.zeros(next(iter(shapes), (1, 1, 1)), dtype=torch.uint8)
    kept = [pixels.get(number, black) for number in range(len(items))]
    return torch.stack(kept) if len(shapes) == 1 else kept, labels, broken


def _name_classes(datasets: Datasets, items: _Items) -> tuple[str, ...]:
    """Return the names of the classes. Raises DataError for a label that is not a class."""
    known = np.flatnonzero(items.labels != _UNKNOWN)
    names = datasets.classes
    if names is None:
        own = [_own_classes(reader.dataset) for reader in items.readers]
        for reader, found in zip(items.readers, own, strict=True):
            if own[0] and found and found != own[0]:
                raise DataError(f"{reader.name}: its classes are not those of {items.readers[0].name}")
        names = own[0] or [str(i) for i in range(int(items.labels[known].max(initial=0)) + 1)]
    if len(names) < 2:
        raise DataError(f"{items.readers[0].name}: {len(names)} classes, expected at least 2")
    for number in known[(items.labels[known] < 0) | (items.labels[known] >= len(names))]:
        where, label = items[number].where, items.labels[number]
        raise DataError(f"{where}: label {label}, expected 0 to {len(names) - 1}, for {len(names)} classes")
    named = tuple(str(name) for name in names)
    check_class_names(named, items.readers[0].name)
    return named


def _own_classes(dataset: Any) -> tuple[str, ...]:
    """Return the names of the classes that a Dataset lists, if any."""
    if isinstance(dataset, Subset):
        return _own_classes(dataset.dataset)
    found = getattr(dataset, "classes", ())
    return tuple(map(str, found)) if isinstance(found, tuple | list) else ()
