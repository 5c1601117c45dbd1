"""Decoding of files, and of what a Dataset gives as images, to uint8 tensors, whole or cut to a box.

Threads decode ahead of the consumer. Processes would not be faster, as Pillow and the resize release the
interpreter's lock, and from a thread an error arrives as it was raised.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from qnas.common.errors import BrokenImageError, DataError
from qnas.data.image_files import ImageNumbers, OriginalFile, one_line

BATCHES_AHEAD = 2  # decoded ahead of the consumer
_OUTSIDE = 1e-3  # by which rounding may put a float outside 0 to 1
UNREADABLE = "cannot be read"  # how the problem of a file begins that may be readable another time

T = TypeVar("T")
Task = TypeVar("Task")


class Box(NamedTuple):
    """A part of an image, in pixels from its top left."""

    top: int
    left: int
    height: int
    width: int


DrawBox = Callable[[int, int], Box]  # of an image's height and width


def central_square(height: int, width: int) -> Box:
    """Return the largest square in the middle of an image."""
    side = min(height, width)
    # as torchvision rounds it in center_crop
    return Box(round((height - side) / 2), round((width - side) / 2), side, side)


@contextmanager
def expecting_whole(where: str) -> Iterator[None]:
    """Raise BrokenImageError for whatever Pillow raises on a damaged image, which may be almost anything."""
    try:
        yield
    except UnidentifiedImageError as error:  # its text has an address in memory, other in each process
        raise BrokenImageError(where, "not a whole image: cannot identify its format") from error
    except Exception as error:
        raise BrokenImageError(where, f"not a whole image: {one_line(error)}") from error


def decode(file: OriginalFile, resolution_px: int | None, draw: DrawBox | None = None) -> Tensor:
    """Decode a file to uint8 (1 or 3, H, W): the whole image, or the drawn box of it, not resized yet.

    With a resolution, a large JPEG is decoded at a fraction of its size, never below twice the resolution.
    Raises BrokenImageError unless the image is whole.
    """
    try:
        content = file.read()
    except FileNotFoundError as error:
        raise BrokenImageError(file.where, "no such file") from error
    except OSError as error:
        raise BrokenImageError(file.where, f"{UNREADABLE}: {error.strerror}") from error
    with expecting_whole(file.where):
        # Not reset here: it is one setting for all threads, and someone else's.
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("Pillow's LOAD_TRUNCATED_IMAGES is set, which makes up missing pixels")
        with Image.open(BytesIO(content)) as image:
            width, height = image.size
            box = (draw or central_square)(height, width)
            if resolution_px is not None:  # large photographs decode several times faster at a fraction
                need = 2 * resolution_px
                image.draft("", (math.ceil(need * width / box.width), math.ceil(need * height / box.height)))
            pixels = pil_pixels(image)
    return pixels if draw is None else cut_out(pixels, _scale(box, (height, width), pixels.shape[-2:]))


def _scale(box: Box, whole: tuple[int, int], decoded: tuple[int, ...]) -> Box:
    """Return a box of an image where that was decoded at a fraction; of one pixel at least."""
    (top, bottom), (left, right) = (
        (start * found // size, max((start + length) * found // size, start * found // size + 1))
        for start, length, size, found in zip(box[:2], box[2:], whole, decoded, strict=True)
    )
    return Box(top, left, bottom - top, right - left)


def cut_out(image: Tensor, box: Box) -> Tensor:
    """Return a part of an image (C, H, W)."""
    return image[..., box.top : box.top + box.height, box.left : box.left + box.width]


def pil_pixels(image: Image.Image) -> Tensor:
    """Return a PIL image as uint8 (1 or 3, H, W). Raises ValueError for more than 16 bits a pixel."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would cut off at 255
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a pixel")
        return torch.from_numpy((values >> 8).astype(np.uint8))[None]
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    pixels: Tensor = tv.pil_to_tensor(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return pixels


def to_pixels(image: Any, where: str) -> Tensor:
    """Convert an image to uint8 (C, H, W).

    It is a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W), of uint8 or of floats
    from 0 to 1, which are rounded to bytes. Raises DataError for anything else.
    """
    if isinstance(image, Image.Image):
        with expecting_whole(where):
            return pil_pixels(image)
    pixels = image
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.dtype.kind in "uf":
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = pixels.permute(2, 0, 1) if image.ndim == 3 else pixels
    if not isinstance(pixels, Tensor) or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise DataError(f"{where}: expected a PIL image, a tensor or an array, got {describe_type(image)}")
    pixels = pixels.detach().cpu().as_subclass(Tensor)
    if pixels.dtype.is_floating_point:
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # nor where they are NaN
            raise DataError(
                f"{where}: floats from {low:g} to {high:g}, expected 0 to 1: leave out the normalisation"
            )
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DataError(f"{where}: expected uint8, or floats from 0 to 1, got {describe_type(image)}")
    return pixels[None] if pixels.ndim == 2 else pixels


def describe_type(value: Any) -> str:
    """Return the type of a value, with its dtype and shape where it has them."""
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{kind} of {value.dtype} {tuple(value.shape)}"
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def in_threads(work: Callable[[Task], T], chunks: Iterable[Iterable[Task]]) -> Iterator[list[T]]:
    """Yield the results of `work` for the tasks of each chunk, in order, from threads ahead of the consumer.

    The first error in that order is raised.
    """
    waiting: deque[list[Future[T]]] = deque()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
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
    """Yield 0 to `count` in pieces."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def spread(count: int, wanted: int) -> ImageNumbers:
    """Return `wanted` numbers below `count`, evenly spaced, or all of them."""
    kept = min(count, wanted)
    return np.arange(kept, dtype=np.int64) * count // kept
