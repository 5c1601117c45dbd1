"""The blocks of a network for a page: their latencies, sizes, and the sources of these numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnas.latency.table import RUNTIME, Cell
from qnas.latency.table_file import describe_layers, read_table
from qnas.runs.names import table_file
from qnas.runs.text import short_name
from qnas.spaces.arch import Arch
from qnas.spaces.lower import BlockSpec, count_macs, count_params, lower, skeleton
from qnas.spaces.space import SearchSpace


@dataclass(frozen=True)
class LayerRow:
    """A layer of a block."""

    role: str
    what: str
    shape: str
    macs: int
    params: int


@dataclass(frozen=True)
class BlockRow:
    """A block of a network."""

    name: str
    choice: str  # short; "-" for identity, empty for what every network has
    kernel: int  # of a candidate; 0 for identity and fixed blocks
    stage: int | None  # from 1; None for stem and head
    channels: int
    resolution_px: int
    macs: int
    params: int
    latency_ms: float | None  # None where the folder holds no table
    estimated_ms: float | None  # of it without a measurement behind it
    source: str
    share: float  # of the network's latency, or without one of its MACs
    width: float  # of the widest block's share
    layers: tuple[LayerRow, ...]
    kernels: tuple[Mapping[str, Any], ...]  # what the device runs, where the run says

    @property
    def group(self) -> int:
        """What it is drawn together with: its stage; before all of them the stem, after them the rest."""
        ends = {"stem": 0, "head": 10**6}
        return self.stage or ends.get(self.name, 10**6 + 1)

    @property
    def is_identity(self) -> bool:
        """Whether the position is empty: identity."""
        return self.choice == "-"


def block_rows(
    folder: Path,
    space: SearchSpace,
    arch: Arch,
    document: Mapping[str, Any],
    kernels: Sequence[Mapping[str, Any]] = (),
) -> tuple[BlockRow, ...]:
    """Return the blocks of a network as they run, with latencies on the first device it was derived for.

    `document` is its arch.json, `kernels` what search.json says of its kernels on that device. Without a
    device, or without its table in the folder, blocks are drawn by their MACs.
    """
    cells = _cells(folder, space, arch, document)
    blocks = lower(space, arch)
    macs = {block.name: count_macs([block]) for block in blocks}
    amounts = {name: cell.latency_ms for name, cell in cells.items()} if cells else macs
    total = sum(amounts.values()) or 1
    widest = max(amounts.values()) or 1
    by_block: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        by_block.setdefault(kernel["name"], []).append(kernel)
    rows = []
    chosen = dict(zip((p.name for p in space.positions), arch.choices, strict=True))
    positions = {position.name: position for position in space.positions}
    for block, part in zip(blocks, skeleton(space), strict=True):
        first, _, rest = block.name.partition(".")
        stage = int(first) if rest else None
        cell = cells.get(block.name)
        choice = chosen.get(block.name)
        candidate = positions[block.name].candidate(choice) if choice is not None else None
        rows.append(
            BlockRow(
                block.name,
                short_name(choice) if choice is not None else "",
                candidate.sizes.get("kernel", 0) if candidate is not None else 0,
                stage,
                block.layers[-1].c_out if block.layers else positions[block.name].c_out,
                part.layers[0].resolution_px if isinstance(part, BlockSpec) else part.resolution_px,
                macs[block.name],
                count_params([block]),
                cell.latency_ms if cell is not None else None,
                cell.estimated_ms if cell is not None else None,
                cell.source if cell is not None else "",
                amounts[block.name] / total,
                amounts[block.name] / widest,
                _layer_rows(block),
                tuple(by_block.get(block.name, ())),
            )
        )
    runtime = cells.get(RUNTIME)
    if runtime is not None and runtime.latency_ms > 0:
        took = runtime.latency_ms
        counts = (0, None, 0, 0, 0, 0)
        rows.append(
            BlockRow(
                RUNTIME,
                "",
                *counts,
                took,
                runtime.estimated_ms,
                runtime.source,
                took / total,
                took / widest,
                (),
                (),
            )
        )
    return tuple(rows)


def _cells(folder: Path, space: SearchSpace, arch: Arch, document: Mapping[str, Any]) -> dict[str, Cell]:
    """Return what each block takes on the first device, by the table in the folder; nothing without one."""
    devices = [entry["name"] for entry in document.get("limits", []) if entry["unit"] == "ms"]
    path = folder / table_file(devices[0]) if devices else folder
    if not path.is_file():
        return {}
    table = read_table(path, space, device=devices[0])
    positions = zip(space.positions, table.cells, arch.indices(space), strict=True)
    return dict(table.fixed) | {position.name: row[i] for position, row, i in positions}


def _layer_rows(block: BlockSpec) -> tuple[LayerRow, ...]:
    return tuple(
        LayerRow(
            layer.role,
            describe_layers([layer]),
            f"{layer.resolution_px} px, {layer.c_in} > {layer.out_px} px, {layer.c_out}",
            layer.macs,
            layer.params,
        )
        for layer in block.layers
    )
