"""The shipped kinds of data, opened as labelled data sets.

This module reads IDX files, CIFAR-10 as published and the digits of scikit-learn; `folders` and `shards` read
the other kinds. A problem with a data set raises a DataError that names the file and what was expected.
"""

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnas.common.arguments import quoted
from qnas.common.errors import DataError, UsageError, nearest, one_line
from qnas.common.reading import open_regular
from qnas.data.folders import read_classes, read_folder
from qnas.data.image_files import UNPACKED_LIMIT_BYTES, Labels, check_exists
from qnas.data.labelled_images import LabelledImages
from qnas.data.shards import read_shards
from qnas.data.significant_bits import find_bits

FASHION_CLASSES = (
    *("t-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class DataSpec:
    """A shipped kind of data with the path of its files, such as `digits` or `imagefolder:DIR`.

    Raises DataError for an unknown kind, and for a missing or superfluous path.
    """

    kind: str
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown data {quoted(self.kind)}: {nearest(self.kind, KINDS)}")
        form = KINDS[self.kind].form
        if (self.path is not None) != (":DIR" in form):
            raise DataError(f"data {self}: expected {form}")

    def __str__(self) -> str:
        return self.kind if self.path is None else f"{self.kind}:{self.path}"


def parse_data_spec(text: str) -> DataSpec:
    """Parse `KIND` or `KIND:DIR` and make the path absolute. Raises DataError.

    >>> str(parse_data_spec("digits"))
    'digits'
    """
    kind, _, folder = text.partition(":")
    if kind not in KINDS and os.path.exists(text):  # Path.exists raises for some texts
        raise DataError(
            f"unknown data {quoted(text)}: for a folder of photos, imagefolder:{one_line(text, 100)}"
        )
    try:
        return DataSpec(kind, Path(folder).expanduser().resolve() if folder else None)
    except (OSError, RuntimeError, ValueError) as error:  # "~nobody", a loop of links, a zero byte
        raise DataError(f"data {one_line(text, 100)}: {one_line(error)}") from error


def open_dataset(data: str | DataSpec, *, bits: int | None = None) -> LabelledImages:
    """Open a shipped kind of data as a map-style Dataset of (uint8 image (C, H, W), label).

    `bits` are the significant bits of images of more than 8, by default those that their values need.
    Raises DataError, and UsageError for something else than a text.

    >>> digits = open_dataset("digits")
    >>> len(digits), digits[0][0].shape, digits.classes[:2]
    (1797, torch.Size([1, 8, 8]), ('0', '1'))
    """
    if not isinstance(data, str | DataSpec):
        raise UsageError(f"`data={quoted(data)}`: expected a kind of data, such as digits or imagefolder:DIR")
    spec = parse_data_spec(data) if isinstance(data, str) else data
    kind = KINDS[spec.kind]
    name = spec.path.name if kind.is_folder and spec.path else spec.kind
    found = kind.read(spec.path or Path())
    bits = find_bits(found.images) if bits is None else bits
    return replace(found, name=name, source=str(spec), flip=kind.flip, pads=kind.pads, bits=bits)


def _read_digits(_: Path) -> LabelledImages:
    from sklearn.datasets import load_digits  # imported here, as it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0 to 16
    labels = digits.target.astype(np.int64)
    classes = tuple(str(i) for i in range(10))
    return LabelledImages(
        classes, torch.from_numpy(images)[:, None], labels, {"train": np.arange(len(labels))}
    )


def _read_fashion(path: Path) -> LabelledImages:
    check_exists(path)
    images: list[Tensor] = []
    labels: list[Labels] = []
    for prefix in ("train", "t10k"):
        image_file, part_images = _read_idx(path, f"{prefix}-images-idx3-ubyte", ndim=3)
        label_file, part_labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(part_images) != len(part_labels):
            raise DataError(f"{label_file}: {len(part_labels)} labels for {len(part_images)} images")
        if images and images[0].shape[2:] != part_images.shape[1:]:
            height, width = images[0].shape[2:]
            raise DataError(
                f"{image_file}: images of {part_images.shape[1]} x {part_images.shape[2]} pixels, expected "
                f"{height} x {width} as in training"
            )
        if part_labels.max() >= len(FASHION_CLASSES):
            raise DataError(f"{label_file}: label {part_labels.max()}, expected 0 to 9")
        images.append(torch.from_numpy(part_images)[:, None])
        labels.append(part_labels.astype(np.int64))
    of_train, of_test = map(len, labels)
    parts = {"train": np.arange(of_train), "test": np.arange(of_train, of_train + of_test)}
    return LabelledImages(FASHION_CLASSES, torch.cat(images), np.concatenate(labels), parts)


def _read_idx(folder: Path, name: str, ndim: int) -> tuple[Path, NDArray[np.uint8]]:
    """Read an IDX file of bytes, plain or .gz: magic 0 0 8 ndim, big-endian uint32 sizes, values."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise DataError(f"{folder}: lacks {name} or {name}.gz")
    path = found[0]
    header_bytes = 4 + 4 * ndim
    try:
        with open_regular(path) as whole, gzip.open(whole) if path.suffix == ".gz" else whole as file:
            header = file.read(header_bytes)
            magic = bytes((0, 0, 8, ndim))
            if header[:4] != magic or len(header) < header_bytes:
                found_hex, expected_hex = header[:4].hex(), magic.hex()
                raise DataError(
                    f"{path}: starts with {found_hex}, expected IDX magic {expected_hex} and {ndim} sizes"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            count = int(np.prod(shape, dtype=object))
            if count == 0 or count > UNPACKED_LIMIT_BYTES:
                raise DataError(f"{path}: header says {count} bytes, expected 1 to {UNPACKED_LIMIT_BYTES}")
            content = bytearray()  # grows with what is there, whatever the header says
            while chunk := file.read(min(count + 1 - len(content), _CHUNK_BYTES)):
                content += chunk  # to one more than there should be, to reach gzip's checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged: {one_line(error)}") from error
    if len(content) != count:
        more = "or more " if len(content) > count else ""
        raise DataError(f"{path}: header says {count} bytes, found {len(content)} {more}after it")
    return path, np.frombuffer(content, np.uint8).reshape(shape)


def _read_cifar10(path: Path) -> LabelledImages:
    official = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    if not official.is_dir():
        return read_classes(path, needs_test=True)
    from torchvision.datasets import CIFAR10

    try:
        # checks the MD5 of every file before it unpickles one
        train, test = (CIFAR10(official.parent, train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{official}: not the official files: {one_line(error)}") from error
    images = np.concatenate([train.data, test.data])  # (60000, 32, 32, 3)
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    parts = {"train": np.arange(len(train.data)), "test": np.arange(len(train.data), len(images))}
    return LabelledImages(tuple(train.classes), torch.from_numpy(images).permute(0, 3, 1, 2), labels, parts)


class DataKind(NamedTuple):
    """A kind of data: its form on the command line, its reader and its augmentation."""

    form: str  # on the command line, with the files expected there
    read: Callable[[Path], LabelledImages]
    flip: bool = True  # whether a mirrored image still shows its class
    pads: bool = False  # whether slightly smaller images get a black border
    is_folder: bool = False  # the images may show anything, so the data set is named after the folder


KINDS: dict[str, DataKind] = {
    "digits": DataKind("digits, without a folder", _read_digits, flip=False),
    "fashion-mnist": DataKind(
        "fashion-mnist:DIR, the folder of the four IDX files, .gz or not", _read_fashion, pads=True
    ),
    "cifar10": DataKind(
        "cifar10:DIR with train/CLASS/* and test/CLASS/*, or the .tar.gz of it, or cifar-10-batches-py",
        _read_cifar10,
    ),
    "imagefolder": DataKind(
        "imagefolder:DIR with train/CLASS/* and val/CLASS/* or test/CLASS/*, or with CLASS/*, or with a CSV "
        "of the columns file, label and possibly split",
        read_folder,
        is_folder=True,
    ),
    "shards": DataKind(
        "shards:DIR with tar shards of KEY.jpg and KEY.cls, train and val or test in their names, or neither",
        read_shards,
        is_folder=True,
    ),
}
