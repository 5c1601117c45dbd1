"""Encoded images as bytes of one size: the central square, or a box that is drawn anew each time.

Decoded in threads ahead of need, not in processes: Pillow and the resize release the interpreter's lock,
and an error arrives as it was raised.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from qnas.common.errors import BrokenImageError, DataError
from qnas.data.image_files import Indices, OriginalFile, one_line

BATCHES_AHEAD = 2  # decoded ahead of the consumer
UNREADABLE = "cannot be read"  # begins what is said of a file that may be readable another time

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


class LazyImages(Dataset[Tensor]):
    """Images that are decoded and brought to the resolution each time they are asked for.

    `originals` are uint8 (N, C, H, W) or encoded files; `order` picks from them.
    """

    def __init__(
        self,
        originals: Tensor | Sequence[OriginalFile],
        order: Indices,
        *,
        resolution_px: int,
        channels: int,
        pads: bool,
    ) -> None:
        self.originals = originals
        self.order = order
        self.resolution_px = resolution_px
        self.channels = channels
        self.pads = pads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the decoded images."""
        return len(self.order), self.channels, self.resolution_px, self.resolution_px

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        """Return one image (C, H, W) as uint8. Raises BrokenImageError for a damaged file."""
        original, where = self._original(index)
        image = decode(original, self.resolution_px) if isinstance(original, OriginalFile) else original
        return self.fit(image, where)

    def cut(self, index: int, draw: DrawBox) -> Tensor:
        """Return the drawn box of one image, resized: (C, H, W), uint8. Raises BrokenImageError."""
        original, where = self._original(index)
        px = self.resolution_px
        if isinstance(original, OriginalFile):
            image = decode(original, px, draw)
        else:
            image = _cut_out(original, draw(*original.shape[-2:]))
        return tv.resize(_to_channels(image, self.channels, where), [px, px], antialias=True)  # type: ignore[no-any-return]  # torchvision's

    def _original(self, index: int) -> tuple[Tensor | OriginalFile, str]:
        original = self.originals[int(self.order[index])]
        return original, original.where if isinstance(original, OriginalFile) else "images"

    def take(self, places: slice | Indices) -> "LazyImages":
        """Return some of these images, without decoding them."""
        return LazyImages(
            self.originals,
            self.order[places],
            resolution_px=self.resolution_px,
            channels=self.channels,
            pads=self.pads,
        )

    def fit(self, images: Tensor, where: str) -> Tensor:
        """Bring images to channels and resolution: (..., C', H', W') -> (..., C, H, W)."""
        images = _to_channels(images, self.channels, where)
        return _to_resolution(images, self.resolution_px, pads=self.pads)


def _to_channels(images: Tensor, channels: int, where: str) -> Tensor:
    """Repeat grey, or weigh colours to grey: (..., C', H, W) -> (..., C, H, W)."""
    found = images.shape[-3]
    if found == channels:
        return images
    if found == 1:
        return images.expand(*images.shape[:-3], channels, *images.shape[-2:])
    if channels == 1:
        grey: Tensor = tv.rgb_to_grayscale(images)
        return grey
    raise DataError(f"{where}: {found} channels cannot become {channels}: expected 1 or {found}")


def _to_resolution(images: Tensor, px: int, *, pads: bool) -> Tensor:
    """Cut out the central square and resize it: (..., H', W') -> (..., px, px).

    Cutting first is the usual resize of the shorter side and central crop, with memory that does not
    grow with the longer side. Where `pads`, slightly smaller images get a black border instead: they
    keep their pixels, and their background is black. Photographs have none, so they are resized.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    if height != width:
        images = tv.center_crop(images, [side, side])
    if pads and side < px < 1.5 * side:
        images = tv.center_crop(images, [px, px])
    elif side != px:
        images = tv.resize(images, [px, px], antialias=True)
    return images


def decode(file: OriginalFile, resolution_px: int, draw: DrawBox | None = None) -> Tensor:
    """Decode a file to uint8 (1 or 3, H, W): the whole image, or the drawn box of it, not resized yet.

    A large JPEG is decoded at a fraction of its size, never below twice the resolution. Raises
    BrokenImageError for all but a whole image.
    """
    try:
        content = file.read()
    except FileNotFoundError as error:
        raise BrokenImageError(file.where, "no such file") from error
    except OSError as error:
        raise BrokenImageError(file.where, f"{UNREADABLE}: {error.strerror}") from error
    try:
        # Not reset here: it is one setting for all threads, and someone else's.
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("Pillow's LOAD_TRUNCATED_IMAGES is set, which makes up missing pixels")
        with Image.open(BytesIO(content)) as image:
            width, height = image.size
            box = (draw or central_square)(height, width)
            # large photographs decode several times faster at a fraction
            need = 2 * resolution_px
            image.draft("", (math.ceil(need * width / box.width), math.ceil(need * height / box.height)))
            pixels = _pixels(image)
    except UnidentifiedImageError as error:  # its text has an address in memory, other in each process
        raise BrokenImageError(file.where, "not a whole image: cannot identify its format") from error
    except Exception as error:  # Pillow raises almost anything on a damaged file
        raise BrokenImageError(file.where, f"not a whole image: {one_line(error)}") from error
    return pixels if draw is None else _cut_out(pixels, _scale(box, (height, width), pixels.shape[-2:]))


def _scale(box: Box, whole: tuple[int, int], decoded: tuple[int, ...]) -> Box:
    """Return a box of an image where that was decoded at a fraction; of one pixel at least."""
    (top, bottom), (left, right) = (
        (start * found // size, max((start + length) * found // size, start * found // size + 1))
        for start, length, size, found in zip(box[:2], box[2:], whole, decoded, strict=True)
    )
    return Box(top, left, bottom - top, right - left)


def _cut_out(image: Tensor, box: Box) -> Tensor:
    return image[..., box.top : box.top + box.height, box.left : box.left + box.width]


def _pixels(image: Image.Image) -> Tensor:
    """Return grey or colour of 8 bits: (1 or 3, H, W)."""
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


def in_threads(work: Callable[[Task], T], chunks: Iterable[Iterable[Task]]) -> Iterator[list[T]]:
    """Yield what `work` makes of the tasks of each chunk, in order, in threads ahead of the consumer.

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
