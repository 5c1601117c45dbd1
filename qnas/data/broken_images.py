"""Broken images, which cannot be decoded completely for any reason.

They are left out, up to a share of all images, and listed in the run. A data set that fits into memory is
decoded at the start anyway. Of a larger one, every image is decoded once before the first step, at the
smallest size that its format allows. The result is cached by the names, sizes and times of the files. The
broken images are thus known before splits and batches are made or a run is resumed, and a long run does not
fail because of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from qnas.common.errors import BrokenImageError, DataError
from qnas.common.files import csv_text
from qnas.common.resources import user_cache
from qnas.common.text import escaped, shown
from qnas.data.decoding import UNREADABLE, chunked, in_threads
from qnas.data.file_cache import keep, one_at_a_time, recall
from qnas.data.image_files import OriginalFile, stamp_of
from qnas.data.lazy_images import Original, read_pixels
from qnas.data.pil_pixels import FULL_BITS

MAX_BROKEN = 0.01  # largest share of broken images with which a run continues
SCHEMA = "qnas.broken/3"

T = TypeVar("T")


@dataclass(frozen=True)
class BrokenImage:
    """An image that is left out."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


BrokenImages = Mapping[int, BrokenImage]  # by image number in the data set
_KEPT: TypeAdapter[BrokenImages] = TypeAdapter(dict[int, BrokenImage])


def or_broken(read: Callable[[int], T]) -> Callable[[int], T | BrokenImage]:
    """Wrap `read` so that it returns a BrokenImage for an image that cannot be decoded."""

    def read_or_broken(place: int) -> T | BrokenImage:
        try:
            return read(place)
        except BrokenImageError as error:
            return BrokenImage(error.where, error.problem)

    return read_or_broken


def read_each(
    read: Callable[[int], T],
    keep: Callable[[int, T], object],
    numbers: Sequence[int],
    most: float,
    where: str,
    *,
    quiet: bool,
) -> BrokenImages:
    """Read images ahead in threads, call `keep(index, result)` for each, and return the broken images.

    `read` and `keep` get an index into `numbers`, which holds the images' numbers in their data set. Raises
    DataError as soon as more than a share `most` of the images is broken.
    """
    count, broken = len(numbers), dict[int, BrokenImage]()
    with tqdm(total=count, desc="images", unit="", leave=False, disable=quiet or None) as bar:
        # in chunks, to stop early if too many files are damaged
        for chunk, found in zip(chunked(count), in_threads(or_broken(read), chunked(count)), strict=True):
            for place, each in zip(chunk, found, strict=True):
                if isinstance(each, BrokenImage):
                    broken[int(numbers[place])] = each
                else:
                    keep(place, each)
            check_broken(broken, count, most, where)
            bar.update(len(chunk))
    return broken


def check_broken(broken: BrokenImages, images: int, most: float, where: str) -> None:
    """Raise DataError if more than a share `most` of the images is broken."""
    if len(broken) > most * images:
        first = broken[min(broken)]
        raise DataError(
            f"{where}: {len(broken)} of {images} images are broken, more than `max_broken={most:g}` allows: "
            f"{'the first: ' if len(broken) > 1 else ''}{escaped(first.file)}: {shown(first.problem, 200)}"
        )


def find_broken(
    images: Tensor | Sequence[Original],
    most: float,
    where: str,
    *,
    bits: int = FULL_BITS,
    quiet: bool = False,
) -> BrokenImages:
    """Decode every image, and return the broken ones by number.

    For files, the result is cached until one of them changes. The items of a user's Dataset are read every
    time, as changes cannot be detected. Raises DataError as soon as more than a share `most` is broken.
    """
    if isinstance(images[0], Tensor):
        return {}

    def decode_each() -> BrokenImages:
        numbers = range(len(images))
        return read_each(
            lambda n: read_pixels(images[n], 1, bits=bits), lambda *_: None, numbers, most, where, quiet=quiet
        )

    if not all(isinstance(image, OriginalFile) for image in images):
        return decode_each()
    stamp = stamp_of(image for image in images if isinstance(image, OriginalFile))
    path = user_cache("broken") / f"{stamp[:32]}.json"
    with one_at_a_time(path):
        broken = recall(path, SCHEMA, stamp, _KEPT)
        if broken is None:
            broken = decode_each()
            # do not cache a failure of a disk or a network, which may be temporary
            if not any(each.problem.startswith(UNREADABLE) for each in broken.values()):
                keep(path, SCHEMA, stamp, {str(i): asdict(each) for i, each in broken.items()})
    check_broken(broken, len(images), most, where)
    return broken


def broken_copies(name: str, broken: Sequence[BrokenImage]) -> dict[str, str]:
    """Return {name: CSV of the broken images}, or an empty dict if there are none."""
    rows = ({"file": escaped(each.file), "problem": escaped(each.problem)} for each in broken)
    return {name: csv_text(("file", "problem"), rows)} if broken else {}
