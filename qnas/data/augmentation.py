"""Augmentation of training images: shifts and mirroring, and torchvision's transforms.

Random resized crops (arXiv 1409.4842) have torchvision's distribution, but are not drawn by torchvision:
images are cut in the threads that decode them, and all threads share torch's global generator.

RandAugment (arXiv 1909.13719) and random erasing (arXiv 1708.04896) change single images, mixup (arXiv
1710.09412) and CutMix (arXiv 1905.04899) whole batches. torchvision draws from torch's global generator,
which is seeded for every image and every batch, and restored afterwards. The draws therefore depend only on
the given seeds, not on earlier draws or on the number of processes that share a batch.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from random import Random

import torch
from torch import Tensor
from torchvision.transforms import v2

from qnas.data.decoding import Box

SEEDS = 1 << 62  # seeds are below it
MAGNITUDES = 10  # RandAugment's scale in the paper and in timm, from which recipes quote magnitudes
_STEPS = 10  # steps per unit of magnitude: torchvision's magnitudes are integers
_OPERATIONS = 2  # applied one after another
_STRETCH = math.log(4 / 3)  # a random crop's ratio of width to height is from 3/4 to 4/3
_TRIES = 10  # tries to draw a crop that fits into the image

# Restores torch's global generator afterwards. torchvision draws on the CPU for any device.
_drawing = partial(torch.random.fork_rng, devices=())


@dataclass(frozen=True)
class Augmentation:
    """The strength of each augmentation, as in `training.recipe.Recipe`; 0 turns it off."""

    classes: int  # number of classes
    randaugment: float = 0.0  # mean magnitude, 0 to MAGNITUDES
    randaugment_std: float = 0.0
    random_erasing: float = 0.0  # share of the images
    mixup: float = 0.0
    cutmix: float = 0.0
    random_resized_crop: float = 0.0  # least share of the area

    @property
    def crops(self) -> bool:
        """Whether random crops are taken of the images."""
        return self.random_resized_crop > 0

    def draw_box(self, seed: int, height: int, width: int) -> Box:
        """Draw a crop of an image of this size, with a share of its area from `random_resized_crop` to 1.

        If no draw fits, the crop is central, with an aspect ratio from 3/4 to 4/3.
        """
        rng = Random(seed)
        for _ in range(_TRIES):
            area = height * width * (self.random_resized_crop + (1 - self.random_resized_crop) * rng.random())
            ratio = math.exp(_STRETCH * (2 * rng.random() - 1))
            tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            top, left = rng.random(), rng.random()
            if 0 < tall <= height and 0 < wide <= width:
                return Box(int(top * (height - tall + 1)), int(left * (width - wide + 1)), tall, wide)
        tall, wide = min(height, width * 4 // 3), min(width, height * 4 // 3)
        return Box((height - tall) // 2, (width - wide) // 2, tall, wide)

    @property
    def mixes(self) -> bool:
        """Whether each image of a batch is mixed with the one before it, and the first with the last."""
        return self.mixup > 0 or self.cutmix > 0

    def change_pixels(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Apply RandAugment to uint8 images (B, C, H, W), each drawn from its own seed, `seeds` (B,)."""
        if self.randaugment == 0:
            return images
        changed = []
        with _drawing():
            for image, seed in zip(images, seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                drawn = self.randaugment + self.randaugment_std * float(torch.randn(()))
                step = round(_STEPS * min(max(drawn, 0.0), MAGNITUDES))
                changed.append(_randaugment(step)(image))
        return torch.stack(changed)

    def erase(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Replace a rectangle of some normalised images (B, C, H, W) by noise, in place, and return them.

        `seeds` (B,) must differ from those of `change_pixels`, or both would draw the same numbers.
        """
        if self.random_erasing == 0:
            return images
        erase = v2.RandomErasing(self.random_erasing, value="random", inplace=True)
        with _drawing():
            for image, seed in zip(images, seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                erase(image)
        return images

    def mix(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) with their predecessors; labels (B,) become shares (B, classes)."""
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        mixers = [kind(alpha=float(alpha), num_classes=self.classes) for kind, alpha in kinds if alpha > 0]
        with _drawing():
            torch.default_generator.manual_seed(seed)
            mixed: tuple[Tensor, Tensor] = v2.RandomChoice(mixers)(images, labels)
        return mixed


@cache
def _randaugment(step: int) -> v2.RandAugment:
    return v2.RandAugment(_OPERATIONS, magnitude=step, num_magnitude_bins=_STEPS * MAGNITUDES + 1)


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shift images over a black background, and mirror some of them.

    Images (B, C, H, W) and the result are uint8, channels last in memory. Each image is padded by H // 8
    pixels on each side and cropped to its size: `shifts` (B, 2), from 0 to twice the padding, are the top and
    left of the crop, and `flips` (B,) says whether the crop is mirrored.
    """
    batch, channels, height, width = images.shape
    border = height // 8
    device = images.device
    # (B, H, W, C) -> (B, H + 2 border, W + 2 border, C)
    padded = torch.nn.functional.pad(
        images.permute(0, 2, 3, 1), (0, 0, border, border, border, border)
    ).contiguous()
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height, device=device) + shifts[:, :1]
    rows = rows + torch.arange(batch, device=device)[:, None] * padded.shape[1]
    pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # (B, H, W), into all pixels
    cut = padded.view(-1, channels).index_select(0, pixels.view(-1))
    return cut.view(batch, height, width, channels).permute(0, 3, 1, 2)
