"""Scores of a network on images, and the batch-norm statistics that a score needs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CALIBRATION_BATCHES = 8  # for batch norms, before a network of a supernet is evaluated

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """How well a network classifies some images."""

    accuracy: float  # share of 1
    loss: float  # mean cross-entropy in nats
    images: int


@dataclass(frozen=True)
class ImageScores:
    """How well a network classifies each of some images, in their order. On the CPU."""

    losses: Tensor  # (images,) float64, cross-entropy in nats
    right: Tensor  # (images,) bool

    @property
    def score(self) -> Score:
        """Return the figures of all images together."""
        count = len(self.losses)
        return Score(int(self.right.sum()) / count, float(self.losses.mean()), count)


def evaluate(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Score a network that is in evaluation mode."""
    return evaluate_images(forward, batches).score


@torch.no_grad()
def evaluate_images(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> ImageScores:
    """Score a network that is in evaluation mode on each image."""
    losses, right = [], []
    for images, labels in batches:
        logits = forward(images)
        losses.append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
        right.append((logits.argmax(1) == labels).cpu())
    assert losses, "no images to evaluate on"
    return ImageScores(torch.cat(losses), torch.cat(right))


@torch.no_grad()
def recalibrate(module: nn.Module, forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the batch norms' statistics anew on these batches; no other state changes.

    Statistics gathered while other paths ran upstream do not fit this one. Nothing happens where
    there is no batch normalisation.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    for images, _ in batches:
        forward(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of what is put through, as in training, and keep none of them.

    For comparing many paths of a supernet, each of which would need statistics of its own.
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
