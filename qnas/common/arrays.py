"""Bounded reading of the arrays of npz files: ZIP archives of .npy members, as numpy.savez writes them.

Nothing is unpickled. What a file says of itself is checked before memory is taken for it: the size of the
archive's directory, the packing and size of a member, and the header of an array, whose kind, dimensions
and bytes must be as expected. Whatever zipfile, zlib or numpy raise for a file is one of `DAMAGE`.
"""

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qnas.common.reading import open_regular

Array = npt.NDArray[Any]

# What reading a damaged archive or array raises: zipfile refuses with RuntimeError what is encrypted and with
# NotImplementedError what is packed in a newer way, and numpy's header is a text of Python.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, NotImplementedError),
    *(ValueError, OverflowError, TypeError, LookupError, MemoryError, SyntaxError, TokenError, SystemError),
)
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # with bounded memory, unlike others
DIRECTORY_BYTES = 1_000_000  # of an archive: of 10,000 members
MEMBERS = 1_000
# of a member above 16 MB: deflate packs a thousand zeros in a byte, but measurements to a fiftieth
RATIO, RATIO_BYTES = 200, 16_000_000
HEADER_BYTES = 10_000  # of an array
TEXT_CHARACTERS = 1_000_000  # of one text in an array
_CHUNK = 1 << 20


class WrongArrayError(ValueError):
    """An array of another kind or of other dimensions than expected."""


class _Portions(io.RawIOBase):
    """A file of which one read takes at most `DIRECTORY_BYTES`: a larger directory ends too soon."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        asked = DIRECTORY_BYTES if size is None or size < 0 else min(size, DIRECTORY_BYTES)
        return self._file.read(asked)


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a ZIP archive whose members and directory are bounded.

    Raises OSError where there is no regular file, and what is in `DAMAGE`, here and inside the block.
    """
    with open_regular(path) as file, zipfile.ZipFile(_Portions(file)) as archive:
        if len(archive.infolist()) > MEMBERS:
            raise zipfile.BadZipFile(f"{len(archive.infolist())} members, expected at most {MEMBERS}")
        yield archive


def check_member(info: zipfile.ZipInfo) -> None:
    """Raise ValueError for a member that is encrypted, or packed in a way that is not read."""
    if info.flag_bits & 0x1:
        raise ValueError("encrypted, expected plain files")
    if info.compress_type not in PACKINGS or info.flag_bits & 0x20:
        raise ValueError("packed in an unusual way, expected deflated or stored files")


class Arrays:
    """The arrays of an open npz file, read one by one."""

    def __init__(self, archive: zipfile.ZipFile, most_bytes: int) -> None:
        self._archive, self._left = archive, most_bytes
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if self._members.setdefault(info.filename.removesuffix(".npy"), info) is not info:
                raise ValueError(f"two members {info.filename[:60]!r}")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str, kinds: str, dimensions: int) -> Array:
        """Return an array of one of numpy's kinds (`U` text, `i` and `u` integers, `f` floats).

        Raises KeyError where there is none, WrongArrayError for another kind or other dimensions, and what is
        in `DAMAGE` where it cannot be read.
        """
        info = self._members[name]
        check_member(info)
        if info.file_size > RATIO_BYTES and info.file_size > RATIO * info.compress_size:
            raise ValueError(f"{info.file_size:,} bytes packed in {info.compress_size:,}")
        if info.file_size > self._left + HEADER_BYTES:
            raise ValueError(f"{info.file_size:,} bytes, more than such a file has")
        with self._archive.open(info) as file:
            begin = file.read(HEADER_BYTES)
            shape, in_columns, dtype, at = _header(begin)
            found = f"{dtype} of shape {shape}"[:80]
            if dtype.kind not in kinds or len(shape) != dimensions:
                raise WrongArrayError(f"expected {_words(kinds, dimensions)}, got {found}")
            if not all(0 <= length < 2**40 for length in shape) or dtype.itemsize > 4 * TEXT_CHARACTERS:
                raise ValueError(f"{found}, which no array has")
            size = math.prod(shape) * dtype.itemsize
            self._left -= max(size, 8 * math.prod(shape))  # numbers are read as those of 8 bytes
            if self._left < 0:
                raise ValueError(f"{found}, more than such a file has")
            if at + size != info.file_size:
                raise ValueError(f"{found} in {info.file_size:,} bytes")
            content = _to_end(file, bytearray(begin[at:]), size)
        if not size:
            return np.zeros(shape, dtype)
        if dtype.kind == "U":
            _check_text(content, dtype)
        return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")


@contextmanager
def open_arrays(path: Path, most_bytes: int) -> Iterator[Arrays]:
    """Open an npz file, of whose arrays at most these bytes are read. Raises as `open_zip`."""
    with open_zip(path) as archive:
        yield Arrays(archive, most_bytes)


def _header(begin: bytes) -> tuple[tuple[int, ...], bool, "np.dtype[Any]", int]:
    """Return an array's shape, whether columns come first, its numbers, and where they begin."""
    file = io.BytesIO(begin)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    elif version == (2, 0):
        read = np.lib.format.read_array_header_2_0
    else:
        raise ValueError(f"version {version[0]}.{version[1]} of numpy's format, expected 1.0 or 2.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's parser, for a header that is damaged
        shape, in_columns, dtype = read(file, max_header_size=HEADER_BYTES)
    return shape, in_columns, dtype, file.tell()


def _words(kinds: str, dimensions: int) -> str:
    what = "text" if kinds == "U" else "numbers" if "f" in kinds else "integers"
    return f"{what} in {dimensions} dimension{'s'[: dimensions != 1]}"


def _to_end(file: IO[bytes], content: bytearray, size: int) -> bytearray:
    """Read a member to its end, where its checksum is compared, and return its content of `size` bytes."""
    while len(content) <= size and (chunk := file.read(min(_CHUNK, size + 1 - len(content)))):
        content += chunk
    if len(content) != size:
        raise ValueError(f"{len(content):,} bytes of an array of {size:,}")
    return content


def _check_text(content: bytearray, dtype: "np.dtype[Any]") -> None:
    """Raise ValueError for numbers that are no characters, at which Python fails."""
    characters = np.frombuffer(content, np.dtype("u4").newbyteorder(dtype.byteorder))
    if characters.max() > 0x10FFFF or np.any((characters >= 0xD800) & (characters < 0xE000)):
        raise ValueError("text of numbers that are no characters")
