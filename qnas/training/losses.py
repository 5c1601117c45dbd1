"""Losses for training and ranking networks, and metrics for reporting them.

A loss returns one value per image, so that networks can be compared image by image. Any callable of the same
signature can replace the named ones. Weights of classes multiply the loss of each image, whatever the loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.common.errors import CheckpointError, UsageError, one_line
from qnas.data.decoding import spread
from qnas.training.settings import ClassWeights, LossName, MetricName, Sampler

# logits (B, classes), targets as classes (B,) or as shares of the classes (B, classes) -> (B,)
LossFunction = Callable[[Tensor, Tensor], Tensor]
# predicted classes (N,), labels (N,) -> a figure, higher is better
Metric = Callable[[Tensor, Tensor], float]

GUESSED_LABELS = 4096  # at most this many labels serve to estimate the loss of guessing


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image in nats: (B, classes), (B,) or (B, classes) -> (B,)."""
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True, eq=False)
class ClassWeighted:
    """A loss times the weight of the image's class; a mixed image has the mean weight of its shares.

    Targets stay what they are. If the weights multiplied the shares instead, smoothing a label would move
    much of it to a rare class: with 95% and 5% of two classes, a smoothing of 0.1 would leave equal shares.
    """

    weights: Tensor  # (classes,)
    loss: LossFunction = cross_entropy

    def image_weights(self, targets: Tensor) -> Tensor:
        """Return the weight of each image: (B,) or (B, classes) -> (B,)."""
        weights = self.weights.to(targets.device, torch.float32)
        return weights[targets] if targets.ndim == 1 else targets.float() @ weights

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, classes), (B,) or (B, classes) -> (B,), in nats."""
        return self.image_weights(targets) * self.loss(logits.float(), targets)


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


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Return the weight of each class, (classes,): images / (classes * images of the class), as scikit-learn.

    The mean weight of the images, with labels (N,), is 1, so the gradients keep their scale. Classes without
    images are not counted and have the weight 0.
    """
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts > 0
    return torch.where(present, len(labels) / (int(present.sum()) * counts.clamp_min(1)), 0.0).float()


def balanced_loss(labels: Tensor, classes: int, loss: LossFunction = cross_entropy) -> ClassWeighted:
    """Return a loss that weights each class by its rarity among labels (N,): see `balanced_weights`."""
    return ClassWeighted(balanced_weights(labels, classes), loss)


def mean_loss(loss: LossFunction, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean loss of a batch, a scalar; smoothing spreads a share of targets over all classes.

    Weights of classes are those of the targets before the smoothing. The sum is divided by the number of
    images, not by their weights, so that a batch counts the same however it is divided over processes.
    """
    if loss is cross_entropy:  # in one fused call
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if isinstance(loss, ClassWeighted):
        weights, loss, logits = loss.image_weights(targets), loss.loss, logits.float()
        return (weights * loss(logits, _smoothed(targets, logits.shape[1], label_smoothing))).mean()
    return loss(logits, _smoothed(targets, logits.shape[1], label_smoothing)).mean()


def _smoothed(targets: Tensor, classes: int, label_smoothing: float) -> Tensor:
    if not label_smoothing:
        return targets
    shares = F.one_hot(targets, classes).float() if targets.ndim == 1 else targets
    return (1 - label_smoothing) * shares + label_smoothing / classes


def guessing_loss(loss: LossFunction, labels: Tensor, classes: int) -> float:
    """Return the mean loss of a network that gives all classes the same probability."""
    # evenly spaced, since the images of a folder are in the order of their classes
    some = labels[torch.from_numpy(spread(len(labels), GUESSED_LABELS))].cpu()
    return float(loss(torch.zeros(len(some), classes, dtype=torch.float64), some).mean())


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of images whose predicted class (N,) is the label (N,)."""
    return int((predicted == labels).sum()) / len(labels)


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean recall of the classes that occur among the labels: (N,), (N,) -> 0 to 1.

    The recall of a class is the share of its images that are classified correctly. This is scikit-learn's
    balanced_accuracy_score.
    """
    images = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(images))
    occurs = images > 0
    return float((right[occurs].double() / images[occurs]).mean())


def never_predicted(predicted: Tensor, labels: Tensor) -> list[int]:
    """Return the classes that occur among the labels (N,) but not among the predicted classes (N,)."""
    return sorted(set(labels.tolist()) - set(predicted.tolist()))


@dataclass(frozen=True)
class Objective:
    """The losses for training and for ranking networks, and a metric to report beside the accuracy.

    Images of rare classes weigh more in both losses, or only in that for ranking where the rare classes are
    drawn more often for training (`is_sampled`).
    """

    loss: LossFunction = cross_entropy
    metric: Metric | None = None
    class_weights: Tensor | None = None  # (classes,)
    is_sampled: bool = False
    name: str = ""  # of the loss, if it is not its own

    @property
    def training_loss(self) -> LossFunction:
        """The loss of weight steps."""
        return self.loss if self.class_weights is None or self.is_sampled else self.ranking_loss

    @property
    def ranking_loss(self) -> LossFunction:
        """The loss on held-out and test images, which come in their own shares of the classes."""
        return self.loss if self.class_weights is None else ClassWeighted(self.class_weights, self.loss)

    def record(self) -> dict[str, str]:
        """Return the names of a loss and metric that are not the default, for a run's config.json."""
        loss = self.name or (None if self.loss is cross_entropy else name_of(self.loss))
        found = {"loss": loss, "metric": self.metric and name_of(self.metric)}
        return {key: name for key, name in found.items() if name is not None}

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
    loss: LossName | LossFunction,
    metric: MetricName | Metric,
    labels: Tensor,
    classes: int,
    class_weights: ClassWeights = "none",
    sampler: Sampler = "shuffled",
) -> Objective:
    """Return the objective of a loss and a metric, by name or as callables, for training labels (N,).

    The loss `balanced` is the cross-entropy with the balanced class weights.
    """
    name = ""
    weighted = "balanced" in (loss, class_weights, sampler)
    if isinstance(loss, str):
        name = loss if loss == "balanced" else ""
        loss = FocalLoss() if loss == "focal" else cross_entropy
    losses = loss(torch.zeros(2, classes), torch.zeros(2, dtype=torch.long))
    if getattr(losses, "shape", None) != (2,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise UsageError(f"`loss`: expected one loss for each image of a batch, shape (2,), got {got}")
    named = {"accuracy": None, "balanced-accuracy": balanced_accuracy}
    return Objective(
        loss,
        named[metric] if isinstance(metric, str) else metric,
        balanced_weights(labels, classes) if weighted else None,
        is_sampled=sampler == "balanced",
        name=name,
    )


def saved_objective(
    searched: Mapping[str, Any], labels: Tensor, classes: int, own: LossFunction | None, where: Path
) -> Objective:
    """Return the objective for ranking networks, from the settings that a search recorded.

    `own` is a custom loss. Raises CheckpointError where the run used one and it is not given again, or where
    a setting is unknown.
    """
    name = searched.get("loss", "cross-entropy")
    if own is None and name not in get_args(LossName):
        raise CheckpointError(f"{where}: used a custom loss, {one_line(name)}: give it again as `loss`")
    weights, sampler = searched.get("class_weights", "none"), searched.get("sampler", "shuffled")
    for key, found, known in (
        ("class_weights", weights, get_args(ClassWeights)),
        ("sampler", sampler, get_args(Sampler)),
    ):
        if found not in known:
            raise CheckpointError(
                f"{where}: config.json: search.{key}: expected {' or '.join(known)}, got {one_line(found)}"
            )
    return make_objective(own or cast(LossName, name), "accuracy", labels, classes, weights, sampler)
