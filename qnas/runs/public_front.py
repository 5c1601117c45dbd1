"""The public networks beside a run: those of its device's whole range, and those within its own limits.

Their accuracy is on ImageNet. It is never drawn on the scale of a run's accuracy, which is on its images.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qnas.common.errors import InfeasibleBudgetError, QnasError, one_line
from qnas.common.units import format_count, format_ms
from qnas.latency.device import Device, load_device
from qnas.latency.prediction import DEVICE
from qnas.latency.rivals import Rival, Rivals, find_rivals
from qnas.runs.finished_run import FinishedRun, asked_devices
from qnas.runs.rivals_text import interval_cell

SHOWN = 10  # networks in a page's table


def public_front(device: Device | None, least_ms: float, most_ms: float) -> list[dict[str, Any]]:
    """Return the front of the public networks that take these milliseconds, as entries of a pareto.json.

    There are none for a device that prices no kernels, or that is not known here.
    """
    if device is None or not device.prices_kernels:
        return []
    try:
        front = find_rivals([(device, most_ms * (1.0 + device.margin))]).front
    except InfeasibleBudgetError:
        return []
    return [_entry(rival) for rival in reversed(front) if rival.latency_ms >= least_ms]


def _entry(rival: Rival) -> dict[str, Any]:
    network, interval = rival.network, rival.latencies[0].interval
    return {
        "name": network.name,
        "resolution_px": network.resolution_px,
        "imagenet_top1": network.imagenet_top1,
        "latency_ms": rival.latency_ms,
        "low_ms": interval.low_ms if interval is not None else None,
        "high_ms": interval.high_ms if interval is not None else None,
        "macs": network.macs,
        "params": network.params,
    }


def point_title(point: Mapping[str, Any]) -> str:
    """Describe an entry of `public_front` in a line."""
    took = format_ms(point["latency_ms"])
    return f"{point['name']} at {point['resolution_px']} px: {took}, {point['imagenet_top1']:.1%} of ImageNet"


def rivals_of(run: FinishedRun) -> tuple[Rivals | None, str]:
    """Return the public networks within a run's limits; None with the reason where there are none."""
    if run.config.get("latency", DEVICE) != DEVICE:
        return None, "the run's latencies are not those of its device's own model"
    counts = {limit.name: limit.budget for limit in run.limits if limit.table is None}
    energies = [limit.budget for limit in run.limits if limit.energy_of]
    on_devices = [limit for limit in run.limits if limit.table is not None]
    try:
        devices = [load_device(name) for name in asked_devices(run)]
        return (
            find_rivals(
                [(device, limit.budget) for device, limit in zip(devices, on_devices, strict=True)],
                max_params=counts.get("params"),
                max_macs=counts.get("macs"),
                max_mj=next(iter(energies), None),
                confidence=on_devices[0].confidence,
            ),
            "",
        )
    except QnasError as error:  # such as an own device whose file is gone, or that has tables only
        return None, one_line(error)


def table_of(rivals: Rivals) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a page's table: name, pixels, top-1, latency and interval by device, sizes."""
    for rival in rivals.networks[:SHOWN]:
        network = rival.network
        latencies = [(format_ms(on.latency_ms, round_up=True), interval_cell(on)) for on in rival.latencies]
        top1 = "\N{EN DASH}" if network.imagenet_top1 is None else f"{network.imagenet_top1:.1%}"
        yield (
            *(f"{network.name}{' *' if rival.on_front else ''}", f"{network.resolution_px} px", top1),
            *(cell for pair in latencies for cell in pair),
            *(format_count(network.params), format_count(network.macs)),
        )
