"""Images of two classes of different size that overlap: bright images are more often of the rare class."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from qnas.data.datasets import Datasets

SHARE = 0.05  # of the rare class
RARE = 150.0  # mean brightness of the rare class; that of the other is 105


def overlapping(count: int, seed: int, px: int = 8, rare: float = RARE) -> TensorDataset:
    """Return grey images (count, 3, px, px) of which 95% are of class 0, with sorted labels.

    The brightness has the mean 105 or `rare` and the standard deviation 20: guessing by the nearer mean of
    105 and 150 is right for 87% of each class, but most images of 130 are of class 0.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) >= round(count * (1 - SHARE))
    brightness = rng.normal(np.where(labels, rare, 105), 20)
    noise = rng.normal(0, 10, (count, 3, px, px))
    images = (brightness[:, None, None, None] + noise).clip(0, 255).astype(np.uint8)
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def imbalanced(count: int = 1000, rare: float = RARE) -> Datasets:
    """Return training and test images; held-out images are taken from the first."""
    train, test = overlapping(count, 0, rare=rare), overlapping(400, 1, rare=rare)
    return Datasets(train, test=test, classes=("often", "rare"), name="imbalanced", flip=False)
