"""The mean and standard deviation of each channel, and normalisation by them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qnas.data.broken_images import or_broken
from qnas.data.decoding import chunked, in_threads, spread
from qnas.data.lazy_images import LazyImages

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel; 255 is 1
STATISTICS_IMAGES = 1000  # images to read for mean and std if not all are in memory


def channel_statistics(images: Tensor | LazyImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, on a scale where the byte 255 is 1.

    Of images that are not in memory, STATISTICS_IMAGES are read. The std is at least 1/255, to avoid a
    division by zero. Broken images are skipped; if all are broken, the result is that of black images.
    """
    if isinstance(images, LazyImages):
        images = images.take(spread(len(images), STATISTICS_IMAGES))
        decoded = in_threads(or_broken(images.__getitem__), chunked(len(images)))
        whole = ([image for image in found if isinstance(image, Tensor)] for found in decoded)
        parts: Iterable[Tensor] = (torch.stack(found) for found in whole if found)
    else:
        parts = (images[chunk.start : chunk.stop] for chunk in chunked(len(images)))
    counted = torch.zeros(images.shape[1], 256, dtype=torch.int64)  # (channels, byte values)
    for part in parts:
        for channel, row in enumerate(counted):
            row += torch.bincount(part[:, channel].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64)
    shares = counted.double() / counted.sum(1, keepdim=True).clamp(min=1)
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt().clamp(min=1)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images / 255 - mean) / std as float32: uint8 (B, C, H, W) -> (B, C, H, W).

    The memory format is kept. An exported network contains the same formula.
    """
    assert images.dtype == torch.uint8, images.dtype
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float64)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
    # Rows (C, 1, W) with the strides of the images are six times as fast as (C, 1, 1).
    width = images.shape[3]
    rows = torch.stack((scale, shift)).float().to(images.device).repeat_interleave(width, 0)
    scale, shift = rows.view(2, width, -1).transpose(1, 2)[:, :, None]
    return images.to(torch.float32).mul_(scale).add_(shift)
