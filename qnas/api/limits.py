"""The limits requested of a search or a derivation, and how a run records them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qnas.common.arguments import check_arguments
from qnas.common.errors import TableError, UsageError
from qnas.common.units import parse_count, parse_latency
from qnas.latency.device import Device, load_device
from qnas.latency.prediction import table_from
from qnas.solver.limits import COUNTS, Count, Limits, count_limit, latency_limit

if TYPE_CHECKING:
    from qnas.spaces.space import SearchSpace

# A budget for each device: {"vpu": "30ms", "cpu": "20ms"}, or pairs of the same.
Budgets = Mapping[str, str] | Mapping[Device, str] | Sequence[tuple[str | Device, str]]


@dataclass(frozen=True)
class AskedLimits:
    """Requested budgets by device, and requested limits on parameters and multiply-adds.

    Raises UsageError if there is no budget, if a budget has no unit, or if a device occurs twice.

    >>> AskedLimits.of({"vpu": "30ms", "cpu": "20ms"}, max_params="2.5M").label
    'vpu-30ms-cpu-20ms-2.5M-params'
    """

    devices: tuple[tuple[str | Device, str], ...]
    counts: Mapping[Count, str]  # the upper bound of each
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

    @classmethod
    def of(
        cls,
        budgets: Budgets | None,
        max_params: str | int | None = None,
        max_macs: str | int | None = None,
        former: Mapping[str, Any] | None = None,
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
        most = {entry["name"]: entry["budget"] for entry in entries if "device" not in entry}
        most |= {k: str(v) for k, v in (("params", max_params), ("macs", max_macs)) if v is not None}
        try:
            return cls(pairs, {name: most[name] for name in COUNTS if name in most}, confidence)
        except TableError as error:
            if not recorded:
                raise
            again = "a device that was made in Python is given again in `budgets`"
            raise TableError(f"{error}; {again}") from error

    @cached_property
    def known(self) -> tuple[Device, ...]:
        """The devices, loaded. Raises TableError for an unknown one."""
        return tuple(load_device(device) for device, _ in self.devices)

    def limits(self, space: "SearchSpace", latency: str) -> Limits:
        """Return the limits on networks of a space, with latencies from this source.

        Raises UsageError for an invalid value, TableError if a device has no table for the space.
        """
        counts = [(name, parse_count(most, f"`max_{name}`")) for name, most in self.counts.items()]
        tables = [table_from(latency, device, space) for device in self.known]
        budgets = [parse_latency(budget) for _, budget in self.devices]
        return (
            *(latency_limit(t, ms, self.confidence) for t, ms in zip(tables, budgets, strict=True)),
            *(count_limit(space, name, most) for name, most in counts),
        )

    def entries(self, limits: Limits) -> list[dict[str, Any]]:
        """Return a mapping for each limit, with the request and its result, for a run's config.json."""
        asked = [*self.devices, *((None, most) for most in self.counts.values())]
        return [
            {"name": limit.name, "budget": budget, "limit": limit.limit}
            | (
                {"device": getattr(device, "name", device), "table_digest": limit.table.digest}
                | ({} if self.confidence is None else {"confidence": self.confidence})
                if limit.table
                else {}
            )
            for (device, budget), limit in zip(asked, limits, strict=True)
        ]

    @property
    def label(self) -> str:
        """A name for folders: `vpu-30ms-cpu-60ms-2.5M-params`."""
        parts = []
        for device, (_, budget) in zip(self.known, self.devices, strict=True):
            parts += [device.aliases[0] if device.aliases else device.name, budget]
        parts += [f"{most}-{name}" for name, most in self.counts.items()]
        parts += [] if self.confidence is None else [f"c{100 * self.confidence:g}"]
        return "-".join(part.replace(" ", "") for part in parts)


def named(**parts: object) -> dict[str, str]:
    """Return the losses and metrics that are given by name; these are settings."""
    return {key: part for key, part in parts.items() if isinstance(part, str)}
