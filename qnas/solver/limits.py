"""Limits on a network: milliseconds, counts or millijoules; and their distance from those of a search.

Each limit has a fixed part and a cell for each position and candidate, like a latency table, so that one
solver, one expected value and one penalty serve all of them. A network has to meet all limits at once.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from qnas.common.errors import InfeasibleBudgetError
from qnas.common.units import format_count, format_mj, format_ms, format_per_image
from qnas.latency.energy import EnergyTable
from qnas.latency.intervals import LEVEL, Interval, known_errors
from qnas.latency.table import LatencyTable
from qnas.spaces.lower import BlockSpec, count_macs, count_params, fill, skeleton
from qnas.spaces.space import SearchSpace

Rows = Sequence[Sequence[float]]  # [position][candidate]
Count = Literal["params", "macs"]
COUNTS: tuple[Count, ...] = ("params", "macs")
ENERGY, ENERGY_UNIT = "energy", "mJ"
LABEL: dict[str, str] = {"params": "parameters", "macs": "MACs"}
# An expected amount further than this share from its limit is far from the search. A search ends within 3%
# of its budget, and exchanging one block changes a network in the middle of a shipped space by at most 7 to
# 25%, depending on space and device. Beyond that, several blocks must differ from those that the
# probabilities favour, and the probabilities were not learned at such a budget.
FAR = 0.25


@dataclass(frozen=True)
class Limit:
    """The largest amount of one resource that a network may take."""

    name: str  # a device's, "params", "macs", or "energy-DEVICE"
    budget: float  # as the user gave it: milliseconds or millijoules on a device, else a count
    limit: float  # largest sum: the budget minus the device's margin
    fixed: float  # amount that every network of the space has
    cells: tuple[tuple[float, ...], ...]  # [position][candidate]
    table: LatencyTable | None = None  # for the latency on a device
    energy_of: str = ""  # the device whose energy this is
    throughput: bool = False  # whether the milliseconds are those of an image in a batch on a full device
    # level of the intervals whose upper ends the amounts are; None: amounts are predictions
    confidence: float | None = None
    # the parts of `fixed` by the names of their blocks; () where they are not known apart
    fixed_parts: tuple[tuple[str, float], ...] = field(default=(), compare=False, repr=False)

    def amount(self, indices: Sequence[int]) -> float:
        """Return the amount of the network with these candidate numbers."""
        return math.fsum([self.fixed, *(row[i] for row, i in zip(self.cells, indices, strict=True))])

    def latency_ms(self, indices: Sequence[int]) -> float:
        """Return the predicted latency of a network on the device of this limit."""
        assert self.table is not None, "the limit is a device's"
        return self.table.latency_ms(indices)

    def interval(self, indices: Sequence[int]) -> Interval | None:
        """Return the interval of that latency, at the limit's own level if it has one; None: unknown."""
        assert self.table is not None, "the limit is a device's"
        return self.table.interval(indices, self.confidence or LEVEL)

    @cached_property
    def slowest_within_ms(self) -> float:
        """A bound on the predicted latency of every network within the limit."""
        if self.confidence is None or self.table is None or self.table.uncertainty is None:
            return self.limit
        return self.limit / (1.0 + self.table.uncertainty.at(self.confidence).high)

    @cached_property
    def least(self) -> float:
        """The smallest amount of any network of the space."""
        return math.fsum([self.fixed, *map(min, self.cells)])

    @cached_property
    def most(self) -> float:
        """The largest amount of any network of the space."""
        return math.fsum([self.fixed, *map(max, self.cells)])

    @property
    def unit(self) -> str:
        """The unit of amounts."""
        if self.energy_of:
            return ENERGY_UNIT
        return "ms" if self.table is not None else LABEL[self.name]

    @cached_property
    def cells_digest(self) -> str:
        """The identity of the amounts, for a limit whose cells a run records."""
        content = json.dumps([self.name, self.fixed, self.cells])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def binds(self) -> bool:
        """Whether some network of the space is over the limit."""
        return self.limit < self.most

    def describe(self, amount: float, *, round_up: bool = False) -> str:
        """Write an amount of this resource: `29.5 ms`, `1.2M parameters`, `25.1 mJ on bench`."""
        if self.energy_of:
            return f"{format_mj(amount, round_up=round_up)} on {self.energy_of}"
        if self.table is not None:
            return (format_per_image if self.throughput else format_ms)(amount, round_up=round_up)
        return f"{format_count(amount)} {LABEL[self.name]}"


Limits = tuple[Limit, ...]  # at least one; the first limit of a search is a device's


def latency_limit(table: LatencyTable, budget_ms: float, confidence: float | None = None) -> Limit:
    """Return a device's limit: its table, and the budget minus its margin.

    With a `confidence`, the upper ends of the intervals at this level stay within the whole budget, and take
    the place of the margin. Raises TableError or UsageError where the device has no such intervals.
    """
    origin, limit_ms, fixed, rows = table.origin, table.limit_ms(budget_ms), table.fixed_ms, table.ms
    parts = tuple((name, cell.latency_ms) for name, cell in table.fixed)
    if confidence is not None:
        fixed, rows = table.upper_ends(confidence)
        known = known_errors(table.uncertainty, table.device, confidence)
        high = known.at(confidence).high
        parts = tuple(
            (name, known.end_ms(cell.latency_ms, cell.estimated_ms, high)) for name, cell in table.fixed
        )
        limit_ms, table = budget_ms, replace(table, margin=0.0)
    is_rate = origin is not None and origin.quantity == "throughput"
    return Limit(
        table.device,
        budget_ms,
        limit_ms,
        fixed,
        rows,
        table,
        throughput=is_rate,
        confidence=confidence,
        fixed_parts=parts,
    )


def energy_limit(energies: EnergyTable, most_mj: float) -> Limit:
    """Return the limit on the energy of a network on a device."""
    name = f"{ENERGY}-{energies.device}"
    return Limit(
        name,
        most_mj,
        most_mj,
        energies.fixed_mj,
        energies.mj,
        energy_of=energies.device,
        fixed_parts=energies.fixed_parts,
    )


def count_limit(space: SearchSpace, name: Count, most: float) -> Limit:
    """Return the limit on parameters or MACs of a space's networks, at the space's own resolution."""
    count = {"params": count_params, "macs": count_macs}[name]
    parts: list[tuple[str, float]] = []
    rows = []
    for part in skeleton(space):
        if isinstance(part, BlockSpec):
            parts.append((part.name, float(count([part]))))
        else:
            blocks = (fill(space, part, candidate) for candidate in part.position.candidates)
            rows.append(tuple(float(count([block])) for block in blocks))
    fixed = sum((amount for _, amount in parts), 0.0)
    return Limit(name, most, most, fixed, tuple(rows), fixed_parts=tuple(parts))


def beside_latency(limits: Limits) -> Limits:
    """Return the limits that a predicted latency within the first one does not imply."""
    return limits[1:] if limits[0].confidence is None else limits


def check_limits(limits: Limits) -> None:
    """Raise InfeasibleBudgetError, with what is possible, if no network meets one of the limits."""
    for limit in limits:
        if limit.least <= limit.limit:
            continue
        least, table = limit.describe(limit.least, round_up=True), limit.table
        if table is None:
            verb = "takes" if limit.energy_of else "has"
            problem = f"no network {verb} at most {limit.describe(limit.budget)}: the smallest {verb} {least}"
        else:
            margin = f", and {table.margin:.1%} of margin" if table.margin else ""
            if limit.confidence is not None:
                margin = f" at the upper end of its {limit.confidence:.4g} interval"
            problem = (
                f"no network of {table.space} runs in {limit.describe(limit.budget)} on {limit.name}: "
                f"the fastest takes {least}{margin}"
            )
        raise InfeasibleBudgetError(problem)


def far_from_searched(scores: Rows, limits: Limits, *, pressed: bool) -> str | None:
    """Return a warning where limits are far from those of the search; None where they are near.

    `scores` are log probabilities, whose expected amounts are compared with the limits. The limit that is
    exceeded most, or met most closely, decides, since a search holds that one at its limit. It is far if the
    amount is more than FAR above or, where a budget bound the search (`pressed`), more than FAR below.
    """
    expected = [expected_amount(scores, limit) for limit in limits]
    overs = [
        amount / min(limit.limit, limit.most) - 1 for amount, limit in zip(expected, limits, strict=True)
    ]
    at = int(np.argmax(overs))
    limit, over = limits[at], overs[at]
    if not (over > FAR or (pressed and over < -FAR)):
        return None
    on = f" on {limit.name}" if limit.table is not None else ""
    return (
        "this is far from what was searched for: the probabilities of the search expect "
        f"{limit.describe(expected[at])}{on}, {abs(over):.0%} {'above' if over > 0 else 'below'} what is "
        "allowed; a search for this budget would probably find a better network"
    )


def near_searched(log_probabilities: Rows, limit: Limit, *, pressed: bool) -> tuple[float, float | None]:
    """Return the range of budgets of one limit that are near the search's; None: no upper end."""
    margin = limit.budget / limit.limit
    expected = margin * expected_amount(log_probabilities, limit)
    return expected / (1 + FAR), expected / (1 - FAR) if pressed else None


def expected_amount(log_probabilities: Rows, limit: Limit) -> float:
    """Return the expected amount of a network drawn by these probabilities."""
    rows = zip(log_probabilities, limit.cells, strict=True)
    return limit.fixed + sum(float(np.exp(log_p) @ np.asarray(cells)) for log_p, cells in rows)
