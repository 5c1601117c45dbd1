"""Items of a user's map-style Dataset, read and converted to uint8 images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import index as whole_number
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qnas.common.errors import BrokenImageError, DataError
from qnas.data.decoding import expecting_whole, pil_pixels
from qnas.data.image_files import one_line

Loader = Callable[[Any], Any]
_OUTSIDE = 1e-3  # by which rounding may put a float outside 0 to 1


@dataclass(frozen=True, eq=False)
class DatasetReader:
    """A Dataset whose items are (image, label), and the name that messages give it.

    `loader` makes an image of the first part of an item, where that is not one: a path, bytes, an array of
    another form. Items are read from one thread at a time, as few Datasets are made for several; `loader`
    runs in several threads.
    """

    dataset: Any
    name: str
    loader: Loader | None = None
    lock: Any = field(default_factory=Lock)

    def where(self, index: int) -> str:
        """Return the name of an item in messages."""
        return f"{self.name}[{index}]"

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return an item as uint8 (C, H, W) and its label.

        Raises BrokenImageError where the Dataset or the loader raises, DataError for an item of another form.
        """
        where = self.where(index)
        try:
            with self.lock:
                item = self.dataset[index]
        except Exception as error:  # a user's code may raise anything
            raise BrokenImageError(where, f"{type(error).__name__}: {one_line(error)}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{where}: expected (image, label), got {_describe(item)}")
        image, label = item
        try:
            number = whole_number(label)
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"{where}: expected the number of a class as label, got {_describe(label)}"
            raise DataError(message) from error
        if self.loader is not None:
            try:
                image = self.loader(image)
            except Exception as error:
                raise BrokenImageError(where, f"{type(error).__name__}: {one_line(error)}") from error
        return to_pixels(image, where), number


@dataclass(frozen=True)
class DatasetItem:
    """An image of a Dataset, read each time that it is needed."""

    reader: DatasetReader
    index: int
    label: int | None  # None: not known yet, since the item could not be read

    @property
    def where(self) -> str:
        """The name of the item in messages."""
        return self.reader.where(self.index)

    def read(self) -> Tensor:
        """Return the image as uint8 (C, H, W). Raises BrokenImageError, and DataError for another label."""
        pixels, label = self.reader.read(self.index)
        if self.label not in (None, label):
            raise DataError(f"{self.where}: label {label}, but it was {self.label} before")
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
        raise DataError(f"{where}: expected a PIL image, a tensor or an array, got {_describe(image)}")
    pixels = pixels.detach().cpu().as_subclass(Tensor)
    if pixels.dtype.is_floating_point:
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # nor where they are NaN
            raise DataError(
                f"{where}: floats from {low:g} to {high:g}, expected 0 to 1: leave out the normalisation"
            )
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DataError(f"{where}: expected uint8, or floats from 0 to 1, got {_describe(image)}")
    return pixels[None] if pixels.ndim == 2 else pixels


def _describe(value: Any) -> str:
    """Return the type of a value, with its dtype and shape where it has them."""
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{kind} of {value.dtype} {tuple(value.shape)}"
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
