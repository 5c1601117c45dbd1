"""The energy of networks on a device whose file states it, in millijoules for one image.

A file states the power of the device, or of a kind of kernel, or terms of energy for a kind; a power of one
watt is one millijoule for each millisecond. No device that ships states any: nobody measured it for us.
Energy is a sum over kernels, as latency is, so that a table of cells holds it exactly.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from qnas.common.errors import TableError
from qnas.latency.device import Device
from qnas.latency.kernels import Kernel, fuse
from qnas.latency.table import RUNTIME, LatencyTable
from qnas.spaces.lower import BlockSpec, all_blocks
from qnas.spaces.space import SearchSpace


@dataclass(frozen=True)
class EnergyTable:
    """The energy of a space's networks on a device, in millijoules."""

    device: str
    fixed_mj: float
    mj: tuple[tuple[float, ...], ...]  # by position and candidate
    # the parts of `fixed_mj` by the names of their blocks; () where they were not computed apart
    fixed_parts: tuple[tuple[str, float], ...] = field(default=(), compare=False, repr=False)


def energy_table(device: Device, space: SearchSpace, table: LatencyTable) -> EnergyTable:
    """Return the energies of a space; `table` has the latencies that a power is multiplied by.

    Raises TableError if the device does not state the energy of each kernel of the space.
    """
    if not device.states_kernel_energy:
        power_w = _power(device)
        rows = tuple(tuple(power_w * ms for ms in row) for row in table.ms)
        of_blocks = tuple((name, power_w * cell.latency_ms) for name, cell in table.fixed)
        return EnergyTable(device.name, power_w * table.fixed_ms, rows, of_blocks)

    @cache  # positions of a stage have the same blocks
    def price(block: BlockSpec) -> float:
        return math.fsum(map(device.kernel_mj, fuse(block.layers, device.fusion)))

    parts = [(RUNTIME, device.network_mj)]
    cells: dict[str, list[float]] = {}  # by position
    for block, candidate in all_blocks(space):
        if candidate is None:
            parts.append((block.name, price(block.unnamed)))
        else:
            cells.setdefault(block.name, []).append(price(block.unnamed))
    fixed_mj = math.fsum(mj for _, mj in parts)
    return EnergyTable(device.name, fixed_mj, tuple(map(tuple, cells.values())), tuple(parts))


def network_mj(device: Device, kernels: Iterable[Kernel], latency_ms: float) -> float | None:
    """Return the energy of a network of these kernels; None where the device states none."""
    if not device.states_energy:
        return None
    if not device.states_kernel_energy:
        return _power(device) * latency_ms
    return math.fsum([device.network_mj, *map(device.kernel_mj, kernels)])


def _power(device: Device) -> float:
    if device.power_w is None:
        raise TableError(
            f"device {device.name} states no energy: add power_w, or power_w or energy_mj of its kernels, to "
            "its file"
        )
    return device.power_w
