"""The section of a page about a trained network: curves, classes and the worst mistakes."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from qnas.common.errors import CheckpointError, one_line
from qnas.common.text import shown
from qnas.runs.metrics import read_metrics
from qnas.runs.names import METRICS_FILE, PREDICTIONS_FILE, RESULT_FILE
from qnas.runs.report.charts import Series, chart, photograph, thin
from qnas.runs.report.commands import training_command
from qnas.runs.tensor_files import read_tensor_file
from qnas.runs.text import never_text

MATRIX_CLASSES = 30  # with more classes, the most frequent confusions are listed instead of a matrix
CONFUSED = 20  # number of confusions listed


def training_section(
    folder: Path, result: Mapping[str, Any], config: Mapping[str, Any], *, of_run: bool
) -> dict[str, Any]:
    """Return the section's content for the template; `result` and `config` are the folder's JSON files.

    `of_run` says whether the folder is `subnet/` of the page's run.
    """
    rows = read_metrics(folder / METRICS_FILE)
    epochs = [row for row in rows if "epoch" in row]
    key = "test_balanced_accuracy"  # which older versions did not write
    balanced = [(row["epoch"], row[key]) for row in epochs if key in row]
    charts = (
        chart(
            [
                Series("training images", thin([(row["step"], row["loss"]) for row in rows]), 1),
                Series("test images", [(row["step"], row["test_loss"]) for row in epochs], 2),
            ],
            title="Losses (training: with label smoothing and augmentation)",
            x_label="step",
            y_label="nats",
        ),
        chart(
            [
                Series("test images", [(row["epoch"], row["test_accuracy"]) for row in epochs], 2),
                *([Series("balanced: mean recall of the classes", balanced, 1)] if balanced else []),
            ],
            title="Accuracy, not used for selection",
            x_label="epoch",
            y_label="accuracy",
            percent=True,
        ),
    )
    return {
        "command": training_command(config, of_run=of_run),
        "charts": charts,
        "epochs": len(epochs),
        "never": never_text(result.get("never_predicted", ()), len(result["classes"])),
        "predictions": _predictions(folder / PREDICTIONS_FILE, result),
    }


def _predictions(path: Path, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the results by class from the predictions for test images; None if they were not kept."""
    if not path.is_file():
        return None
    names, found = tuple(map(shown, result["classes"])), read_predictions(path)
    n, right = len(found.labels), int((found.labels == found.predicted).sum())
    if (n, right) != (result["test_images"], round(result["test_accuracy"] * n)):
        raise CheckpointError(
            f"{path}: {right} of {n} images are right, but {RESULT_FILE} says "
            f"{result['test_accuracy']} of {result['test_images']}"
        )
    most = max(int(numbers.max(initial=0)) for numbers in (found.labels, found.predicted))
    if most >= len(names):
        raise CheckpointError(f"{path}: has class {most}, the network has {len(names)} classes")
    counts = confusion(found, len(names))
    of_class, of_guess, cells = counts.sum(1).tolist(), counts.sum(0).tolist(), counts.tolist()
    # name, images, recall and precision of each class; None if there are no images to count
    classes = [
        (name, images, *(cells[i][i] / n if n else None for n in (images, guesses)))
        for i, (name, images, guesses) in enumerate(zip(names, of_class, of_guess, strict=True))
    ]
    pairs = [(names[i], names[j], cells[i][j]) for i, j in permutations(range(len(names)), 2) if cells[i][j]]
    return {
        "classes": classes,
        "matrix": list(zip(names, cells, strict=True)) if len(names) <= MATRIX_CLASSES else (),
        "confused": sorted(pairs, key=lambda pair: -pair[2])[:CONFUSED],
        "mistakes": [
            {
                "picture": photograph(image),
                "true": names[found.labels[at]],
                "predicted": names[found.predicted[at]],
                "confidence": found.confidence[at],
            }
            for image, at in zip(found.images, found.mistakes, strict=True)
        ],
        "pixels": found.images.shape[-1],
    }


@dataclass(frozen=True)
class Predictions:
    """The predicted class, confidence and loss of each test image, and the images of the worst mistakes."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    loss: NDArray[np.float32]
    mistakes: NDArray[np.int64]
    images: NDArray[np.uint8]  # (mistakes, C, H, W)

    def __post_init__(self) -> None:
        n, mistakes = len(self.labels), len(self.mistakes)
        for name, kind, shape in (
            *(("labels", np.int64, (n,)), ("predicted", np.int64, (n,)), ("confidence", np.float32, (n,))),
            *(("loss", np.float32, (n,)), ("mistakes", np.int64, (mistakes,))),
            ("images", np.uint8, (mistakes, *self.images.shape[1:])),
        ):
            array = getattr(self, name)
            if array.dtype != kind or array.shape != shape:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, expected {kind.__name__} {shape}")
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3) or 0 in self.images.shape[2:]:
            raise ValueError(f"images: {self.images.shape}, expected (n, 1 or 3, H, W)")
        for name, most in (("labels", None), ("predicted", None), ("mistakes", n)):
            array = getattr(self, name)
            if (array < 0).any() or (most is not None and (array >= most).any()):
                raise ValueError(f"{name}: a number outside its range")


def read_predictions(path: Path) -> Predictions:
    """Read a file of predictions. Raises CheckpointError if it is damaged."""
    file = read_tensor_file(path)
    try:
        return Predictions(**load(file.content))
    except (SafetensorError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a file of predictions: {one_line(error)}") from error


def confusion(predictions: Predictions, classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix, (true classes, predicted classes)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (predictions.labels, predictions.predicted), 1)
    return counts
