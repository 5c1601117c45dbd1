"""Decoding of image files, and of images from Datasets, to uint8 tensors, whole or cropped to a box.

Threads decode ahead of the consumer. Processes would not be faster, as Pillow and the resize release the
interpreter's lock, and threads pass on errors unchanged.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from io import BytesIO
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from qnas.common.errors import BrokenImageError, DataError, one_line
from qnas.data.image_files import ImageNumbers, OriginalFile
from qnas.data.image_formats import readable_formats
from qnas.data.pil_pixels import FULL_BITS, lacks_bits, orientation, pil_pixels

PIXELS_LIMIT = 8192 * 8192  # of an image, which takes up to 1 GB to decode
_LARGE_PIXELS = 25_000_000  # images from here on are decoded one at a time
_ONE_LARGE = Lock()
BATCHES_AHEAD = 2  # batches to decode ahead of the consumer
MOST_THREADS = 8  # of a process, that decode
_BRIGHT = 1 << 6  # a byte that is not reached if the upper two bits are not used
_OUTSIDE = 1e-3  # rounding may put a float outside 0 to 1 by this much
UNREADABLE = "cannot be read"  # start of a problem that may be temporary

T = TypeVar("T")
Task = TypeVar("Task")


class Box(NamedTuple):
    """A box in an image, in pixels from the top left corner."""

    top: int
    left: int
    height: int
    width: int


DrawBox = Callable[[int, int], Box]  # a function of the image's height and width


def central_square(height: int, width: int) -> Box:
    """Return the largest central square of an image."""
    side = min(height, width)
    # rounded as in torchvision's center_crop
    return Box(round((height - side) / 2), round((width - side) / 2), side, side)


@contextmanager
def expecting_whole(where: str) -> Iterator[None]:
    """Convert any exception that Pillow raises for a damaged image to a BrokenImageError."""
    try:
        yield
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:  # its text contains a memory address, different in every process
        raise BrokenImageError(where, "not a whole image: cannot identify its format") from error
    except Image.DecompressionBombError as error:  # from the header, of images twice as large
        raise BrokenImageError(where, f"too many pixels, expected at most {PIXELS_LIMIT:,}") from error
    except Exception as error:
        raise BrokenImageError(where, f"not a whole image: {one_line(error)}") from error


def read_encoded(file: OriginalFile) -> bytes | memoryview:
    """Return the bytes of an image's file. Raises BrokenImageError."""
    try:
        return file.read()
    except FileNotFoundError as error:
        raise BrokenImageError(file.where, "no such file") from error
    except OSError as error:
        raise BrokenImageError(file.where, f"{UNREADABLE}: {error.strerror}") from error


@contextmanager
def opened(content: bytes | memoryview, where: str) -> Iterator[Image.Image]:
    """Open an encoded image, of which only the header is read yet, and of a limited size.

    What Pillow raises in the context, because the image is damaged, becomes a BrokenImageError.
    """
    with expecting_whole(where):
        # Not reset here, since it is a global setting of all threads, and not ours.
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("Pillow's LOAD_TRUNCATED_IMAGES is set, which makes up missing pixels")
        with Image.open(BytesIO(content), formats=readable_formats()) as image:
            if math.prod(image.size) > PIXELS_LIMIT:
                size = " x ".join(map(str, image.size))
                raise BrokenImageError(where, f"{size} pixels, expected at most {PIXELS_LIMIT:,}")
            yield image


def decode(
    file: OriginalFile, resolution_px: int | None, draw: DrawBox | None = None, bits: int = FULL_BITS
) -> Tensor:
    """Decode a file to uint8 (1 or 3, H, W): the whole upright image or the drawn box of it, not yet resized.

    With a resolution, a large JPEG is decoded at a fraction of its size, never below twice the resolution.
    `bits` are the significant bits of the data set's images of more than 8. Raises BrokenImageError if the
    image is not complete, or has more than PIXELS_LIMIT pixels.
    """
    content = read_encoded(file)
    with opened(content, file.where) as image:
        size = None
        if image.format in ("JPEG", "MPO") and resolution_px is not None:
            size = _draft(image, resolution_px, draw or central_square)
        with alone_if_large(image):
            pixels = pil_pixels(image, bits)
    if draw is None:
        return pixels
    size = size or (pixels.shape[-2], pixels.shape[-1])
    return cut_out(pixels, _scale(draw(*size), size, pixels.shape[-2:]))


def _draft(image: Image.Image, resolution_px: int, draw: DrawBox) -> tuple[int, int]:
    """Choose the fraction of its size at which a JPEG is decoded; return its height and width, upright.

    Large photographs decode several times faster so.
    """
    width, height = image.size
    is_turned = orientation(image) in (5, 6, 7, 8)
    size = (width, height) if is_turned else (height, width)
    box = draw(*size)
    need = 2 * resolution_px
    tall, wide = math.ceil(need * size[0] / box.height), math.ceil(need * size[1] / box.width)
    image.draft("", (tall, wide) if is_turned else (wide, tall))
    return size


def alone_if_large(image: Image.Image) -> AbstractContextManager[object]:
    """Return a lock for an image that takes much memory to decode, of which one is decoded at a time."""
    return _ONE_LARGE if math.prod(image.size) > _LARGE_PIXELS else nullcontext()


def _scale(box: Box, whole: tuple[int, int], decoded: tuple[int, ...]) -> Box:
    """Scale a box to an image that was decoded at a fraction of its size, to at least one pixel."""
    (top, bottom), (left, right) = (
        (start * found // size, max((start + length) * found // size, start * found // size + 1))
        for start, length, size, found in zip(box[:2], box[2:], whole, decoded, strict=True)
    )
    return Box(top, left, bottom - top, right - left)


def cut_out(image: Tensor, box: Box) -> Tensor:
    """Crop an image (C, H, W) to a box."""
    return image[..., box.top : box.top + box.height, box.left : box.left + box.width]


def to_pixels(image: Any, where: str, bits: int | None = None) -> Tensor:
    """Convert an image to uint8 (C, H, W).

    The image is a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W), in uint8 or in
    floats from 0 to 1, which are rounded to bytes. `bits` are the significant bits of PIL images of more than
    8. If they are not said, all 16 are, and an image whose values need fewer is refused.

    Raises DataError for anything else.
    """
    if isinstance(image, Image.Image):
        with expecting_whole(where):
            is_deep = image.format != "PPM" and (image.mode.startswith("I") or lacks_bits(image))
            pixels = pil_pixels(image, bits or FULL_BITS)
        if is_deep and bits is None and int(pixels.max()) < _BRIGHT:
            raise DataError(
                f"{where}: 16 bits, of which the upper two are not used: "
                f"`bits` says how many are significant, 8 to {FULL_BITS}"
            )
        return pixels
    pixels = image
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.dtype.kind in "uf":
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = pixels.permute(2, 0, 1) if image.ndim == 3 else pixels
    if not isinstance(pixels, Tensor) or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise DataError(f"{where}: expected a PIL image, a tensor or an array, got {describe_type(image)}")
    pixels = pixels.detach().cpu().as_subclass(Tensor)
    if pixels.dtype.is_floating_point:
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # also true for NaN
            raise DataError(
                f"{where}: floats from {low:g} to {high:g}, expected 0 to 1: leave out the normalisation"
            )
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DataError(f"{where}: expected uint8, or floats from 0 to 1, got {describe_type(image)}")
    return pixels[None] if pixels.ndim == 2 else pixels


def pixel_digest(pixels: Tensor) -> str:
    """Return 64 hexadecimal digits that identify uint8 pixels (C, H, W): SHA-256 of the shape and the bytes.

    >>> pixel_digest(torch.zeros(3, 1, 2, dtype=torch.uint8))[:16]
    '344b8dcd1d3b5468'
    """
    assert pixels.dtype == torch.uint8, pixels.dtype
    digest = sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.contiguous().numpy().data)
    return digest.hexdigest()


def describe_type(value: Any) -> str:
    """Return the type of a value, with its dtype and shape if it has them."""
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{kind} of {value.dtype} {tuple(value.shape)}"
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def in_threads(work: Callable[[Task], T], chunks: Iterable[Iterable[Task]]) -> Iterator[list[T]]:
    """Run tasks in threads ahead of the consumer. Yield each chunk's results, or raise its first error."""
    waiting: deque[list[Future[T]]] = deque()
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        for chunk in chunks:
            waiting.append([pool.submit(work, task) for task in chunk])
            if len(waiting) > BATCHES_AHEAD:
                yield [image.result() for image in waiting.popleft()]
        while waiting:
            yield [image.result() for image in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def chunked(count: int, size: int = 64) -> Iterator[range]:
    """Yield the numbers below `count` as ranges of at most `size`."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def spread(count: int, wanted: int) -> ImageNumbers:
    """Return `wanted` evenly spaced numbers below `count`, or all if there are fewer."""
    kept = min(count, wanted)
    return np.arange(kept, dtype=np.int64) * count // kept
