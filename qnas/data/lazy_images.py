"""Images that are read on demand: items of Datasets, and images fitted to one resolution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import index as whole_number
from threading import Lock
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from qnas.common.errors import BrokenImageError, DataError, one_line
from qnas.data.decoding import DrawBox, cut_out, decode, describe_type, to_pixels
from qnas.data.image_files import ImageNumbers, OriginalFile
from qnas.data.pil_pixels import FULL_BITS

Loader = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class DatasetReader:
    """A Dataset whose items are (image, label), and its name in messages.

    `loader` converts the first part of an item to an image if it is not one, but a path, bytes or an array of
    another form. Items are read by one thread at a time, as few Datasets are thread-safe. `loader` runs in
    several threads. `bits` are the significant bits of PIL images of more than 8, None if they are not said.
    """

    dataset: Any
    name: str
    loader: Loader | None = None
    bits: int | None = None
    lock: Any = field(default_factory=Lock)

    def where(self, index: int) -> str:
        """Return the name of an item in messages."""
        return f"{self.name}[{index}]"

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return an item as uint8 (C, H, W) and its label.

        Raises BrokenImageError if the Dataset or the loader raises, DataError for an item of another form.
        """
        where = self.where(index)
        try:
            with self.lock:
                item = self.dataset[index]
        except Exception as error:  # a user's code may raise any exception
            raise BrokenImageError(where, f"{type(error).__name__}: {one_line(error)}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{where}: expected (image, label), got {describe_type(item)}")
        image, label = item
        try:
            number = whole_number(label)
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"{where}: expected the number of a class as label, got {describe_type(label)}"
            raise DataError(message) from error
        if self.loader is not None:
            try:
                image = self.loader(image)
            except Exception as error:
                raise BrokenImageError(where, f"{type(error).__name__}: {one_line(error)}") from error
        return to_pixels(image, where, self.bits), number


@dataclass(frozen=True)
class DatasetItem:
    """An image of a Dataset that is read whenever it is needed."""

    reader: DatasetReader
    index: int
    label: int | None  # None: not known, since the item could not be read

    @property
    def where(self) -> str:
        """The name of the item in messages."""
        return self.reader.where(self.index)

    def read(self) -> Tensor:
        """Return the image as uint8 (C, H, W). Raises BrokenImageError, or DataError if the label changed."""
        pixels, label = self.reader.read(self.index)
        if self.label not in (None, label):
            raise DataError(f"{self.where}: label {label}, but it was {self.label} before")
        return pixels


Original = Tensor | OriginalFile | DatasetItem  # an image before it is fitted to a resolution


@dataclass(frozen=True, eq=False)
class LazyImages(Dataset[Tensor]):
    """Original images as uint8 images at one resolution, decoded each time they are read.

    `originals` are uint8 (N, C, H, W), or a sequence of images; `order` selects images by their numbers.
    `bits` are the significant bits of images of more than 8.
    """

    originals: Tensor | Sequence[Original]
    order: ImageNumbers
    resolution_px: int
    channels: int
    pads: bool
    bits: int = FULL_BITS

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the decoded images."""
        return len(self.order), self.channels, self.resolution_px, self.resolution_px

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        """Return one image (C, H, W) as uint8. Raises BrokenImageError for a damaged file."""
        original = self.originals[int(self.order[index])]
        return self.fit(read_pixels(original, self.resolution_px, bits=self.bits), _where(original))

    def cut(self, index: int, draw: DrawBox) -> Tensor:
        """Return the drawn box of one image, resized, as uint8 (C, H, W). Raises BrokenImageError."""
        original = self.originals[int(self.order[index])]
        px = self.resolution_px
        image = _to_channels(read_pixels(original, px, draw, self.bits), self.channels, _where(original))
        return tv.resize(image, [px, px], antialias=True)  # type: ignore[no-any-return]  # torchvision's

    def take(self, places: slice | ImageNumbers) -> "LazyImages":
        """Select some of these images without decoding them."""
        return replace(self, order=self.order[places])

    def fit(self, images: Tensor, where: str) -> Tensor:
        """Convert images to the channels and the resolution: (..., C', H', W') -> (..., C, H, W)."""
        return _to_resolution(_to_channels(images, self.channels, where), self.resolution_px, pads=self.pads)


def _to_channels(images: Tensor, channels: int, where: str) -> Tensor:
    """Repeat grey channels, or convert colours to grey: (..., C', H, W) -> (..., C, H, W)."""
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

    This equals the usual resize of the shorter side and central crop, but its memory does not grow with the
    longer side. With `pads`, slightly smaller images get a black border instead, which keeps their pixels and
    suits their black background. Photographs have no such background, so they are resized.
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


def read_pixels(
    original: Original,
    resolution_px: int | None = None,
    draw: DrawBox | None = None,
    bits: int = FULL_BITS,
) -> Tensor:
    """Return an image or the drawn box of it as uint8 (C, H, W), not yet resized.

    With a resolution, a large JPEG may be decoded at a fraction of its size. `bits` are the significant bits
    of a file of more than 8. Raises BrokenImageError.
    """
    if isinstance(original, OriginalFile):
        return decode(original, resolution_px, draw, bits)
    image = original if isinstance(original, Tensor) else original.read()
    return image if draw is None else cut_out(image, draw(*image.shape[-2:]))


def _where(original: Original) -> str:
    return "images" if isinstance(original, Tensor) else original.where
