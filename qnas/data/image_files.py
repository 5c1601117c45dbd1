"""Encoded images wherever they lie, and a data set of them: before any of it is decoded."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qnas.common.errors import DataError

Indices = NDArray[np.int64]

SPLIT_WORDS = ("train", "val", "test")  # as data sets name their splits
UNPACKED_LIMIT_BYTES = 3_000_000_000  # of an archive or IDX file: what is unpacked lies in memory
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)


class Stretch(NamedTuple):
    """Bytes in the middle of a file, such as a member of a tar."""

    path: Path
    start: int
    size: int


class OriginalFile(NamedTuple):
    """An encoded image: a file, a stretch of one, or bytes in memory."""

    name: str  # below the data set's folder, with forward slashes
    where: str  # as messages name it
    content: Path | Stretch | memoryview

    def size_bytes(self) -> int:
        """Return the size of the encoded image. Raises OSError where there is no such file."""
        match self.content:
            case Path():
                return self.content.stat().st_size
            case Stretch():
                return self.content.size
        return len(self.content)

    def read(self) -> bytes | memoryview:
        """Return the encoded image. Raises OSError."""
        match self.content:
            case Path():
                return self.content.read_bytes()
            case Stretch(path, start, size):
                with path.open("rb") as file:
                    return os.pread(file.fileno(), size, start)
        return self.content

    def stamp(self) -> str:
        """Return what changes where the image may have: size and time of a file, the bytes in memory."""
        match self.content:
            case Path():
                return _stamp(self.content)
            case Stretch(path, start, size):
                return f"{_cached_stamp(path)} {start} {size}"
        return sha256(self.content).hexdigest()


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except FileNotFoundError:
        return f"{path} missing"
    return f"{path} {found.st_size} {found.st_mtime_ns}"


@lru_cache(maxsize=1)  # the images of a shard follow one another
def _cached_stamp(path: Path) -> str:
    return _stamp(path)


@dataclass(frozen=True, eq=False)
class Originals:
    """Original images with labels. `parts` names those splits that the data set itself makes."""

    classes: tuple[str, ...]
    images: Tensor | Sequence[OriginalFile]
    labels: Indices
    parts: dict[str, Indices]


def check_exists(path: Path) -> None:
    """Raise DataError where there is nothing at a path."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def name_splits(words: Collection[str]) -> dict[str, str] | None:
    """Say which split each of `train`, `val`, `test` is, of those that a data set names.

    `val` is what to choose by where there is `test` too, and stands for it elsewhere. None where
    that leaves no training or no test images.

    >>> name_splits(["train", "val"])
    {'train': 'train', 'val': 'test'}
    """
    if {"train", "val", "test"} <= set(words):
        return {"train": "train", "val": "heldout", "test": "test"}
    for test in ("test", "val"):
        if {"train", test} <= set(words):
            return {"train": "train", test: "test"}
    return None


def number_classes(labels: Sequence[str]) -> tuple[tuple[str, ...], Indices]:
    """Return the classes that occur, and each label's number among them.

    Whole numbers are sorted as such, all else as text.

    >>> number_classes(["10", "9", "10"])[0]
    ('9', '10')
    """
    found = set(labels)
    order = sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    numbers = {name: number for number, name in enumerate(order)}
    return tuple(order), np.array([numbers[label] for label in labels], dtype=np.int64)


def assemble(
    images: Sequence[OriginalFile],
    classes: tuple[str, ...],
    labels: Indices,
    words: Sequence[str],
    where: Path,
) -> Originals:
    """Return originals of which each image has its number of a class and, or none has, the word of its split.

    Raises DataError for fewer than two classes, and for a class or a split that training lacks.
    """
    if len(classes) < 2:
        raise DataError(f"{where}: {len(classes)} classes, expected at least 2")
    parts: dict[str, Indices] = {"train": np.arange(len(labels))}
    if words:
        found = set(words)
        splits = {"train": "train"} if found == {"train"} else name_splits(found)
        if splits is None:
            raise DataError(f"{where}: of train, val and test it has {' and '.join(sorted(found))} alone")
        each = np.array(words)
        parts = {split: np.flatnonzero(each == word) for word, split in splits.items()}
    counts = np.bincount(labels[parts["train"]], minlength=len(classes))
    if not counts.all():
        raise DataError(f"{where}: no training image of class {classes[int(counts.argmin())]!r}")
    return Originals(classes, images, labels, parts)
