"""The significant bits of a data set's images that have more than 8.

Cameras and scanners store 10, 12 or 14 bits in files of 16. Such images become bytes by one rule for the
whole data set: a rule for each image would show a dark photograph as bright as a bright one. The significant
bits are the fewest of `STEPS` that hold the largest value of all images. A run records them, and images that
are classified later become bytes with the same.

A file may say its bits itself: a PNG in its chunk sBIT, a PGM by its largest value. Files with the suffix of
a format of 8 bits are not looked at. For the other files the answer is cached until one of them changes.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from qnas.common.errors import BrokenImageError
from qnas.common.resources import user_cache
from qnas.data.decoding import UNREADABLE, alone_if_large, chunked, in_threads, opened, read_encoded
from qnas.data.file_cache import keep, one_at_a_time, recall
from qnas.data.image_files import OriginalFile, stamp_of
from qnas.data.lazy_images import Original
from qnas.data.pil_pixels import lacks_bits

STEPS = (8, 10, 12, 14, 16)
SCHEMA = "qnas.bits/1"
_EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".heic", ".heif", ".avif")
_PNG_HEADER = 26  # bytes, up to its bits and kind of colours
_PNG_CHUNKS = 4096  # bytes in which the chunk of significant bits stands
_NONE, _FAILED = -1, -2  # in place of an image's largest value: it has 8 bits; it could not be read now
_KEPT: TypeAdapter[int] = TypeAdapter(int)


def bits_for(largest: int) -> int:
    """Return the fewest bits that hold a value.

    >>> bits_for(200), bits_for(4095), bits_for(4096)
    (8, 12, 14)
    """
    return next((bits for bits in STEPS if largest < 2**bits), STEPS[-1])


def find_bits(images: Tensor | Sequence[Original], *, quiet: bool = False) -> int | None:
    """Return the significant bits of the images of more than 8, None if no file has more.

    Broken images do not count.
    """
    if isinstance(images, Tensor):
        return None
    files = [each for each in images if isinstance(each, OriginalFile) and _may_be_deep(each)]
    if not files:
        return None
    if isinstance(files[0].content, memoryview):  # of an archive that is in memory, and quickly looked at
        largest, _ = _largest_of(files, quiet=quiet)
    else:
        stamp = stamp_of(files)
        path = user_cache("bits") / f"{stamp[:32]}.json"
        with one_at_a_time(path):
            kept = recall(path, SCHEMA, stamp, _KEPT)
            largest, is_final = (kept, True) if kept is not None else _largest_of(files, quiet=quiet)
            if kept is None and is_final:
                keep(path, SCHEMA, stamp, largest)
    return None if largest == _NONE else bits_for(largest)


def _largest_of(files: Sequence[OriginalFile], *, quiet: bool) -> tuple[int, bool]:
    """Return the largest value of images of more than 8 bits, and whether every file could be read."""
    found: list[int] = []
    with tqdm(total=len(files), desc="bits", unit="", leave=False, disable=quiet or None) as bar:
        for values in in_threads(lambda n: _largest_value(files[n]), chunked(len(files))):
            found += values
            bar.update(len(values))
    return max([_NONE, *found]), _FAILED not in found  # of a disk or a network, which may be temporary


def _may_be_deep(file: OriginalFile) -> bool:
    return PurePosixPath(file.name).suffix.lower() not in _EIGHT_BITS


def _largest_value(file: OriginalFile) -> int:
    """Return the largest value of an image of more than 8 bits, _NONE for others, _FAILED for none."""
    try:
        content = read_encoded(file) if not _is_plain_png(file) else b""
        if not content:
            return _NONE
        with opened(content, file.where) as image, alone_if_large(image):
            if lacks_bits(image):
                image.load()
                brightest = np.asarray(image.convert("RGB")).max()
                return int(brightest) << 8 | 0xFF  # the lower bits are not known
            if image.mode.startswith("I"):
                if image.format == "PPM":  # which says its largest value, to which Pillow scales it
                    return (1 << STEPS[-1]) - 1
                low, high = map(int, (np.asarray(image).min(), np.asarray(image).max()))
                return _declared(content, high) if 0 <= low <= high < 1 << STEPS[-1] else _NONE
    except BrokenImageError as error:
        return _FAILED if error.problem.startswith(UNREADABLE) else _NONE
    return _NONE


def _declared(content: bytes | memoryview, largest: int) -> int:
    """Return the largest value that an image may have by the significant bits that its PNG says, if it does.

    Where values need more than these bits, they are stored in the upper ones, as the format wants it.
    """
    header = bytes(content[:_PNG_CHUNKS]).partition(b"IDAT")[0]
    _, said, bits = header.partition(b"sBIT")
    if not header.startswith(b"\x89PNG") or not said or not bits or not 8 <= bits[0] <= STEPS[-1]:
        return largest
    return (1 << (bits[0] if largest < 1 << bits[0] else STEPS[-1])) - 1


def _is_plain_png(file: OriginalFile) -> bool:
    """Whether a file is a PNG of at most 8 bits, of which there may be very many."""
    try:
        start = bytes(file.read(_PNG_HEADER))
    except OSError:
        return False  # told by who reads the file
    return start[:8] == b"\x89PNG\r\n\x1a\n" and start[24:25] != b"\x10"
