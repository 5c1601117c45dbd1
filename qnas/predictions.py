"""What a trained network says of the test images, one by one: for tables of classes and its worst mistakes.

Kept as a safetensors file, which reads without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from qnas.data import Split, batches
from qnas.errors import CheckpointError

WORST = 24  # mistakes of which the images are kept


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor], split: Split, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return what a network in evaluation mode says of each image of a split, in its order.

    `labels` and `predicted` (N,) are classes by number, `confidence` (N,) the probability of the
    predicted one, `loss` (N,) the cross-entropy in nats; `mistakes` (M,) are the images of the highest
    loss among those that are classified wrongly, highest first, and `images` (M, C, H, W) these as uint8.
    """
    predicted, confidence, loss = [], [], []
    for images, labels in batches(split, 256, device=device):
        logits = forward(images).float()
        top = logits.softmax(1).max(1)
        predicted.append(top.indices.cpu())
        confidence.append(top.values.cpu())
        loss.append(F.cross_entropy(logits, labels, reduction="none").cpu())
    found = {
        "labels": split.labels,
        "predicted": torch.cat(predicted),
        "confidence": torch.cat(confidence),
        "loss": torch.cat(loss),
    }
    wrong = (found["predicted"] != found["labels"]).nonzero()[:, 0]
    mistakes = wrong[found["loss"][wrong].argsort(descending=True, stable=True)][:WORST]
    images = split.read(mistakes) if len(mistakes) else torch.zeros(0, *split.images.shape[1:]).byte()
    return found | {"mistakes": mistakes, "images": images}


@dataclass(frozen=True)
class Predictions:
    """What `predict` returned, read back."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    loss: NDArray[np.float32]
    mistakes: NDArray[np.int64]
    images: NDArray[np.uint8]


def read_predictions(path: Path) -> Predictions:
    """Read such a file. Raises CheckpointError where it is damaged."""
    try:
        return Predictions(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise CheckpointError(f"{path}: not a file of predictions: {error}") from error


def confusion(predictions: Predictions, classes: int) -> NDArray[np.int64]:
    """Return how often (true class, predicted class) occurs, (classes, classes)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (predictions.labels, predictions.predicted), 1)
    return counts
