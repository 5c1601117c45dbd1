"""A labelled data set before it is fitted to a resolution, as a map-style Dataset, and its digest.

Every shipped kind of data and every user's Dataset is converted to a `LabelledImages`, from which
`qnas.data.loading` reads.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from qnas.common.errors import DataError
from qnas.common.text import shown
from qnas.data.broken_images import BrokenImages
from qnas.data.image_files import ImageNumbers, Labels, OriginalFile
from qnas.data.lazy_images import Original, read_pixels
from qnas.data.left_out import LeftOut
from qnas.data.pil_pixels import FULL_BITS

HASHED_BYTES = 1_000_000_000  # larger folders are identified only by the names and sizes of their files
CLASS_CHARACTERS = 500  # limit for the name of a class
_MISSING = -1  # size of a file that does not exist


@dataclass(frozen=True, eq=False)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Original images and their labels; item `i` is (uint8 image (C, H, W), label).

    `splits` holds the image numbers of the data set's own splits (`train`, `heldout`, `test`); images in no
    split are not used. `broken` are the images that are known to be broken before decoding. `source` is the
    data set's name in messages. `left_out` are the files that are no images of the data set, and
    `split_names` what its own splits are called there, such as {"test": "val"}.
    """

    classes: tuple[str, ...]
    images: Tensor | Sequence[Original]  # uint8 (N, C, H, W), or a sequence of images
    targets: Labels
    splits: Mapping[str, ImageNumbers]
    name: str = ""
    source: str = ""
    flip: bool = True  # whether a mirrored image still shows its class
    pads: bool = False  # whether slightly smaller images get a black border
    broken: BrokenImages = field(default_factory=dict)
    bits: int | None = None  # significant bits of images of more than 8; None: there are no such files
    fingerprint: str | None = None  # identifies the images if their bytes are not hashed
    changing: str = ""  # an image that differed when it was read again
    left_out: tuple[LeftOut, ...] = ()
    split_names: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """Return an image at its full size and its label. Raises BrokenImageError."""
        image = self.images[range(len(self))[number]]
        return read_pixels(image, bits=self.bits or FULL_BITS), int(self.targets[number])


def name_splits(words: Collection[str]) -> dict[str, str] | None:
    """Map the split names of a data set (`train`, `val`, `test`) to splits.

    `val` is the held-out split if there is also `test`, and the test split otherwise. Returns None if there
    would be no training or no test images.

    >>> name_splits(["train", "val"])
    {'train': 'train', 'val': 'test'}
    """
    if {"train", "val", "test"} <= set(words):
        return {"train": "train", "val": "heldout", "test": "test"}
    tests = [test for test in ("test", "val") if {"train", test} <= set(words)]
    return {"train": "train", tests[0]: "test"} if tests else None


def number_classes(labels: Sequence[str]) -> tuple[tuple[str, ...], Labels]:
    """Return the sorted classes, and the class number of each label.

    Labels that are all whole numbers are sorted by value, others as text.

    >>> number_classes(["10", "9", "10"])[0]
    ('9', '10')
    """
    found = sorted(set(labels))  # first as text, as 1 and 01 have the same value
    are_numbers = all(name.isdecimal() and len(name) <= CLASS_CHARACTERS for name in found)
    order = sorted(found, key=int) if are_numbers else found
    numbers = {name: number for number, name in enumerate(order)}
    return tuple(order), np.array([numbers[label] for label in labels], dtype=np.int64)


def assemble(
    images: Sequence[OriginalFile],
    classes: tuple[str, ...],
    labels: Labels,
    words: Sequence[str],
    where: Path,
) -> LabelledImages:
    """Return a data set of images with their labels and, unless `words` is empty, the names of their splits.

    Raises DataError for fewer than two classes, the name of a class that cannot be kept, a class without
    training images, or a missing split.
    """
    if len(classes) < 2:
        raise DataError(f"{where}: {len(classes)} classes, expected at least 2")
    check_class_names(classes, where)
    called: dict[str, str] = {}
    splits: dict[str, ImageNumbers] = {"train": np.arange(len(labels))}
    if words:
        found = set(words)
        names = {"train": "train"} if found == {"train"} else name_splits(found)
        if names is None:
            raise DataError(f"{where}: splits {' and '.join(sorted(found))}, expected train and val or test")
        each = np.array(words)
        splits = {split: np.flatnonzero(each == word) for word, split in names.items()}
        called = {split: word for word, split in names.items()}
    check_training(classes, labels[splits["train"]], where)
    return LabelledImages(classes, images, labels, splits, split_names=called)


def check_training(classes: Sequence[str], labels: Labels, where: Path | str) -> None:
    """Raise DataError for a class without training images; `labels` are those of the training images."""
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        name = shown(classes[int(counts.argmin())])
        raise DataError(f"{where}: no training image of class '{name}'")


def check_class_names(classes: Sequence[str], where: Path | str) -> None:
    """Raise DataError for the name of a class that is not text, or too long to be kept in every file."""
    for name in classes:
        if len(name) > CLASS_CHARACTERS:
            raise DataError(
                f"{where}: a class of {len(name)} characters, expected at most {CLASS_CHARACTERS}: "
                f"{shown(name)}"
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the class {shown(name)} is not named in UTF-8: rename it") from error


def digest_of(source: LabelledImages, broken: Iterable[int]) -> str:
    """Return 16 hexadecimal digits that identify a data set without its broken images.

    Images enter by their bytes, or by the data set's fingerprint if it has one; files of over HASHED_BYTES in
    total enter by their names and sizes. Raises DataError if a file cannot be read.
    """
    digest = hashlib.sha256()
    splits = {split: len(numbers) for split, numbers in source.splits.items()}
    digest.update(json.dumps([source.classes, splits]).encode())
    digest.update(source.targets.astype("<i8").tobytes())
    if source.fingerprint is not None:
        digest.update(source.fingerprint.encode())
    elif isinstance(source.images, Tensor):
        update_with_pixels(digest, source.images)
    else:
        files = [image for image in source.images if isinstance(image, OriginalFile)]
        _update_with_files(digest, files)
        for image in source.images:
            if isinstance(image, Tensor):
                update_with_pixels(digest, image)
    # the digest of a large data set does not depend on the bytes, so broken images are added by number
    if left_out := sorted(broken):
        digest = hashlib.sha256(json.dumps([digest.hexdigest()[:16], left_out]).encode())
    return digest.hexdigest()[:16]


def update_with_pixels(digest: Any, pixels: Tensor) -> None:
    """Add the shape and the bytes of uint8 pixels to a hashlib digest."""
    digest.update(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.contiguous().numpy().data)


def _update_with_files(digest: Any, files: Sequence[OriginalFile]) -> None:
    where = ""
    try:
        sizes = []
        for file in files:
            where = file.where
            try:
                sizes.append(file.size_bytes())
            except (FileNotFoundError, NotADirectoryError):  # treated as a broken image
                sizes.append(_MISSING)
        whole = sum(sizes) <= HASHED_BYTES
        for file, size in zip(files, sizes, strict=True):
            where = file.where
            digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
            if whole and size != _MISSING:
                digest.update(file.read())
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
