"""The public networks that a device runs within a budget: what one would take instead of a search.

A network costs what `predict_file` would say of it: the device's kernels, stand-ins for what it does not
know, its calibration and margin, the interval of the prediction, and the energy where the device states it.
The front has the networks that no other within the limits beats: in ImageNet top-1, and in the latency on
every device of the limits.

The accuracy is that of published weights on ImageNet, some trained on more images than those. It says how
networks compare there, not what they reach on other data: no scale has both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from qnas.common.errors import InfeasibleBudgetError, TableError
from qnas.common.files import csv_text
from qnas.common.units import format_count, format_mj, format_ms
from qnas.latency.device import Device
from qnas.latency.device_table import KernelRow
from qnas.latency.intervals import LEVEL, Interval, known_errors
from qnas.latency.prediction import FROM_MEASUREMENTS, not_known, price_part
from qnas.latency.public_networks import PublicNetwork, fused_networks, public_networks

SCHEMA = "qnas.rivals/1"


@dataclass(frozen=True)
class DeviceLatency:
    """The predicted latency of a network on a device."""

    device: str
    latency_ms: float
    interval: Interval | None  # of a measurement; None where the device has no errors to tell from
    coverage: float  # share of the latency that rests on measurements
    energy_mj: float | None = None  # of an image; None where the device does not state that of all kernels

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {**vars(self), "interval": vars(self.interval) if self.interval is not None else None}


@dataclass(frozen=True)
class Rival:
    """A public network within the limits."""

    network: PublicNetwork
    latencies: tuple[DeviceLatency, ...]  # in the order of the budgets
    on_front: bool
    stand_ins: Mapping[str, int]  # operators priced by their multiply-adds, with their number
    uncovered: Mapping[str, int]  # operators priced as a pass over their map

    @property
    def latency_ms(self) -> float:
        """The predicted latency on the first device."""
        return self.latencies[0].latency_ms

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            **asdict(self.network),
            "on_front": self.on_front,
            "latencies": [latency.facts() for latency in self.latencies],
            "stand_ins": dict(self.stand_ins),
            "uncovered": dict(self.uncovered),
        }


@dataclass(frozen=True)
class DeviceBudget:
    """The latency that a network may take on a device, and the energy on one that states energies."""

    device: Device
    budget_ms: float
    confidence: float | None = None  # level of the intervals whose upper ends stay within the budget
    max_mj: float | None = None

    @property
    def limit_ms(self) -> float:
        """The most that `bounded_ms` may be: the budget, without a confidence less the device's margin."""
        return self.device.limit_ms(self.budget_ms) if self.confidence is None else self.budget_ms

    def bounded_ms(self, found: DeviceLatency) -> float:
        """Return what the limit bounds: the latency or, with a confidence, the upper end of its interval."""
        if self.confidence is None:
            return found.latency_ms
        assert found.interval is not None
        return found.interval.high_ms

    def is_met_by(self, found: DeviceLatency) -> bool:
        """Return whether a network with this latency and energy is within."""
        if self.max_mj is not None and (found.energy_mj is None or found.energy_mj > self.max_mj):
            return False
        return self.bounded_ms(found) <= self.limit_ms

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        asked = {"confidence": self.confidence, "max_energy_mj": self.max_mj}
        return {
            "device": self.device.name,
            "budget_ms": self.budget_ms,
            "limit_ms": self.limit_ms,
            "quantity": self.device.quantity,
            "batch": self.device.batch,
            **{name: value for name, value in asked.items() if value is not None},
        }


@dataclass(frozen=True)
class Rivals:
    """The public networks within limits: those of the front first, then the others, the most accurate first.

    A network without a published accuracy is after those with one, the fastest first.
    """

    budgets: tuple[DeviceBudget, ...]
    max_params: float | None
    max_macs: float | None
    networks: tuple[Rival, ...]
    known: int  # networks that were looked at
    source: str  # of the networks and of their accuracy

    @property
    def front(self) -> tuple[Rival, ...]:
        """The networks that no other within the limits beats in accuracy and latency."""
        return tuple(rival for rival in self.networks if rival.on_front)

    def facts(self, top: int | None = None) -> dict[str, Any]:
        """Return the same as JSON values, with the first `top` networks."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "budgets": [budget.facts() for budget in self.budgets],
            "max_params": self.max_params,
            "max_macs": self.max_macs,
            "known": self.known,
            "within": len(self.networks),
            "networks": [rival.facts() for rival in self.networks[:top]],
        }

    def csv(self, top: int | None = None) -> str:
        """Return the first `top` networks as CSV, a line for each device."""
        rows = [row for rival in self.networks[:top] for row in _rows(rival)]
        return csv_text(rows[0], rows)


def _rows(rival: Rival) -> Iterator[dict[str, Any]]:
    for latency in rival.latencies:
        interval = latency.interval
        yield {
            **asdict(rival.network),
            "on_front": rival.on_front,
            "device": latency.device,
            "latency_ms": latency.latency_ms,
            "low_ms": interval.low_ms if interval is not None else None,
            "high_ms": interval.high_ms if interval is not None else None,
            "level": interval.level if interval is not None else None,
            "coverage": latency.coverage,
            "energy_mj": latency.energy_mj,
        }


@lru_cache(maxsize=8)  # a run's page and its Pareto fronts ask for the same devices
def price_public_networks(device: Device, confidence: float | None = None) -> tuple[DeviceLatency, ...]:
    """Return the latency of each public network on a device, in the order of `public_networks`.

    Intervals are at the level `confidence`, by default at the usual one or the device's highest. Raises
    TableError where the device has tables of measured spaces only, and as `known_errors`; UsageError where
    the levels of its intervals end below `confidence`.
    """
    if not device.prices_kernels:
        raise TableError(
            f"device {device.name} has only tables of measured spaces, which say nothing of other networks: "
            "give a device with a model of kernels (qnas devices lists those that ship)"
        )
    fused = fused_networks(device.fusion)
    rows = [price_part(device, part, kernel) for part, kernel in fused.parts]
    ms = np.array([row.latency_ms for row in rows])
    estimated = ms * [row.kind not in FROM_MEASUREMENTS for row in rows]
    totals, unknown = fused.counts @ ms + device.network_ms, fused.counts @ estimated
    energies, found = _energies(device, rows, fused.counts, totals), []
    uncertainty = device.known_uncertainty
    if confidence is not None:
        uncertainty = known_errors(uncertainty, device.name, confidence)
    for total_ms, unknown_ms, mj in zip(totals.tolist(), unknown.tolist(), energies, strict=True):
        interval = None
        if uncertainty is not None:
            at = uncertainty.widest if confidence is None else uncertainty.interval
            interval = at(total_ms, unknown_ms, confidence or LEVEL)
        found.append(DeviceLatency(device.name, total_ms, interval, 1.0 - unknown_ms / total_ms, mj))
    return tuple(found)


def _energies(
    device: Device,
    rows: Sequence[KernelRow],
    counts: sparse.csr_matrix,
    totals_ms: npt.NDArray[np.float64],
) -> list[float | None]:
    """Return the energy of each network, None where that of one of its kernels is not stated."""
    if not device.states_energy:
        return [None] * len(totals_ms)
    if not device.states_kernel_energy:
        assert device.power_w is not None
        return [float(device.power_w * total_ms) for total_ms in totals_ms]

    def stated(row: KernelRow) -> float:
        try:
            return device.kernel_mj(row.priced_as or row.kernel)
        except TableError:
            return math.nan

    sums = counts @ np.array([stated(row) for row in rows]) + device.network_mj
    return [None if math.isnan(mj) else float(mj) for mj in sums]


def find_rivals(
    budgets: Sequence[tuple[Device, float]],
    *,
    max_params: float | None = None,
    max_macs: float | None = None,
    max_mj: float | None = None,
    confidence: float | None = None,
) -> Rivals:
    """Return the public networks within all limits; budgets are in milliseconds.

    `max_mj` is the most energy on each device that states energies. With a `confidence`, the upper ends of
    the intervals at this level stay within the budgets. Raises TableError where a device prices no kernels,
    InfeasibleBudgetError where no network is within, and the errors of `price_public_networks`.
    """
    public = public_networks()
    limits = tuple(
        DeviceBudget(device, budget_ms, confidence, max_mj if device.states_energy else None)
        for device, budget_ms in budgets
    )
    priced = (price_public_networks(limit.device, confidence) for limit in limits)
    latencies = tuple(zip(*priced, strict=True))
    within = [
        i
        for i, (network, on_devices) in enumerate(zip(public.networks, latencies, strict=True))
        if (max_params is None or network.params <= max_params)
        and (max_macs is None or network.macs <= max_macs)
        and all(limit.is_met_by(found) for found, limit in zip(on_devices, limits, strict=True))
    ]
    if not within:
        raise InfeasibleBudgetError(_nothing_within(limits, max_params, max_macs, latencies))
    ms = np.array([[found.latency_ms for found in latencies[i]] for i in within])
    devices = [limit.device for limit in limits]
    top1 = np.array([public.networks[i].imagenet_top1 or np.nan for i in within])
    rivals = [
        Rival(public.networks[i], latencies[i], bool(best), *not_known(devices, public.sequence(i)))
        for i, best in zip(within, on_front(ms, top1), strict=True)
    ]
    rivals.sort(key=lambda r: (not r.on_front, -(r.network.imagenet_top1 or 0.0), r.latency_ms))
    return Rivals(limits, max_params, max_macs, tuple(rivals), len(public.networks), public.source)


def on_front(latency_ms: npt.NDArray[np.float64], top1: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return for each network whether none beats it; (networks,).

    latency_ms: (networks, devices); top1: (networks,), NaN where unknown: such a network is not on the front.
    One network beats another if it is as good in the accuracy and on each device, and better in one of them.

    >>> on_front(np.array([[1.0], [2.0], [3.0]]), np.array([0.7, 0.7, 0.8])).tolist()
    [True, False, True]
    """
    costs = np.column_stack([latency_ms, -top1])
    as_good = (costs[:, None] <= costs[None]).all(axis=2)  # (by, of); false with NaN
    better = (costs[:, None] < costs[None]).any(axis=2)
    return ~np.isnan(top1) & ~(as_good & better).any(axis=0)


def _nothing_within(
    limits: Sequence[DeviceBudget],
    max_params: float | None,
    max_macs: float | None,
    latencies: Sequence[Sequence[DeviceLatency]],
) -> str:
    """Say which limits no network meets, and the least that one needs for each."""
    networks = public_networks().networks
    asked, least = [], []
    for at, limit in enumerate(limits):
        where, sure = f"on {limit.device.name}", ""
        if limit.confidence is not None:
            sure = f" at the upper end of {limit.confidence:.4g} intervals"
        ends_ms = [limit.bounded_ms(found[at]) for found in latencies]
        fastest = min(range(len(networks)), key=ends_ms.__getitem__)
        asked.append(f"{format_ms(limit.budget_ms)} {where}{sure}")
        took = format_ms(ends_ms[fastest], round_up=True)
        least.append(f"{took} {where} ({_named(networks[fastest])})")
        if limit.max_mj is not None:
            asked.append(f"{format_mj(limit.max_mj)} {where}")
            known = {i: mj for i, found in enumerate(latencies) if (mj := found[at].energy_mj) is not None}
            frugal = min(known, key=known.__getitem__, default=None)
            took = "unknown energy" if frugal is None else format_mj(known[frugal], round_up=True)
            least.append(f"{took} {where}" + (f" ({_named(networks[frugal])})" if frugal is not None else ""))
    for most, what in ((max_params, "params"), (max_macs, "macs")):
        if most is not None:
            smallest = min(networks, key=lambda network: getattr(network, what))
            asked.append(f"{format_count(most)} {what}")
            least.append(f"{format_count(getattr(smallest, what))} {what} ({_named(smallest)})")
    return (
        f"no public network is within {' and '.join(asked)}: the least that any of them takes is "
        f"{', '.join(least)}"
    )


def _named(network: PublicNetwork) -> str:
    return f"{network.name} at {network.resolution_px} px"
