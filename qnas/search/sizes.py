"""The sizes of images in a search over input resolutions.

A search trains at a size of its own, smaller than that of deployed images where it saves time. Images of the
largest resolution of a family have that size, and those of the others are scaled in proportion. Images are
stored at the largest size and are resized on the device, with antialiasing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnas.common.errors import UsageError
from qnas.spaces.lower import smallest_resolution_px
from qnas.spaces.space import SearchSpace


def scaled_px(largest_trained_px: int, resolution_px: int, largest_px: int) -> int:
    """Return the size of a resolution's images in a search, to the nearest pixel.

    >>> [scaled_px(32, px, 224) for px in (128, 160, 192, 224)]
    [18, 23, 27, 32]
    """
    return max(1, round(largest_trained_px * resolution_px / largest_px))


def least_trained_px(space: SearchSpace, resolutions_px: Sequence[int]) -> int:
    """Return the smallest size of the largest images at which all resolutions pass the space and differ."""
    least, largest = smallest_resolution_px(space), max(resolutions_px)
    px = least
    while min(sizes := [scaled_px(px, each, largest) for each in resolutions_px]) < least or len(
        set(sizes)
    ) < len(sizes):
        px += 1
    return px


def check_sizes(space: SearchSpace, resolutions_px: Sequence[int], largest_trained_px: int) -> None:
    """Raise UsageError where images are too small to be scaled to all resolutions."""
    least = least_trained_px(space, resolutions_px)
    if largest_trained_px < least:
        raise UsageError(
            f"`resolution_px={largest_trained_px}`: of {len(resolutions_px)} resolutions, images of the "
            f"largest have this size and the others smaller ones, in proportion: expected at least {least}"
        )


def resize(images: Tensor, px: int) -> Tensor:
    """Resize images (B, C, H, W) -> (B, C, px, px); those of this size are returned as they are."""
    if images.shape[-1] == px:
        return images
    found = F.interpolate(images.float(), (px, px), mode="bilinear", antialias=True).to(images.dtype)
    return found.contiguous(memory_format=torch.channels_last)


class Resized(nn.Module):
    """A network behind a change of its images to one size: (B, C, H, W) -> (B, classes)."""

    def __init__(self, network: nn.Module, px: int) -> None:
        super().__init__()
        self.network, self.px = network, px

    def forward(self, images: Tensor) -> Tensor:
        """Resize and classify."""
        found: Tensor = self.network(resize(images, self.px))
        return found
