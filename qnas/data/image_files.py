"""Encoded images: files on disk, members of tar shards, or bytes in memory.

`ImageNumbers` are numbers of images in their data set, from 0; `Labels` are the class numbers of images.
"""

import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnas.common.errors import DataError

ImageNumbers = NDArray[np.int64]
Labels = NDArray[np.int64]

SPLIT_WORDS = ("train", "val", "test")  # the names of splits in data sets
UNPACKED_LIMIT_BYTES = 3_000_000_000  # limit for archives and IDX files, which are unpacked in memory
_CHUNK_BYTES = 1 << 20
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)


class Stretch(NamedTuple):
    """A range of bytes in a file, such as a member of a tar."""

    path: Path
    start: int
    size: int


class OriginalFile(NamedTuple):
    """An encoded image: a file, a range of bytes in a file, or bytes in memory."""

    name: str  # relative to the data set's folder, with forward slashes
    where: str  # its name in messages
    content: Path | Stretch | memoryview

    def size_bytes(self) -> int:
        """Return the size of the encoded image. Raises OSError if the file does not exist."""
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
        """Return a text that changes if the image may have changed: a file's size and time, or a hash."""
        match self.content:
            case Path():
                return file_stamp(self.content)
            case Stretch(path, start, size):
                return f"{_cached_stamp(path)} {start} {size}"
        return sha256(self.content).hexdigest()


def file_stamp(path: Path) -> str:
    """Return a text that changes when a file changes: its path, size and time."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return f"{path} missing"
    return f"{path} {found.st_size} {found.st_mtime_ns}"


_cached_stamp = lru_cache(maxsize=1)(file_stamp)  # the images of a shard are consecutive


def check_exists(path: Path) -> None:
    """Raise DataError if a path does not exist."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the folders and files of a tar, but no links, and no sparse files, which are not contiguous.

    Raises tarfile.TarError for a damaged tar, also if it does not end with zeros: tarfile takes a damaged
    header for the end.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        yield from (m for m in tar if m.isdir() or (m.isfile() and not m.issparse()))
        end = tar.offset
    file.seek(end)
    found = False
    while chunk := file.read(_CHUNK_BYTES):
        found = True
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"an unreadable header at byte {end}")
    if not found:
        raise tarfile.ReadError("no end")
