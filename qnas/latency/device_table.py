"""The latency table of a space on a device, computed from the device's model or read from its CSV file."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path

from qnas.common.errors import TableError
from qnas.common.resources import stems
from qnas.latency.device import Device
from qnas.latency.kernels import Kernel, fuse
from qnas.latency.table import DECIMALS, RUNTIME, Cell, LatencyTable, parse_table, read_own_table
from qnas.spaces.lower import BlockSpec, all_blocks
from qnas.spaces.space import SearchSpace, load_space


@dataclass(frozen=True)
class KernelRow:
    """A kernel of a network with its predicted latency.

    `kind` is measured, fitted or estimated; in an ONNX network it is uncovered where the device does not
    know the kernel, which is then priced as a pass over its map.
    """

    name: str  # of the block, or of the nodes of an ONNX network
    kernel: Kernel
    latency_ms: float
    kind: str
    priced_as: Kernel | None = field(default=None, kw_only=True)  # the kernel that stands in for it


def predict_blocks(device: Device, blocks: Iterable[BlockSpec]) -> tuple[KernelRow, ...]:
    """Predict the latencies of the kernels of these blocks, at any resolution.

    A network takes their sum plus `device.network_ms`. Raises TableError where the device has no model,
    or a model without one of the kinds of kernels.
    """
    return tuple(
        KernelRow(block.name, kernel, device.kernel_ms(kernel), device.kernel_source(kernel))
        for block in blocks
        for kernel in fuse(block.layers, device.fusion)
    )


def build_table(
    device: Device, space: SearchSpace, runtime: Cell, price: Callable[[BlockSpec], Cell]
) -> LatencyTable:
    """Return the table of a space, with `price` called for each fixed block and each candidate."""
    fixed = [(RUNTIME, runtime)]
    cells: dict[str, list[Cell]] = {}  # by position
    for block, candidate in all_blocks(space):
        if candidate is None:
            fixed.append((block.name, price(block)))
        else:
            cells.setdefault(block.name, []).append(price(block))
    rows = tuple(map(tuple, cells.values()))
    return LatencyTable(device.name, space.name, space.digest, tuple(fixed), rows, origin=device)


def compute_table(device: Device, space: SearchSpace) -> LatencyTable:
    """Return a space's table by the device's model of kernels. Raises TableError as `predict_blocks`."""

    @cache  # positions of a stage have the same blocks
    def price(block: BlockSpec) -> Cell:
        rows = predict_blocks(device, [block])
        by_kind: dict[str, list[str]] = {}
        for row in rows:
            by_kind.setdefault(row.kind, []).append(row.kernel.kind)
        kinds = (
            f"{kind}: {' '.join(dict.fromkeys(by_kind[kind]))}" for kind in sorted(by_kind, reverse=True)
        )
        return cell_of(rows, "; ".join(kinds))

    source = f"{device.kind}: what every network takes besides its kernels"
    runtime = Cell(round(device.network_ms, DECIMALS), 0.0, source)
    table = build_table(device, space, runtime, lambda block: price(block.unnamed))
    return replace(table, margin=device.margin, uncertainty=device.known_uncertainty)


def cell_of(rows: Sequence[KernelRow], source: str) -> Cell:
    """Return the sum of a block's kernels."""
    latency = round(math.fsum(row.latency_ms for row in rows), DECIMALS)
    estimated = round(math.fsum(row.latency_ms for row in rows if row.kind == "estimated"), DECIMALS)
    return Cell(latency, min(estimated, latency), source or "no operator")


def load_table(device: Device, space: SearchSpace) -> LatencyTable:
    """Return the table of a space on a device: given in Python, from its CSV, or from the device's model.

    A shipped table is for the shipped space of its name; another space of that name does not use it. A
    table beside your own device file must fit the space, or the space with more classes. Raises TableError
    where it does not, and where there is neither table nor model.
    """
    if device.table_function is not None:
        return _calibrated(device.table_function(device, space), device)
    file = _table_file(device, space)
    if file is not None:
        if isinstance(file, Path):
            return _calibrated(read_own_table(file, space, device=device.name), device)
        text = file.read_text(encoding="utf-8")  # of a package that is not unpacked
        return _calibrated(parse_table(text, space, where=str(file), device=device.name), device)
    if not device.prices_kernels:
        where = f" ({device.tables}/{space.name}.csv)" if device.tables is not None else ""
        raise TableError(
            f"device {device.name} has no latency table for space {space.name}{where} and no model to "
            "compute one: measure the space on the device, or add a model to its file"
        )
    return compute_table(device, space)


def _calibrated(table: LatencyTable, device: Device) -> LatencyTable:
    """Apply the device's calibration to a measured table."""
    table = replace(table, origin=device, uncertainty=device.known_uncertainty)
    if device.calibration is None:
        return table

    def cell(raw: Cell, *, offset: bool = False) -> Cell:
        latency_ms = device.calibrated(raw.latency_ms, offset=offset)
        if latency_ms < 0:
            raise TableError(
                f"device {device.name}: calibration: the offset puts a network without kernels below zero"
            )
        estimated_ms = min(device.calibrated(raw.estimated_ms), latency_ms)
        return Cell(latency_ms, estimated_ms, f"{raw.source}, calibrated".lstrip(", "))

    return replace(
        table,
        fixed=tuple((name, cell(raw, offset=name == RUNTIME)) for name, raw in table.fixed),
        cells=tuple(tuple(map(cell, row)) for row in table.cells),
        margin=device.margin,
    )


def _table_file(device: Device, space: SearchSpace) -> Traversable | None:
    if device.tables is None:
        return None
    if device.is_shipped and (
        space.name not in stems("search_spaces", ".yaml") or load_space(space.name).digest != space.digest
    ):
        return None
    file = device.tables.joinpath(f"{space.name}.csv")
    return file if file.is_file() else None
