"""The limits requested of a search or a derivation, and how a run records them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qnas.common.arguments import check_arguments
from qnas.common.errors import TableError, UsageError
from qnas.common.units import is_rate, parse_count, parse_energy, parse_latency
from qnas.latency.device import Device, load_device
from qnas.latency.energy import energy_table
from qnas.latency.prediction import table_from
from qnas.solver.limits import COUNTS, Count, Limits, count_limit, energy_limit, latency_limit

if TYPE_CHECKING:
    from qnas.spaces.space import SearchSpace

# A budget for each device: {"vpu": "30ms", "cpu": "20ms"}, or pairs of the same.
Budgets = Mapping[str, str] | Mapping[Device, str] | Sequence[tuple[str | Device, str]]


@dataclass(frozen=True)
class AskedLimits:
    """Requested budgets by device, and requested limits on parameters, multiply-adds and energy.

    The limit on energy holds on each device that states energies. Raises UsageError if there is no budget, if
    a budget has no unit or is a rate on a device of latencies, if a device occurs twice, or if none of the
    devices states energies.

    >>> AskedLimits.of({"vpu": "30ms", "cpu": "20ms"}, max_params="2.5M").label
    'vpu-30ms-cpu-20ms-2.5M-params'
    """

    devices: tuple[tuple[str | Device, str], ...]
    counts: Mapping[Count, str]  # the upper bound of each
    energy: str | None = None  # the upper bound on each device that states energies
    confidence: float | None = None  # level of the intervals whose upper ends stay within the budgets

    def __post_init__(self) -> None:
        if not self.devices:
            raise UsageError("`budgets`: expected a device with its budget, such as {'vpu': '30ms'}")
        for _, budget in self.devices:
            parse_latency(budget)
        check_arguments(confidence=self.confidence)
        names = [device.name for device in self.known]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{twice[0]} is given twice: give only its smaller budget")
        for device, (_, budget) in zip(self.known, self.devices, strict=True):
            if is_rate(budget) and device.quantity != "throughput":
                raise UsageError(
                    f"budget {budget!r}: the figures of {device.name} are latencies, of {device.batch} image"
                    f"{'s' * (device.batch > 1)} at a time, and no throughput: give ms, such as 30ms"
                )
        if self.energy is not None:
            parse_energy(self.energy)
            if not self.metered:
                raise UsageError(
                    f"`max_energy={self.energy}`: no energies are stated by {', '.join(names)}: add power_w, "
                    "or power_w or energy_mj of its kernels, to the file of a device of your own"
                )

    @classmethod
    def of(
        cls,
        budgets: Budgets | None,
        max_params: str | int | None = None,
        max_macs: str | int | None = None,
        former: Mapping[str, Any] | None = None,
        *,
        max_energy: str | None = None,
        confidence: float | None = None,
    ) -> "AskedLimits":
        """Return the limits of a mapping or of pairs; None takes the value of a former run's config.json."""
        entries = (former or {}).get("limits", ())
        recorded = budgets is None
        if budgets is None:
            budgets = [(entry["device"], entry["budget"]) for entry in entries if "device" in entry]
        items = budgets.items() if isinstance(budgets, Mapping) else budgets
        try:
            pairs = tuple((device, str(budget)) for device, budget in items)  # 30 lacks a unit: refused
        except (TypeError, ValueError) as error:
            expected = "expected devices with budgets: {'vpu': '30ms'}"
            raise UsageError(f"`budgets={budgets!r:.60}`: {expected}") from error
        if confidence is None:
            confidence = next((entry["confidence"] for entry in entries if "confidence" in entry), None)
        most = {e["name"]: e["budget"] for e in entries if "device" not in e and "energy_of" not in e}
        energies = [entry["budget"] for entry in entries if "energy_of" in entry]
        energy = str(max_energy) if max_energy is not None else next(iter(energies), None)
        most |= {k: str(v) for k, v in (("params", max_params), ("macs", max_macs)) if v is not None}
        try:
            return cls(pairs, {name: most[name] for name in COUNTS if name in most}, energy, confidence)
        except TableError as error:
            if not recorded:
                raise
            again = "a device that was made in Python is given again in `budgets`"
            raise TableError(f"{error}; {again}") from error

    @cached_property
    def known(self) -> tuple[Device, ...]:
        """The devices, loaded. Raises TableError for an unknown one."""
        return tuple(load_device(device) for device, _ in self.devices)

    @property
    def budgets_ms(self) -> tuple[float, ...]:
        """The budget on each device in milliseconds."""
        return tuple(parse_latency(budget) for _, budget in self.devices)

    @property
    def most(self) -> dict[Count, float]:
        """The largest counts that are allowed. Raises UsageError for one that is no number."""
        return {name: parse_count(most, f"`max_{name}`") for name, most in self.counts.items()}

    @cached_property
    def metered(self) -> tuple[Device, ...]:
        """The devices on which the energy is limited; none without such a limit."""
        return tuple(d for d in self.known if d.states_energy) if self.energy is not None else ()

    def limits(self, space: "SearchSpace", latency: str) -> Limits:
        """Return the limits on networks of a space, with latencies from this source.

        Raises UsageError for an invalid value, TableError if a device has no table for the space.
        """
        tables = {device.name: table_from(latency, device, space) for device in self.known}
        energies = [energy_table(device, space, tables[device.name]) for device in self.metered]
        pairs = zip(tables.values(), self.budgets_ms, strict=True)
        return (
            *(latency_limit(table, budget_ms, self.confidence) for table, budget_ms in pairs),
            *(count_limit(space, name, most) for name, most in self.most.items()),
            *(energy_limit(each, parse_energy(self.energy or "")) for each in energies),
        )

    def entries(self, limits: Limits) -> list[dict[str, Any]]:
        """Return a mapping for each limit, with the request and its result, for a run's config.json."""
        counts = ((None, most) for most in self.counts.values())
        asked = [*self.devices, *counts, *((None, self.energy) for _ in self.metered)]
        return [
            {"name": limit.name, "budget": budget, "limit": limit.limit}
            | (
                {"device": getattr(device, "name", device), "table_digest": limit.table.digest}
                | ({} if self.confidence is None else {"confidence": self.confidence})
                if limit.table
                else {}
            )
            | ({"energy_of": limit.energy_of, "cells_digest": limit.cells_digest} if limit.energy_of else {})
            for (device, budget), limit in zip(asked, limits, strict=True)
        ]

    @property
    def label(self) -> str:
        """A name for folders: `vpu-30ms-cpu-60ms-2.5M-params`."""
        parts = []
        for device, (_, budget) in zip(self.known, self.devices, strict=True):
            parts += [device.aliases[0] if device.aliases else device.name, budget]
        parts += [f"{most}-{name}" for name, most in self.counts.items()]
        parts += [self.energy] if self.energy is not None else []
        parts += [] if self.confidence is None else [f"c{100 * self.confidence:g}"]
        return "-".join(part.replace(" ", "").replace("/", "-per-") for part in parts)


def limits_once(asked: AskedLimits, latency: str) -> Callable[["SearchSpace"], Limits]:
    """Return a function from a space to its limits, which computes the tables of each space once."""
    known: dict[str, Limits] = {}

    def limits_of(space: "SearchSpace") -> Limits:
        if space.digest not in known:
            known[space.digest] = asked.limits(space, latency)
        return known[space.digest]

    return limits_of


def named(**parts: object) -> dict[str, str]:
    """Return the losses and metrics that are given by name; these are settings."""
    return {key: part for key, part in parts.items() if isinstance(part, str)}
