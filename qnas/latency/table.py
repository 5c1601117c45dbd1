"""A latency table: the latency of every candidate at every position of a space, on one device.

`LatencyTable.latency_ms` is the predicted latency of a network everywhere: the fixed parts plus one cell
for each position. Search, derivation and reports read the same cells. A cell also holds the part of its
latency that is an estimate, so that each printed latency can say which share of it rests on measurements.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qnas.latency.device import Device

RUNTIME = "runtime"  # the row for the latency of every network besides its kernels
DECIMALS = 6  # of a millisecond: a nanosecond, so that a written table reads back to equal values


@dataclass(frozen=True)
class Cell:
    """The latency of a block. `estimated_ms` is the part of `latency_ms` that no measurement backs."""

    latency_ms: float
    estimated_ms: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        assert 0 <= self.estimated_ms <= self.latency_ms < math.inf, self


@dataclass(frozen=True)
class LatencyTable:
    """The latencies of a space's networks on a device, in milliseconds."""

    device: str
    space: str
    space_digest: str
    fixed: tuple[tuple[str, Cell], ...]  # the runtime and the fixed blocks, by name, in order
    cells: tuple[tuple[Cell, ...], ...]  # by position and candidate, in the space's order
    margin: float = 0.0  # share by which a measurement may exceed a prediction
    # the device that the table was computed from; None where it was read from a run's folder
    origin: Device | None = field(default=None, compare=False, repr=False)

    @cached_property
    def fixed_ms(self) -> float:
        """The latency that every network of the space has besides its candidates."""
        return math.fsum(cell.latency_ms for _, cell in self.fixed)

    @cached_property
    def fixed_estimated_ms(self) -> float:
        """The estimated part of `fixed_ms`."""
        return math.fsum(cell.estimated_ms for _, cell in self.fixed)

    @cached_property
    def ms(self) -> tuple[tuple[float, ...], ...]:
        """The latency of each candidate of each position."""
        return tuple(tuple(cell.latency_ms for cell in row) for row in self.cells)

    @cached_property
    def estimated_ms(self) -> tuple[tuple[float, ...], ...]:
        """The estimated part of `ms`."""
        return tuple(tuple(cell.estimated_ms for cell in row) for row in self.cells)

    def latency_ms(self, arch_indices: Sequence[int]) -> float:
        """Return the predicted latency of the network with these candidate numbers."""
        return math.fsum([self.fixed_ms, *_chosen(self.ms, arch_indices)])

    def coverage(self, arch_indices: Sequence[int]) -> float:
        """Return the share of a network's predicted latency that rests on measurements, 0 to 1."""
        total = self.latency_ms(arch_indices)
        estimated = math.fsum([self.fixed_estimated_ms, *_chosen(self.estimated_ms, arch_indices)])
        return 1.0 - estimated / total if total > 0 else 1.0

    def limit_ms(self, budget_ms: float) -> float:
        """Return the highest prediction for which a measurement within the margin meets the budget."""
        return budget_ms / (1.0 + self.margin)

    @property
    def fastest_ms(self) -> float:
        """The latency of the fastest network of the space."""
        return math.fsum([self.fixed_ms, *map(min, self.ms)])

    @property
    def slowest_ms(self) -> float:
        """The latency of the slowest network of the space."""
        return math.fsum([self.fixed_ms, *map(max, self.ms)])

    @cached_property
    def digest(self) -> str:
        """The identity of the table: its values, device and space."""
        fixed = [(name, cell.latency_ms, cell.estimated_ms) for name, cell in self.fixed]
        content = [self.device, self.space_digest, fixed, self.ms, self.estimated_ms, self.margin]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _chosen(rows: Sequence[Sequence[float]], indices: Sequence[int]) -> list[float]:
    return [row[i] for row, i in zip(rows, indices, strict=True)]
