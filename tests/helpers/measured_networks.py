"""Artificial measured networks of one operator, with latencies from a device's predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qnas.deploy.sampling import CSV_FILE
from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.fitting.measurements import Measured, read_measured, write_measured
from qnas.latency.kernels import Kernel
from qnas.spaces.space import load_space


def write_networks(path: Path, device_name: str, over: Sequence[float], families: Sequence[str]) -> None:
    """Write a file for eval-latency with these ratios of prediction to latency; nan: not timed."""
    device = load_device(device_name)
    predicted_ms = device.network_ms + device.kernel_ms(Kernel("add", 28, 64, 64))
    np.savez(
        path,
        devices=np.array([device.name]),
        latency_ms=predicted_ms / np.array(over)[:, None],
        family=np.array(list(families)),
        op_names=np.array(["add"]),
        ops=np.array([[0, 28, 64, 28, 64, 1, 1, 0]]),
        indptr=np.arange(len(over) + 1),
        indices=np.zeros(len(over), dtype=np.int64),
    )


def fill_in(folder: Path, device_name: str, seed: int = 0) -> None:
    """Fill in the times of a sample: a device's predictions with one percent of noise."""
    space, rng = load_space(folder / "space.yaml"), np.random.default_rng(seed)
    table = load_table(load_device(device_name), space)
    rows = [
        Measured(row.name, row.arch, table.latency_ms(row.arch.indices(space)) * rng.normal(1, 0.01))
        for row in read_measured(folder / CSV_FILE, space)
    ]
    write_measured(folder / CSV_FILE, rows)
