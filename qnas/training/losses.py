"""Losses for training and ranking networks, and metrics for reporting them.

A loss returns one value per image, so that networks can be compared image by image. Any callable of the same
signature can replace the named ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.common.errors import CheckpointError, UsageError
from qnas.training.settings import LossName, MetricName

# logits (B, classes), targets as classes (B,) or as shares of the classes (B, classes) -> (B,)
LossFunction = Callable[[Tensor, Tensor], Tensor]
# predicted classes (N,), labels (N,) -> a figure, higher is better
Metric = Callable[[Tensor, Tensor], float]

GUESSED_LABELS = 4096  # at most this many labels serve to estimate the loss of guessing


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image in nats: (B, classes), (B,) or (B, classes) -> (B,)."""
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True, eq=False)
class WeightedCrossEntropy:
    """Cross-entropy times the weight of the image's class."""

    weights: Tensor  # (classes,)
    name: ClassVar[str] = "balanced"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, classes), (B,) or (B, classes) -> (B,), in nats."""
        weights = self.weights.to(logits.device, torch.float32)
        return F.cross_entropy(logits.float(), targets, weight=weights, reduction="none")


@dataclass(frozen=True)
class FocalLoss:
    """Cross-entropy times (1 - p)^gamma, which fades out well-classified images (arXiv 1708.02002)."""

    gamma: float = 2.0
    name: ClassVar[str] = "focal"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, classes), (B,) or (B, classes) -> (B,), in nats."""
        log_p = F.log_softmax(logits.float(), 1)
        focal = -((1 - log_p.exp()) ** self.gamma) * log_p
        if targets.ndim == 1:
            return focal.gather(1, targets[:, None])[:, 0]
        return (targets * focal).sum(1)


def balanced_loss(labels: Tensor, classes: int) -> WeightedCrossEntropy:
    """Return the loss that weights each class by its rarity among labels (N,), with mean 1 over them."""
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts > 0
    weights = torch.where(present, len(labels) / (int(present.sum()) * counts.clamp_min(1)), 0.0)
    return WeightedCrossEntropy(weights.float())


def mean_loss(loss: LossFunction, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean loss of a batch, a scalar; smoothing spreads a share of targets over all classes."""
    if loss is cross_entropy:  # in one fused call
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if label_smoothing:
        classes = logits.shape[1]
        shares = F.one_hot(targets, classes).float() if targets.ndim == 1 else targets
        targets = (1 - label_smoothing) * shares + label_smoothing / classes
    return loss(logits, targets).mean()


def guessing_loss(loss: LossFunction, labels: Tensor, classes: int) -> float:
    """Return the mean loss of a network that gives all classes the same probability."""
    some = labels[:GUESSED_LABELS].cpu()
    return float(loss(torch.zeros(len(some), classes, dtype=torch.float64), some).mean())


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of images whose predicted class (N,) is the label (N,)."""
    return int((predicted == labels).sum()) / len(labels)


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of the share of a class's images that are classified correctly."""
    right = (predicted == labels).double()
    shares = [right[labels == label].mean() for label in torch.bincount(labels).nonzero()]
    return float(torch.stack(shares).mean())


@dataclass(frozen=True)
class Objective:
    """The loss for training and ranking networks, and a metric to report beside the accuracy."""

    loss: LossFunction = cross_entropy
    metric: Metric | None = None

    def record(self) -> dict[str, str]:
        """Return the names of a loss and metric that are not the default, for a run's config.json."""
        parts = {"loss": None if self.loss is cross_entropy else self.loss, "metric": self.metric}
        return {key: name_of(part) for key, part in parts.items() if part is not None}

    def figures(self, predicted: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the metric's value by its name; empty where there is no metric."""
        return {} if self.metric is None else {name_of(self.metric): self.metric(predicted, labels)}


CROSS_ENTROPY = Objective()


def name_of(part: LossFunction | Metric) -> str:
    """Return the name of a loss or metric: its short name, or else its module and qualified name."""
    if part is balanced_accuracy:
        return "balanced-accuracy"
    named = part if hasattr(part, "__qualname__") else type(part)
    return str(getattr(part, "name", None) or f"{named.__module__}.{named.__qualname__}")


def make_objective(
    loss: LossName | LossFunction, metric: MetricName | Metric, labels: Tensor, classes: int
) -> Objective:
    """Return the objective of a loss and a metric, by name or as callables, for training labels (N,)."""
    if loss == "balanced":
        loss = balanced_loss(labels, classes)
    elif isinstance(loss, str):
        loss = cross_entropy if loss == "cross-entropy" else FocalLoss()
    losses = loss(torch.zeros(2, classes), torch.zeros(2, dtype=torch.long))
    if getattr(losses, "shape", None) != (2,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise UsageError(f"`loss`: expected one loss for each image of a batch, shape (2,), got {got}")
    named = {"accuracy": None, "balanced-accuracy": balanced_accuracy}
    return Objective(loss, named[metric] if isinstance(metric, str) else metric)


def saved_objective(
    name: str, labels: Tensor, classes: int, own: LossFunction | None, where: Path
) -> Objective:
    """Return the objective for ranking networks, from the loss that a run recorded by name.

    `own` is a custom loss. Raises CheckpointError where the run used one and it is not given again.
    """
    if own is not None:
        return Objective(own)
    if name not in get_args(LossName):
        raise CheckpointError(f"{where}: used a custom loss, {name}: give it again as `loss`")
    return make_objective(cast(LossName, name), "accuracy", labels, classes)
