"""The blocks of a network for a page: their latencies, sizes, and the sources of these numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qnas.latency.table import RUNTIME, Cell, describe_layers, read_table
from qnas.runs.names import table_file
from qnas.runs.text import short_name
from qnas.spaces.arch import Arch
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import BlockSpec, count_macs, count_params, lower, skeleton
from qnas.spaces.space import SearchSpace


def block_rows(
    folder: Path, space: SearchSpace, arch: Arch, device: str, kernels: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the blocks of a network for the template, with latencies on a device.

    `kernels` are the device's kernels in search.json. Without a device, or without its table in the folder,
    bars show MACs.
    """
    cells: dict[str, Cell] = {}
    if device and (path := folder / table_file(device)).is_file():
        table = read_table(path, space, device=device)
        chosen_cells = zip(space.positions, table.cells, arch.indices(space), strict=True)
        cells = dict(table.fixed) | {position.name: row[i] for position, row, i in chosen_cells}
    blocks = {block.name: block for block in lower(space, arch)}
    parts = dict(zip(blocks, skeleton(space), strict=True))
    positions = {position.name: position for position in space.positions}
    chosen = dict(zip(positions, arch.choices, strict=True))
    amounts = {name: cell.latency_ms for name, cell in cells.items()} or {
        name: count_macs([block]) for name, block in blocks.items()
    }
    total, widest = sum(amounts.values()) or 1, max(amounts.values()) or 1
    rows = []
    for name, block in blocks.items():
        part, position = parts[name], positions.get(name)
        first, _, rest = name.partition(".")
        sizes = position.candidate(chosen[name]).sizes if position is not None else {}
        rows.append(
            {
                "choice": short_name(chosen[name]) if position is not None else "",
                "kernel": sizes.get("kernel", 0),
                "stage": int(first) if rest else None,
                # the stem comes before the stages, the head after them
                "group": int(first) if rest else 0 if name == "stem" else 10**6,
                "channels": block.layers[-1].c_out if position is None or block.layers else position.c_out,
                "resolution_px": (part.layers[0] if isinstance(part, BlockSpec) else part).resolution_px,
                "macs": count_macs([block]),
                "params": count_params([block]),
                "layers": block.layers,
                "kernels": [kernel for kernel in kernels if kernel["name"] == name],
                "name": name,
            }
        )
    if RUNTIME in cells and cells[RUNTIME].latency_ms > 0:
        nothing = {"choice": "", "kernel": 0, "stage": None, "macs": 0, "params": 0}
        rows.append({"name": RUNTIME, "group": 10**6 + 1, "layers": (), "kernels": (), **nothing})
    for row in rows:
        name = str(row["name"])
        row |= {"share": amounts[name] / total, "width": amounts[name] / widest, "cell": cells.get(name)}
    return rows


def layer_text(layer: LayerSpec) -> str:
    """Format a layer with its operator and shapes."""
    shapes = f"{layer.resolution_px} px, {layer.c_in} > {layer.out_px} px, {layer.c_out}"
    return f"{layer.role}: {describe_layers([layer])}, {shapes}"
