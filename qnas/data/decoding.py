"""Decoding of image files, and of images from Datasets, to uint8 tensors, whole or cropped to a box.

Threads decode ahead of the consumer. Processes would not be faster, as Pillow and the resize release the
interpreter's lock, and threads pass on errors unchanged.
"""

import hashlib
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

from qnas.common.errors import BrokenImageError, DataError, one_line
from qnas.data.image_files import ImageNumbers, OriginalFile

BATCHES_AHEAD = 2  # batches to decode ahead of the consumer
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
    except UnidentifiedImageError as error:  # its text contains a memory address, different in every process
        raise BrokenImageError(where, "not a whole image: cannot identify its format") from error
    except Exception as error:
        raise BrokenImageError(where, f"not a whole image: {one_line(error)}") from error


def decode(file: OriginalFile, resolution_px: int | None, draw: DrawBox | None = None) -> Tensor:
    """Decode a file to uint8 (1 or 3, H, W): the whole image or the drawn box, not yet resized.

    With a resolution, a large JPEG is decoded at a fraction of its size, never below twice the resolution.
    Raises BrokenImageError if the image is not complete.
    """
    try:
        content = file.read()
    except FileNotFoundError as error:
        raise BrokenImageError(file.where, "no such file") from error
    except OSError as error:
        raise BrokenImageError(file.where, f"{UNREADABLE}: {error.strerror}") from error
    with expecting_whole(file.where):
        # Not reset here, since it is a global setting of all threads, and not ours.
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("Pillow's LOAD_TRUNCATED_IMAGES is set, which makes up missing pixels")
        with Image.open(BytesIO(content)) as image:
            width, height = image.size
            box = (draw or central_square)(height, width)
            if resolution_px is not None:  # large photographs decode several times faster at a smaller size
                need = 2 * resolution_px
                image.draft("", (math.ceil(need * width / box.width), math.ceil(need * height / box.height)))
            pixels = pil_pixels(image)
    return pixels if draw is None else cut_out(pixels, _scale(box, (height, width), pixels.shape[-2:]))


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


def pil_pixels(image: Image.Image) -> Tensor:
    """Convert a PIL image to uint8 (1 or 3, H, W). Raises ValueError for more than 16 bits per pixel."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip at 255
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

    The image is a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W), in uint8 or in
    floats from 0 to 1, which are rounded to bytes. Raises DataError for anything else.
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
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # also true for NaN
            raise DataError(
                f"{where}: floats from {low:g} to {high:g}, expected 0 to 1: leave out the normalisation"
            )
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DataError(f"{where}: expected uint8, or floats from 0 to 1, got {describe_type(image)}")
    return pixels[None] if pixels.ndim == 2 else pixels


def pixel_digest(pixels: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of an image's shape and its uint8 pixels in the order C, H, W."""
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
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
    """Yield the numbers below `count` as ranges of at most `size`."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def spread(count: int, wanted: int) -> ImageNumbers:
    """Return `wanted` evenly spaced numbers below `count`, or all if there are fewer."""
    kept = min(count, wanted)
    return np.arange(kept, dtype=np.int64) * count // kept
