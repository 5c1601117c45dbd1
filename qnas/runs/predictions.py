"""The predictions of a trained network for the test images, for tables of classes and its worst mistakes.

They are kept as a safetensors file, which can be read without torch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qnas.common.errors import CheckpointError


@dataclass(frozen=True)
class Predictions:
    """The predicted class, confidence and loss of each test image, and the images of the worst mistakes."""

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
