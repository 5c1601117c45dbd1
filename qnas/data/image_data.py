"""A data set at one resolution, split into training, held-out and test images.

All images are in one uint8 array, channels last in memory, in the order training, held-out, test. Splits are
views, so no image is stored twice. Images that do not fit into memory are decoded when a batch needs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from qnas.common.errors import DataError
from qnas.common.text import shown
from qnas.data.broken_images import BrokenImage, or_broken
from qnas.data.decoding import chunked, in_threads, spread
from qnas.data.image_files import ImageNumbers
from qnas.data.lazy_images import LazyImages
from qnas.data.left_out import LeftOut

Images = Tensor | LazyImages  # (N, C, H, W), uint8, at one resolution


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split, with the parameters of their normalisation and augmentation.

    `images` (N, C, H, W) are uint8, channels last in memory, or decoded when they are read. `labels` (N,)
    are int64. `mean` and `std` have one value per channel, on a scale where the byte 255 is 1. `flip` says
    whether a mirrored image still shows its class. `originals` are the same images at full size, for random
    crops; None unless they were kept.
    """

    name: str
    images: Images
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    originals: LazyImages | None = None

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels) > 0, self.name
        assert self.images.shape[1] == len(self.mean) == len(self.std), self.images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        """Return these images (B, C, H, W) as uint8. Raises DataError for a damaged file."""
        found = take(self.images, indices.numpy())
        return found if isinstance(found, Tensor) else torch.stack([found[i] for i in range(len(found))])

    def at(self, resolution_px: int) -> "Split":
        """Return the same images at another resolution; images in memory are copied at the new size."""
        if self.images.shape[-1] == resolution_px:
            return self
        originals = self.originals and replace(self.originals, resolution_px=resolution_px)
        return replace(self, images=_resized(self.images, resolution_px), originals=originals)


def _resized(images: Images, px: int) -> Images:
    """Resize images (N, C, H, W) -> (N, C, px, px); in memory they stay uint8, channels last."""
    if isinstance(images, LazyImages):
        return replace(images, resolution_px=px)
    count, channels = images.shape[:2]
    found = torch.empty((count, px, px, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    for chunk in chunked(count):  # as resizing computes in float32, which takes four times the memory
        part = slice(chunk.start, chunk.stop)
        found[part] = tv.resize(images[part], [px, px], antialias=True)
    return found


def take(images: Images, places: slice | ImageNumbers) -> Images:
    """Select images (N, C, H, W). They stay undecoded, or channels last in memory."""
    if isinstance(images, LazyImages):
        return images.take(places)
    if isinstance(places, slice):
        return images[places]
    # rows of (N, H, W, C) are whole images, which the gather copies at once
    return images.permute(0, 2, 3, 1).index_select(0, torch.from_numpy(places)).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set at one resolution with three splits.

    `train` is for the weights, `heldout` for architecture parameters and for selection, and `test` only for
    the final accuracy. `digest` identifies the original images, labels and classes, at any resolution.
    `notes` are warnings for the user, such as that a resumed run may see other images. `left_out` are files
    of the data set that are not used, and `split_names` what its own splits are called there.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    heldout: Split
    test: Split
    train_and_heldout: Split  # for the final training, after the selection
    resolution_px: int
    channels: int
    digest: str
    pads: bool = False  # whether slightly smaller images got a black border
    bits: int | None = None  # significant bits of images of more than 8; None: there were no such files
    broken: tuple[BrokenImage, ...] = ()  # in no split
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    split_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over `train_and_heldout`, or as given; on a scale where the byte 255 is 1."""
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, as `mean`."""
        return self.train.std

    @property
    def counts(self) -> dict[str, int]:
        """The number of images in each split."""
        return {split.name: len(split) for split in (self.train, self.heldout, self.test)}

    @property
    def described_counts(self) -> str:
        """The number of images in each split, with the data set's own name of it where that is another.

        For instance "80 train, 20 heldout, 50 test (your val)".
        """
        called = {
            split: f"{split} (your {shown(self.split_names[split])})"
            for split in self.counts
            if self.split_names.get(split, split) != split
        }
        return ", ".join(f"{count} {called.get(split, split)}" for split, count in self.counts.items())


def subset(split: Split, n: int) -> Split:
    """Return `n` evenly spaced images of a split, or all if there are fewer.

    Folders are ordered by class, so the first `n` images could be of a single class.
    """
    assert n >= 1, n
    places = spread(len(split), n)
    return replace(split, images=take(split.images, places), labels=split.labels[torch.from_numpy(places)])


def sample_images(split: Split, n: int) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W) as uint8 and labels (n,) of `subset(split, n)`, without the broken ones.

    Raises DataError if all of them are broken.
    """
    some = subset(split, n)
    if isinstance(some.images, Tensor):
        return some.images, some.labels
    ((*found,),) = in_threads(or_broken(some.images.__getitem__), [range(len(some))])
    whole = {place: image for place, image in enumerate(found) if isinstance(image, Tensor)}
    if not whole:
        raise DataError(f"{split.name}: all {len(some)} images are broken: {found[0]}")
    return torch.stack(list(whole.values())), some.labels[list(whole)]
