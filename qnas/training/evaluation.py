"""What is known of a network once it is trained: its accuracy, its size, its latencies, its speed here.

Accuracies come with Wilson's interval (1927): that of a share near 0 or 1, and of the few images of one
class, which the usual normal interval gets wrong. It says what another test set of the same kind and size
could have shown, not what another seed would.
"""

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.common import host
from qnas.common.errors import TableError
from qnas.common.intervals import LEVEL, wilson
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import load_table
from qnas.runs.found_arch import FoundArch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.training.acceleration import Acceleration
from qnas.training.scoring import Forward, Score

TOP = 5
SPEED_BATCH = 64  # images
SPEED_SECONDS = 0.5  # at least so long, and so many passes
SPEED_PASSES = 5


@dataclass(frozen=True)
class Tally:
    """How a network classified some images: counts (classes,) by their true class."""

    loss: float  # mean cross-entropy in nats
    images: Tensor
    first: Tensor  # answered with the true class
    among_top: Tensor  # true class among the first TOP answers

    @property
    def score(self) -> Score:
        """The same as `train.evaluate` gives."""
        count = int(self.images.sum())
        return Score(int(self.first.sum()) / count, self.loss, count)


@torch.no_grad()
def tally(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tally:
    """Count what a network that is in evaluation mode gets right, by class."""
    counts = torch.zeros(3, classes, dtype=torch.int64)
    losses = []
    for images, labels in batches:
        logits = forward(images)
        losses.append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
        hits = logits.topk(min(TOP, classes), dim=1).indices == labels[:, None]
        right = logits.argmax(1) == labels
        labels = labels.cpu()
        for row, which in zip(counts, (None, right, hits.any(1)), strict=True):
            row += torch.bincount(labels if which is None else labels[which.cpu()], minlength=classes)
    assert losses, "no images to evaluate on"
    return Tally(float(torch.cat(losses).mean()), *counts)


def share(count: int, of: int) -> dict[str, float]:
    """Return a share of 1 with its interval at LEVEL, as JSON values."""
    low, high = wilson(count / of, of)
    return {"value": count / of, "low": low, "high": high}


def accuracy_facts(tally: Tally, classes: Sequence[str]) -> dict[str, Any]:
    """Return accuracies with their intervals, as JSON values; classes without images have none."""
    total = int(tally.images.sum())
    rows = zip(classes, tally.images.tolist(), tally.first.tolist(), strict=True)
    return {
        "interval_level": LEVEL,
        "top1": share(int(tally.first.sum()), total),
        f"top{TOP}": share(int(tally.among_top.sum()), total) if len(classes) > TOP else None,
        "per_class": [
            {"class": name, "images": images} | (share(correct, images) if images else {})
            for name, images, correct in rows
        ],
    }


def size_facts(source: FoundArch) -> dict[str, Any]:
    """Return the deployed network's counts and its latency on each known device, as JSON values.

    At the space's own resolution and classes, as searched for. Known are the shipped devices that can say,
    and one's own that it was searched for.
    """
    space, arch = source.space, source.arch
    blocks = lower(space, arch)
    latencies: dict[str, dict[str, float]] = {}
    for name in device_names():
        try:
            table = load_table(load_device(name), space)
        except TableError:
            continue
        indices = arch.indices(space)
        latencies[name] = {"ms": table.latency_ms(indices), "from_measurements": table.coverage(indices)}
    for limit in source.document.get("limits", []):
        if limit["unit"] == "ms":
            latencies.setdefault(limit["name"], {"ms": limit["amount"]})
    return {
        "resolution_px": space.input.resolution_px,
        "macs": count_macs(blocks),
        "params": count_params(blocks),
        "latency": latencies,
    }


@torch.no_grad()
def measure_speed(
    network: nn.Module, acceleration: Acceleration, channels: int, resolution_px: int
) -> dict[str, Any]:
    """Return how many images a second torch classifies with the network here, as JSON values.

    The median over passes of a batch, in float32 as the test images are classified.
    """
    device = acceleration.device
    shape = (SPEED_BATCH, channels, resolution_px, resolution_px)
    images = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    network.eval()
    seconds: list[float] = []
    network(images)
    while len(seconds) < SPEED_PASSES or sum(seconds) < SPEED_SECONDS:
        start = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    on_gpu = device.type == "cuda"
    return {
        "images_per_second": SPEED_BATCH / statistics.median(seconds),
        "batch_size": SPEED_BATCH,
        "resolution_px": resolution_px,
        "runtime": f"torch {torch.__version__}",
        "machine": torch.cuda.get_device_name(device) if on_gpu else host.cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
