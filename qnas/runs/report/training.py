"""The section of a page about a trained network: curves, classes, and its worst mistakes."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from qnas.runs.names import ARCH_FILE, METRICS_FILE, PREDICTIONS_FILE, RECIPE_FILE, SUBNET_FOLDER
from qnas.runs.predictions import Predictions, confusion, read_predictions
from qnas.runs.report.charts import Series, chart, thin
from qnas.runs.report.figures import read_metrics
from qnas.runs.report.pictures import photograph

MATRIX_CLASSES = 30  # more than these make no table to look at
CONFUSED = 20  # pairs of classes that are listed


@dataclass(frozen=True)
class ClassRow:
    """The accuracy of one class."""

    name: str
    images: int
    recall: float | None  # of its images that are recognised; None where there are none
    precision: float | None  # of those taken for it that are; None where there are none


@dataclass(frozen=True)
class Confused:
    """Images of one class that are taken for another."""

    true: str
    predicted: str
    images: int


@dataclass(frozen=True)
class Mistake:
    """One of the worst mistakes."""

    picture: str  # a data URI
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class TrainingSection:
    """The content of the section for the template."""

    command: str
    charts: tuple[Markup, ...]
    epochs: int
    classes: tuple[ClassRow, ...]  # empty where the folder holds no predictions
    matrix: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]  # a class: (images, share of the class)
    confused: tuple[Confused, ...]
    mistakes: tuple[Mistake, ...]
    pixels: int  # width of a mistake's picture


def training_section(
    folder: Path, result: Mapping[str, Any], config: Mapping[str, Any], *, of_run: bool
) -> TrainingSection:
    """Return what a page says of a training in a folder; `result` and `config` are its JSON files.

    `of_run`: the folder is `subnet/` of the run that the page is of.
    """
    command = command_line(config, of_run=of_run)
    rows = read_metrics(folder / METRICS_FILE)
    epochs = [row for row in rows if "epoch" in row]
    charts = (
        chart(
            [
                Series("training images", thin([(row["step"], row["loss"]) for row in rows]), 1),
                Series("test images", [(row["step"], row["test_loss"]) for row in epochs], 2),
            ],
            title="Losses (that of training with label smoothing and augmentation)",
            x_label="step",
            y_label="nats",
        ),
        chart(
            [Series("test images", [(row["epoch"], row["test_accuracy"]) for row in epochs], 2)],
            title="Accuracy; nothing is chosen by it",
            x_label="epoch",
            y_label="accuracy",
            percent=True,
        ),
    )
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        return TrainingSection(command, charts, len(epochs), (), (), (), (), 0)
    names, found = tuple(map(str, result["classes"])), read_predictions(path)
    counts = confusion(found, len(names))
    return TrainingSection(
        command,
        charts,
        len(epochs),
        tuple(_classes(names, counts)),
        tuple(_matrix(names, counts)) if len(names) <= MATRIX_CLASSES else (),
        tuple(_confused(names, counts)),
        tuple(_mistakes(names, found)),
        found.images.shape[-1],
    )


def command_line(config: Mapping[str, Any], *, of_run: bool) -> str:
    """Return a command that asks for the same training, in the folder that the page lies in."""
    recipe, network = (f"{SUBNET_FOLDER}/{RECIPE_FILE}", ".") if of_run else (RECIPE_FILE, ARCH_FILE)
    words = ["qnas", "train-subnet", network, "--recipe", recipe]
    words += ["--weights", "supernet" if config.get("from_supernet") else "scratch"]
    for name in ("data", "teacher"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    train = config.get("train", {})
    for name in ("seed", "threads", "torch_device", "precision"):
        if train.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(train[name])]
    return shlex.join([*words, *(["--compile"] if train.get("compile") else []), "--out", "again"])


def _classes(names: tuple[str, ...], counts: NDArray[np.int64]) -> Iterator[ClassRow]:
    for at, name in enumerate(names):
        right, images, taken = int(counts[at, at]), int(counts[at].sum()), int(counts[:, at].sum())
        yield ClassRow(name, images, right / images if images else None, right / taken if taken else None)


def _matrix(
    names: tuple[str, ...], counts: NDArray[np.int64]
) -> Iterator[tuple[str, tuple[tuple[int, float], ...]]]:
    for name, row in zip(names, counts, strict=True):
        yield name, tuple((int(n), int(n) / max(1, int(row.sum()))) for n in row)


def _confused(names: tuple[str, ...], counts: NDArray[np.int64]) -> Iterator[Confused]:
    pairs = [
        Confused(names[i], names[j], int(counts[i, j]))
        for i in range(len(names))
        for j in range(len(names))
        if i != j and counts[i, j] > 0
    ]
    yield from sorted(pairs, key=lambda pair: -pair.images)[:CONFUSED]


def _mistakes(names: tuple[str, ...], found: Predictions) -> Iterator[Mistake]:
    for image, at in zip(found.images, found.mistakes.tolist(), strict=True):
        yield Mistake(
            photograph(image),
            names[int(found.labels[at])],
            names[int(found.predicted[at])],
            float(found.confidence[at]),
        )
