"""Encoded images: files on disk, members of tar shards, or bytes in memory.

`ImageNumbers` are numbers of images in their data set, from 0; `Labels` are the class numbers of images.
"""

import errno
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnas.common.errors import DataError, one_line
from qnas.common.reading import open_regular
from qnas.data.image_formats import readable_suffixes, unreadable_suffixes

ImageNumbers = NDArray[np.int64]
Labels = NDArray[np.int64]

__all__ = ["readable_suffixes", "unreadable_suffixes"]  # of image_formats, for those that list files

SPLIT_WORDS = ("train", "val", "test")  # the names of splits in data sets
UNPACKED_LIMIT_BYTES = 3_000_000_000  # limit for archives and IDX files, which are unpacked in memory
FILE_LIMIT_BYTES = 1_000_000_000  # limit for an encoded image
_CHUNK_BYTES = 1 << 20


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
        """Return the size of the encoded image. Raises FileNotFoundError if there is no such regular file."""
        match self.content:
            case Path():
                try:
                    found = self.content.stat()
                except (NotADirectoryError, ValueError) as error:  # a name that no file can have
                    raise FileNotFoundError(errno.ENOENT, "no such file", str(self.content)) from error
                if not stat.S_ISREG(found.st_mode):
                    raise FileNotFoundError(errno.ENOENT, "no regular file", str(self.content))
                return found.st_size
            case Stretch():
                return self.content.size
        return len(self.content)

    def read(self, most: int | None = None) -> bytes | memoryview:
        """Return the encoded image, or its first `most` bytes.

        Raises OSError, also for what is no regular file, and for one of more than FILE_LIMIT_BYTES.
        """
        match self.content:
            case Path() as path:
                try:
                    file = open_regular(path)
                except ValueError as error:  # a zero in its name
                    raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from error
                with file:
                    return _read_range(file, 0, os.fstat(file.fileno()).st_size, most)
            case Stretch(path, start, size):
                with open_regular(path) as file:
                    return _read_range(file, start, size, most)
        return self.content[:most]

    def stamp(self) -> str:
        """Return a text that changes if the image may have changed: a file's size and time, or a hash."""
        match self.content:
            case Path():
                return file_stamp(self.content)
            case Stretch(path, start, size):
                return f"{_cached_stamp(path)} {start} {size}"
        return sha256(self.content).hexdigest()


def _read_range(file: BinaryIO, start: int, size: int, most: int | None) -> bytes:
    """Read `size` bytes of a file, or the first `most` of them. Raises OSError."""
    wanted = size if most is None else min(size, most)
    if wanted > FILE_LIMIT_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {FILE_LIMIT_BYTES:,}")
    return os.pread(file.fileno(), wanted, start)


def stamp_of(images: Iterable[OriginalFile]) -> str:
    """Return 64 hexadecimal digits that change if the names, places, sizes or times of images change."""
    stamp = sha256()
    for image in images:
        stamp.update(f"{image.where}\0{image.stamp()}\0".encode(errors="surrogateescape"))
    return stamp.hexdigest()


def file_stamp(path: Path) -> str:
    """Return a text that changes when a file changes: its path, size and time."""
    try:
        found = path.stat()
    except (OSError, ValueError):
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
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = iter(tar)
        while True:
            try:
                member = next(members, None)
            except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
                raise tarfile.ReadError(f"an unreadable header: {one_line(error)}") from error
            if member is None:
                break
            if member.size < 0 or member.offset_data + member.size > length:
                raise tarfile.ReadError(f"a member of {member.size} bytes, more than there are")
            if member.isdir() or (member.isfile() and not member.issparse()):
                yield member
        end = tar.offset
    file.seek(end)
    found = False
    while chunk := file.read(_CHUNK_BYTES):
        found = True
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"an unreadable header at byte {end}")
    if not found:
        raise tarfile.ReadError("no end")
