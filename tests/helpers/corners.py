"""A user's Dataset: small images that a network classifies after a few steps."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

PX = 8


class Corners(Dataset[tuple[Tensor, int]]):
    """Noise with one bright corner, whose number is the label; an index always gives the same image."""

    classes = ("top left", "top right", "bottom left")

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % len(self.classes)
        image = torch.randint(0, 100, (3, PX, PX), generator=torch.Generator().manual_seed(index))
        half = PX // 2
        top, left = label // 2 * half, label % 2 * half
        image[:, top : top + half, left : left + half] += 150
        return image.to(torch.uint8), label
