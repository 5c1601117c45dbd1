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

from qnas.common.errors import DataError
from qnas.common.reading import open_regular
from qnas.data.image_formats import readable_suffixes, unreadable_suffixes

ImageNumbers = NDArray[np.int64]
Labels = NDArray[np.int64]

__all__ = ["readable_suffixes", "unreadable_suffixes"]  # of image_formats, for those that list files

SPLIT_WORDS = ("train", "val", "test")  # the names of splits in data sets
SPLIT_NAMES = {  # and how people write them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
UNPACKED_LIMIT_BYTES = 3_000_000_000  # limit for archives and IDX files, which are unpacked in memory
FILE_LIMIT_BYTES = 1_000_000_000  # limit for an encoded image
MEMBERS = 5_000_000  # limit for the members of a tar
_CHUNK_BYTES = 1 << 20
_PADDING_BYTES = 1 << 26  # limit for the zeros at the end of a tar


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
    except (OSError, ValueError):  # also where a name is too long, or a folder is a file
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
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            count = before = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # what tarfile has read so far
                count += 1
                if member.size < 0 or tar.offset <= before:  # it would be read for ever
                    raise tarfile.ReadError(f"a wrong size at byte {member.offset}")
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"a member of {member.size} bytes, more than there are")
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
