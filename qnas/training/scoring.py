"""Classification of images by a network: its score, its predictions, and its batch-norm statistics."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from qnas.data.batches import batches
from qnas.data.image_data import Split
from qnas.training.losses import LossFunction, balanced_accuracy, cross_entropy, never_predicted

TOP = 5
WORST = 24  # misclassified images that are kept
CALIBRATION_BATCHES = 8  # for batch norms, before a network of a supernet is evaluated
CALIBRATION_IMAGES = 128  # in each of them
MOST_AT_ONCE = 256  # images that are classified at once
# On a CPU, maps that leave the caches halve the speed. In proxyless-mobile, an image of 128 px takes 2.2
# times as long among 256 as among 32, whereas images of 32 px are fastest among 256.
PIXELS_ON_CPU = 1_000_000
LEAST_ON_CPU = 16


Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """The accuracy and loss of a network on some images."""

    accuracy: float  # 0 to 1
    balanced_accuracy: float  # the mean recall of the classes that occur, 0 to 1
    loss: float  # the mean; cross-entropy in nats unless another loss was asked for
    images: int


@dataclass(frozen=True)
class Classified:
    """A network's predictions for some images, in their order, on the CPU."""

    labels: Tensor  # (images,) the true classes
    predicted: Tensor  # (images,) classes
    confidence: Tensor  # (images,) the probability of the predicted class
    among_top: Tensor  # (images,) bool: whether the label is among the TOP most probable classes
    losses: Tensor  # (images,) float64

    @property
    def right(self) -> Tensor:
        """Whether each image is classified correctly, (images,) bool."""
        return self.predicted == self.labels

    @property
    def score(self) -> Score:
        """The figures of all images together."""
        count = len(self.losses)
        balanced = balanced_accuracy(self.predicted, self.labels)
        return Score(int(self.right.sum()) / count, balanced, float(self.losses.mean()), count)

    def never_predicted(self, classes: Sequence[str]) -> list[str]:
        """Return the names of the classes that have images here but are never predicted."""
        return [classes[number] for number in never_predicted(self.predicted, self.labels)]


def images_at_once(split: Split, device: torch.device) -> int:
    """Return the number of a split's images to classify at once: a power of two that suits the device."""
    if device.type != "cpu":
        return MOST_AT_ONCE
    fitting = PIXELS_ON_CPU // split.images.shape[-1] ** 2
    return min(max(1 << fitting.bit_length() >> 1, LEAST_ON_CPU), MOST_AT_ONCE)


@torch.no_grad()
def classify(
    forward: Forward, images_and_labels: Iterable[tuple[Tensor, Tensor]], loss: LossFunction = cross_entropy
) -> Classified:
    """Classify images with a network that is in evaluation mode, in one pass."""
    parts = []
    for images, labels in images_and_labels:
        logits = forward(images)
        top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
        found = (
            labels,
            logits.argmax(1),
            logits.float().softmax(1).max(1).values,
            (top == labels[:, None]).any(1),
            loss(logits, labels).double(),
        )
        parts.append([tensor.cpu() for tensor in found])
    assert parts, "no images to classify"
    return Classified(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def recalibrate(network: nn.Module, images_and_labels: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the batch norms' statistics again on these batches; no other state changes.

    Statistics that were gathered while other paths ran do not fit this network.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    for images, _ in images_and_labels:
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def recalibrate_on(network: nn.Module, split: Split, device: torch.device | str) -> None:
    """Measure the batch norms' statistics again on the first CALIBRATION_BATCHES batches of a split.

    A last batch of one image is left out: it would count as much as the others.
    """
    images = batches(split, CALIBRATION_IMAGES, seed=0, device=device)
    whole, rest = divmod(len(split), CALIBRATION_IMAGES)
    recalibrate(network, islice(images, min(CALIBRATION_BATCHES, whole + (rest > 1))))


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use each batch's own statistics, as in training, without storing them.

    This serves to compare many paths of a supernet, each of which would need its own statistics.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.train(training)
            norm.track_running_stats = tracks


def prediction_tensors(found: Classified, split: Split) -> dict[str, Tensor]:
    """Return the predictions for the images of a split, in its order.

    `labels` and `predicted` (N,) are class numbers, `confidence` (N,) is the probability of the predicted
    class, `loss` (N,) the loss of the image. `mistakes` (M,) are the indices of the misclassified images of
    highest loss, highest first, and `images` (M, C, H, W) those images as uint8.
    """
    losses = found.losses.float()
    wrong = (~found.right).nonzero()[:, 0]
    mistakes = wrong[losses[wrong].argsort(descending=True, stable=True)][:WORST]
    images = split.read(mistakes) if len(mistakes) else torch.zeros(0, *split.images.shape[1:]).byte()
    return {
        "labels": split.labels,
        "predicted": found.predicted,
        "confidence": found.confidence,
        "loss": losses,
        "mistakes": mistakes,
        "images": images,
    }
