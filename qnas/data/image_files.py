"""Encoded images: files on disk, members of tar shards, or bytes in memory.

`ImageNumbers` are numbers of images in their data set, from 0; `Labels` are the class numbers of images.
"""

import os
import tarfile
from collections.abc import Iterator, Mapping
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
SPLIT_NAMES = {  # and how people write them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
UNPACKED_LIMIT_BYTES = 3_000_000_000  # limit for archives and IDX files, which are unpacked in memory
MEMBERS = 5_000_000  # limit for the members of a tar
_CHUNK_BYTES = 1 << 20
_PADDING_BYTES = 1 << 26  # limit for the zeros at the end of a tar
_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that can be read here, in lower case: `.jpg`, `.png`, ..."""
    return _SUFFIXES


def unreadable_suffixes() -> Mapping[str, str]:
    """Return the suffixes of images that cannot be read here, each with the package to install for it."""
    return {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "pillow>=11.3"}


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
    except OSError:  # also where a name is too long, or a folder is a file
        return f"{path} missing"
    return f"{path} {found.st_size} {found.st_mtime_ns}"


_cached_stamp = lru_cache(maxsize=1)(file_stamp)  # the images of a shard are consecutive


def check_exists(path: Path) -> None:
    """Raise DataError if a path does not exist."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, none of which stays in memory.

    Raises tarfile.TarError for a damaged tar, also if it does not end with zeros (tarfile takes a damaged
    header for the end), and for one of more than MEMBERS members.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            count = before = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # what tarfile has read so far
                count += 1
                if member.size < 0 or tar.offset <= before:  # it would be read for ever
                    raise tarfile.ReadError(f"a wrong size at byte {member.offset}")
                if count > MEMBERS:
                    raise tarfile.ReadError(f"over {MEMBERS:,} members")
                before = tar.offset
                yield member
            end = tar.offset
        file.seek(end)
        _check_end(file, end)
    # what tarfile raises for some damaged headers
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError) as error:
        raise tarfile.ReadError(f"an unreadable header: {type(error).__name__}") from error


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member of a tar is a file in one piece, and not a link, a device or sparse."""
    return member.isreg() and not member.issparse()


def _check_end(file: BinaryIO, end: int) -> None:
    """Raise tarfile.TarError unless the rest of a tar, from byte `end`, is zeros."""
    read = 0
    while chunk := file.read(_CHUNK_BYTES):
        read += len(chunk)
        if chunk.strip(b"\0") or read > _PADDING_BYTES:
            raise tarfile.ReadError(f"an unreadable header at byte {end}")
    if not read:
        raise tarfile.ReadError("no end")
