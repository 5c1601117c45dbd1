"""Images that are another image of the data set: pixel for pixel, or nearly so.

Nearly so are images whose perceptual hashes (ImageHash's `phash`, 64 bits) differ in at most NEAR_BITS, and
whose thumbnails in colour correlate by at least NEAR_CORRELATION. That holds for copies that were compressed
again, resized, or made a little brighter; not for mirrored or cropped ones. The hash is of the grey image
alone, and many pictures of one kind have nearly the same, so the thumbnails decide.

All pairs are compared, by products of matrices. Of over ALL_PAIRS images, only the pairs of test images with
others are: that takes minutes for ImageNet instead of hours.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qnas.data.image_files import ImageNumbers, Labels

NEAR_BITS = 6
NEAR_CORRELATION = 0.98
ALL_PAIRS = 200_000
EXAMPLES = 10  # pairs that are named
_PLAIN_LEVELS = 3.0  # standard deviation of a thumbnail, of 255; below it, an image shows nothing to compare
_THUMBNAIL_PX = 8
_REDUCED_PX = 64  # what hash and thumbnail are made from
_TILE = 2048  # images that are compared with as many at once


class Look(NamedTuple):
    """What an image looks like: its perceptual hash (64,) of -1 and 1, and its thumbnail (3, 8, 8)."""

    bits: NDArray[np.int8]
    thumbnail: NDArray[np.uint8]


def look_at(pixels: Tensor) -> Look:
    """Return the look of an image, uint8 (C, H, W)."""
    import imagehash  # imported here, since only checks of data need it

    channels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    picture = Image.fromarray(np.ascontiguousarray(channels.permute(1, 2, 0).numpy()))
    reduced = picture.resize((_REDUCED_PX, _REDUCED_PX), Image.Resampling.BOX, reducing_gap=2.0)
    bits = np.where(imagehash.phash(reduced).hash.ravel(), 1, -1).astype(np.int8)
    small = reduced.resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    return Look(bits, np.asarray(small, dtype=np.uint8).transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class Images:
    """The images that are compared: digests of their pixels, looks, classes, and splits by number.

    The splits are numbered in the order of `Twins.within`: training, held-out and test images.
    """

    digests: NDArray[np.bytes_]  # (N,)
    bits: NDArray[np.int8]  # (N, 64)
    thumbnails: NDArray[np.uint8]  # (N, 3, 8, 8)
    labels: Labels  # (N,)
    splits: NDArray[np.int8]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def to_fill(cls, labels: Labels, splits: NDArray[np.int8]) -> "Images":
        """Return images that have yet to be looked at."""
        count, px = len(labels), _THUMBNAIL_PX
        bits, thumbnails = np.zeros((count, 64), np.int8), np.zeros((count, 3, px, px), np.uint8)
        return cls(np.zeros(count, "S32"), bits, thumbnails, labels, splits)

    def fill(self, number: int, digest: bytes, look: Look) -> None:
        """Set the digest and the look of an image."""
        self.digests[number], self.bits[number], self.thumbnails[number] = digest, look.bits, look.thumbnail

    def take(self, numbers: ImageNumbers) -> "Images":
        """Select some of the images."""
        return Images(
            self.digests[numbers],
            self.bits[numbers],
            self.thumbnails[numbers],
            self.labels[numbers],
            self.splits[numbers],
        )


@dataclass(eq=False)
class Twins:
    """Images that are another one. `pairs` are examples, those between splits and of two classes first."""

    images: NDArray[np.bool_]  # (N,) whether an image is another one
    other_class: NDArray[np.bool_]  # (N,) whether it is one of another class
    within: NDArray[np.bool_]  # (N, 3) whether it is one of that split
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, first: Labels, second: Labels, images: Images) -> None:
        """Add pairs, as two arrays of the images' numbers."""
        differ = images.labels[first] != images.labels[second]
        for ours, theirs in ((first, second), (second, first)):
            self.images[ours] = True
            self.other_class[ours[differ]] = True
            self.within[ours, images.splits[theirs]] = True
        worst = 2 * differ + (images.splits[first] != images.splits[second])
        for place in np.argsort(-worst, kind="stable")[:EXAMPLES].tolist():
            pair = sorted((int(first[place]), int(second[place])))
            self.pairs.append((pair[0], pair[1]))
        self.pairs = sorted(set(self.pairs), key=lambda pair: (-_worst(pair, images), pair))
        del self.pairs[EXAMPLES:]


def _worst(pair: tuple[int, int], images: Images) -> int:
    (a, b), splits = pair, images.splits
    return 2 * int(images.labels[a] != images.labels[b]) + int(splits[a] != splits[b])


def _none(count: int) -> Twins:
    return Twins(np.zeros(count, bool), np.zeros(count, bool), np.zeros((count, 3), bool))


def find_equal(images: Images) -> Twins:
    """Find the images that are another one pixel for pixel."""
    twins = _none(len(images))
    order = np.argsort(images.digests, kind="stable")
    ends = np.flatnonzero(images.digests[order][1:] != images.digests[order][:-1]) + 1
    for group in np.split(order, ends) if len(order) else ():
        # one image of each class and split stands for all of them
        kinds = list(zip(images.labels[group].tolist(), images.splits[group].tolist(), strict=True))
        representatives = list(dict(zip(reversed(kinds), reversed(group.tolist()), strict=True)).values())
        for representative in representatives if len(group) > 1 else ():
            others = group[group != representative]
            twins.add(np.full(len(others), representative), others, images)
    return twins


def find_near(images: Images, *, quiet: bool) -> tuple[Twins, int]:
    """Find the images that are nearly another one, but not pixel for pixel.

    Also return how many images show nothing that could be compared.
    """
    twins = _none(len(images))
    flat = images.thumbnails.reshape(len(images), 3 * _THUMBNAIL_PX**2).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    has_content = flat.std(1) >= _PLAIN_LEVELS
    # test images first, so that the first rows are enough if there are too many pairs
    order = np.flatnonzero(has_content)
    order = order[np.argsort(-images.splits[order], kind="stable")]
    rows = len(order) if len(order) <= ALL_PAIRS else int((images.splits[order] == images.splits.max()).sum())
    flat = flat[order] / np.maximum(np.linalg.norm(flat[order], axis=1, keepdims=True), 1e-6)
    looks, bits = torch.from_numpy(flat), torch.from_numpy(images.bits[order].astype(np.float32))
    _, groups = np.unique(images.digests, return_inverse=True)
    least = bits.shape[1] - 2 * NEAR_BITS  # of the product of two hashes
    starts = range(0, len(order), _TILE)
    with tqdm(total=len(starts), desc="compare", unit="", leave=False, disable=quiet or None) as bar:
        for top in starts:
            for left in (start for start in starts if start >= top) if top < rows else ():
                ours, theirs = slice(top, min(top + _TILE, rows)), slice(left, left + _TILE)
                near = bits[ours] @ bits[theirs].T >= least
                if left == top:
                    near = near.triu(1)
                if not near.any():
                    continue
                near &= looks[ours] @ looks[theirs].T >= NEAR_CORRELATION
                i, j = (
                    order[start + places.numpy()]
                    for start, places in zip((top, left), near.nonzero().T, strict=True)
                )
                differ = groups[i] != groups[j]
                twins.add(i[differ], j[differ], images)
            bar.update()
    return twins, int((~has_content).sum())
