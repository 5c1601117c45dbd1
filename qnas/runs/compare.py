"""A comparison of runs: their choices, their latencies on all known devices, and their accuracies.

Latencies are from the tables of the known devices, the same for all runs. For a device that is known only to
some of the runs, they are from the runs' folders.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qnas.common.errors import TableError, UsageError
from qnas.common.intervals import wilson
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import load_table
from qnas.latency.intervals import Interval
from qnas.runs.finished_run import read_finished_run
from qnas.runs.found_arch import FoundArch, find_arch, read_result
from qnas.runs.names import RESULT_FILE, SEARCH_FILE, SUBNET_FOLDER
from qnas.solver.solve import entry_interval, entry_latency_ms
from qnas.spaces.block_order import block_labels
from qnas.spaces.lower import count_macs, count_params, lower


@dataclass(frozen=True)
class MeasuredAccuracy:
    """An accuracy on test images, with its 95% interval if their number is known, and the balanced one."""

    accuracy: float
    images: int | None
    low: float | None
    high: float | None
    balanced: float | None = None  # the mean recall of the classes; None in runs of older versions


@dataclass(frozen=True)
class Contestant:
    """One of the compared runs."""

    label: str  # A, B, ...
    run: str
    space: str
    resolution_px: int  # that its latencies hold for
    limits: tuple[dict[str, Any], ...]  # from its arch.json
    choices: tuple[str, ...]
    macs: int
    params: int
    latencies_ms: dict[str, float | None]  # by device; None if not known
    intervals: dict[str, Interval | None]  # of them; None where the errors of the device are not known
    supernet: MeasuredAccuracy | None  # accuracy with the supernet's weights
    trained: MeasuredAccuracy | None  # accuracy after training
    unchecked: tuple[str, ...] = ()  # why some of its latencies are as its arch.json says, not recomputed


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[Contestant, ...]
    positions: tuple[str, ...]  # names; empty if the spaces differ
    differ: tuple[bool, ...]  # for each position, whether the choices differ
    same_network: tuple[tuple[str, ...], ...]  # labels of runs with the same network

    def facts(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare the networks of runs, or of any folders with an arch.json.

    Raises UsageError for fewer than 2 or more than 26 runs, ArchError if a folder has no arch.json.
    """
    if not 2 <= len(folders) <= len(string.ascii_uppercase):
        raise UsageError(f"{len(folders)} runs: expected 2 to {len(string.ascii_uppercase)} to compare")
    found = [find_arch(folder) for folder in folders]
    devices = list(device_names())
    devices += dict.fromkeys(
        entry["name"]
        for each in found
        for entry in each.document.get("limits", ())
        if entry["unit"] == "ms" and entry["name"] not in devices
    )
    runs = tuple(
        _contestant(label, folder, each, devices)
        for label, folder, each in zip(string.ascii_uppercase, folders, found, strict=False)
    )
    first = found[0].space
    comparable = all(each.space.digest == first.digest for each in found)
    columns = list(zip(*(run.choices for run in runs), strict=True)) if comparable else []
    return Comparison(
        runs,
        tuple(position.name for position in first.positions) if comparable else (),
        tuple(len(set(column)) > 1 for column in columns),
        _same_networks(found, runs) if comparable else (),
    )


def _contestant(label: str, folder: Path, found: FoundArch, devices: Sequence[str]) -> Contestant:
    blocks = lower(found.space, found.arch)
    limits = found.document.get("limits", ())
    own = {entry["name"]: entry for entry in limits if entry["unit"] == "ms"}
    latencies = {name: _latency(name, found, own.get(name)) for name in devices}
    return Contestant(
        label,
        str(folder),
        found.space.name,
        found.space.input.resolution_px,
        tuple(limits),
        found.arch.choices,
        count_macs(blocks),
        count_params(blocks),
        {name: latency_ms for name, (latency_ms, _) in latencies.items()},
        {name: interval for name, (_, interval) in latencies.items()},
        _supernet_accuracy(found),
        _trained_accuracy(found),
        found.unchecked,
    )


def _latency(
    device: str, found: FoundArch, own: Mapping[str, Any] | None
) -> tuple[float | None, Interval | None]:
    """Return a network's latency by the table of a known device, or else from its own folder."""
    if device in device_names():
        try:
            table, indices = load_table(load_device(device), found.space), found.arch.indices(found.space)
            return table.latency_ms(indices), table.interval(indices)
        except TableError:  # the device's model lacks an operator of this space
            pass
    if own is None:
        return None, None
    return entry_latency_ms(own), entry_interval(own)


def _supernet_accuracy(found: FoundArch) -> MeasuredAccuracy | None:
    """Return the accuracy of a run's network in its search, or None for an architecture without a search."""
    if not (found.folder / SEARCH_FILE).is_file():
        return None
    run = read_finished_run(found.folder)
    derived = run.found["derived"]
    return _measured(derived["accuracy"], run.found["images"].get("test"), derived.get("balanced_accuracy"))


def _trained_accuracy(found: FoundArch) -> MeasuredAccuracy | None:
    """Return the accuracy of a run's trained network, or None if it is not trained."""
    folder = found.folder / SUBNET_FOLDER
    if not (folder / RESULT_FILE).is_file():
        return None
    result = read_result(folder, found)
    return _measured(result["test_accuracy"], result["test_images"], result.get("test_balanced_accuracy"))


def _measured(accuracy: float, images: int | None, balanced: float | None) -> MeasuredAccuracy:
    low, high = wilson(accuracy, images) if images else (None, None)
    return MeasuredAccuracy(accuracy, images, low, high, balanced)


def _same_networks(found: Sequence[FoundArch], runs: Sequence[Contestant]) -> tuple[tuple[str, ...], ...]:
    """Return the labels of runs with the same network, regardless of where the identities are."""
    labels = block_labels(found[0].space)
    alike: dict[tuple[int, ...], list[str]] = {}
    for each, run in zip(found, runs, strict=True):
        indices = each.arch.indices(each.space)
        key = tuple(row[i] for row, i in zip(labels, indices, strict=True) if row[i])
        alike.setdefault(key, []).append(run.label)
    return tuple(tuple(names) for names in alike.values() if len(names) > 1)
