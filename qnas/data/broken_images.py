"""Broken images: those that do not decode to the end, for whatever reason.

They are left out, up to a share of all, and listed in the run. What fits into memory is decoded at the
start anyway. Of a larger set every image is decoded once before the first step, at the smallest size that
its format has, and the result is kept in the user's cache: splits, batches and a resumed run know from the
start which images are left out, and a long run does not fail on one. The cache goes by the names, sizes and
times of the files.
"""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from qnas.common.errors import BrokenImageError, DataError
from qnas.common.resources import user_cache
from qnas.data.decoding import UNREADABLE, chunked, in_threads
from qnas.data.file_cache import keep, one_at_a_time, recall
from qnas.data.image_files import OriginalFile
from qnas.data.lazy_images import LazyImages, Original, read_pixels

MAX_BROKEN = 0.01  # largest share of broken images with which a run goes on
SCHEMA = "qnas.broken/2"
_SHOWN = 3  # in a message


@dataclass(frozen=True)
class BrokenImage:
    """An image that is left out."""

    file: str
    problem: str


BrokenImages = Mapping[int, BrokenImage]  # by their numbers in the data set


def read_or_broken(images: LazyImages, place: int) -> Tensor | BrokenImage:
    """Return one image (C, H, W) as uint8, or why it cannot be decoded."""
    try:
        return images[place]
    except BrokenImageError as error:
        return BrokenImage(error.where, error.problem)


def check_broken(broken: BrokenImages, images: int, most: float, where: str) -> None:
    """Raise DataError where more than a share `most` of the images is broken."""
    if len(broken) > most * images:
        first = [f"{each.file}: {each.problem}" for _, each in sorted(broken.items())][:_SHOWN]
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise DataError(
            f"{where}: {len(broken)} of {images} images are broken, more than max_broken {most:g} allows: "
            f"{'; '.join(first)}{more}"
        )


def find_broken(
    images: Tensor | Sequence[Original], most: float, where: str, *, quiet: bool = False
) -> BrokenImages:
    """Decode every image, and return the broken ones by number.

    Of files, the result is kept in the cache until one changes. The items of a user's Dataset are read each
    time, as nothing says whether they changed. Raises DataError once more than a share `most` is broken.
    """
    if isinstance(images[0], Tensor):
        return {}
    stamp = hashlib.sha256()
    for image in images:
        if not isinstance(image, OriginalFile):
            return _decode_each(images, most, where, quiet=quiet)
        stamp.update(f"{image.where}\0{image.stamp()}\0".encode(errors="surrogateescape"))
    path = user_cache("broken") / f"{stamp.hexdigest()[:32]}.json"
    with one_at_a_time(path):
        broken = _recall(path, stamp.hexdigest())
        if broken is None:
            broken = _decode_each(images, most, where, quiet=quiet)
            # a disk or a network that fails now may not tomorrow
            if not any(each.problem.startswith(UNREADABLE) for each in broken.values()):
                keep(path, SCHEMA, stamp.hexdigest(), {str(i): asdict(each) for i, each in broken.items()})
    check_broken(broken, len(images), most, where)
    return broken


def broken_copies(name: str, broken: Sequence[BrokenImage]) -> dict[str, str]:
    """Return {name: CSV of the broken images}, or an empty dict where there are none."""
    if not broken:
        return {}
    text = io.StringIO()
    writer = csv.DictWriter(text, ("file", "problem"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in broken)
    return {name: text.getvalue()}


def _decode_each(
    images: Tensor | Sequence[Original], most: float, where: str, *, quiet: bool
) -> BrokenImages:
    def problem(number: int) -> BrokenImage | None:
        try:
            read_pixels(images[number], 1)
        except BrokenImageError as error:
            return BrokenImage(error.where, error.problem)
        return None

    broken: dict[int, BrokenImage] = {}
    with tqdm(total=len(images), desc="images", unit="", leave=False, disable=quiet or None) as bar:
        for chunk, found in zip(chunked(len(images)), in_threads(problem, chunked(len(images))), strict=True):
            for place, each in zip(chunk, found, strict=True):
                if each is not None:
                    broken[place] = each
            check_broken(broken, len(images), most, where)
            bar.update(len(chunk))
    return broken


def _recall(path: Path, stamp: str) -> BrokenImages | None:
    try:
        kept = recall(path, SCHEMA, stamp)
        return None if kept is None else {int(number): BrokenImage(**each) for number, each in kept.items()}
    except (AttributeError, TypeError, ValueError):  # damaged
        return None
