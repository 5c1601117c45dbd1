"""The digest that identifies a data set: its classes, labels, own splits and original images."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from qnas.common.errors import DataError
from qnas.data.image_files import OriginalFile
from qnas.data.labelled_images import LabelledImages

HASHED_BYTES = 1_000_000_000  # larger folders are identified only by the names and sizes of their files
_MISSING = -1  # size of a file that does not exist


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
            except FileNotFoundError:  # treated as a broken image
                sizes.append(_MISSING)
        whole = sum(sizes) <= HASHED_BYTES
        for file, size in zip(files, sizes, strict=True):
            where = file.where
            digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
            if whole and size != _MISSING:
                digest.update(file.read())
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
