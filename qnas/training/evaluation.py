"""Facts about a trained network: its accuracy, its size, its latencies, and its speed on this machine.

Accuracies have Wilson's interval (`common.intervals`), which covers other test sets of the same kind and
size, but not other seeds.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qnas.common import host
from qnas.common.errors import TableError
from qnas.common.intervals import LEVEL, wilson
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import load_table
from qnas.runs.found_arch import FoundArch
from qnas.solver.solve import entry_latency_ms
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.training.acceleration import Acceleration
from qnas.training.losses import CROSS_ENTROPY, Objective
from qnas.training.scoring import TOP, Classified

SPEED_BATCH = 64  # images
SPEED_SECONDS = 0.5  # at least
SPEED_PASSES = 5  # at least


def share(count: int, of: int) -> dict[str, float]:
    """Return a share (0 to 1) with its interval at LEVEL, as JSON values."""
    low, high = wilson(count / of, of)
    return {"value": count / of, "low": low, "high": high}


def accuracy_facts(
    found: Classified, classes: Sequence[str], objective: Objective = CROSS_ENTROPY
) -> dict[str, Any]:
    """Return accuracies with their intervals, as JSON values; a class without images has none."""
    total = len(found.labels)
    images, right = (
        torch.bincount(labels, minlength=len(classes)).tolist()
        for labels in (found.labels, found.labels[found.right])
    )
    return {
        "interval_level": LEVEL,
        "top1": share(int(found.right.sum()), total),
        f"top{TOP}": share(int(found.among_top.sum()), total) if len(classes) > TOP else None,
        **({"metrics": figures} if (figures := objective.figures(found.predicted, found.labels)) else {}),
        "per_class": [
            {"class": name, "images": count} | (share(correct, count) if count else {})
            for name, count, correct in zip(classes, images, right, strict=True)
        ],
    }


def size_facts(source: FoundArch) -> dict[str, Any]:
    """Return the deployed network's MACs, parameters and latency on each known device, as JSON values.

    All are for the space's own resolution and classes, as in the search. The devices are the shipped ones
    that can predict the space, and those of the search.
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
            latencies.setdefault(limit["name"], {"ms": entry_latency_ms(limit)})
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
    """Return the images per second that torch classifies on this machine, as JSON values.

    They follow from the median over passes of one batch, in float32, as for the test images.
    """
    device, on_gpu = acceleration.device, acceleration.device.type == "cuda"
    shape = (SPEED_BATCH, channels, resolution_px, resolution_px)
    images = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    network.eval()
    seconds: list[float] = []
    network(images)
    while len(seconds) < SPEED_PASSES or sum(seconds) < SPEED_SECONDS:
        start = time.perf_counter()
        network(images)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "images_per_second": SPEED_BATCH / statistics.median(seconds),
        "batch_size": SPEED_BATCH,
        "resolution_px": resolution_px,
        "runtime": f"torch {torch.__version__}",
        "machine": torch.cuda.get_device_name(device) if on_gpu else host.cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
