"""Networks and search spaces as text, as wide as the output, and as JSON values."""

import math
from collections.abc import Sequence
from typing import Any

from qnas.common.units import format_count
from qnas.runs.text import ROOMY, columns, short_name, wrapped
from qnas.solver.limits import Limits
from qnas.spaces.arch import Arch
from qnas.spaces.lower import BlockSpec, Slot, count_macs, count_params, lower, skeleton, smallest_and_largest
from qnas.spaces.space import SearchSpace

_LAYER_FACTS = (
    *("role", "op", "resolution_px", "out_px", "c_in", "c_out", "kernel", "stride", "params", "macs"),
)

MOST_REPEATED = 8  # candidates that each stage lists again


def choices_by_stage(space: SearchSpace, arch: Arch) -> str:
    """Format the chosen candidates, with one or more lines per stage."""
    resolution = {
        part.position.stage: part.resolution_px
        for part in reversed(skeleton(space))
        if isinstance(part, Slot)
    }
    width = max(5, *(len(short_name(c)) for c in arch.choices))
    lines = []
    for i, stage in enumerate(space.stages):
        chosen = [c for p, c in zip(space.positions, arch.choices, strict=True) if p.stage == i]
        title = f"  stage {i + 1}  {stage.channels:>4} channels  {resolution[i]:>3} px   "
        if columns() < ROOMY:  # the title has a line of its own
            lines.append(title.rstrip())
            title = "    "
        fit = max(1, (columns() + 2 - len(title)) // (width + 2))
        for start in range(0, len(chosen), fit):
            blocks = "  ".join(f"{short_name(c):<{width}}" for c in chosen[start : start + fit])
            lines.append(f"{title if start == 0 else ' ' * len(title)}{blocks}".rstrip())
    return "\n".join(lines)


def describe_network(space: SearchSpace, blocks: Sequence[BlockSpec]) -> str:
    """Format a network as a tree of stages and blocks with MACs and parameters."""
    counts = f"{format_count(count_macs(blocks))} MACs, {format_count(count_params(blocks))} parameters"
    lines = [wrapped(f"{space.name}: {counts}, {space.input.resolution_px} px")]
    stage = ""
    width = max(20, *(len(_block_title(block)) for block in blocks if block.layers))
    for block in (b for b in blocks if b.layers):
        name, _, rest = block.name.partition(".")
        if rest and name != stage:
            channels = space.stages[int(name) - 1].channels
            lines.append(f"  stage {name}: {channels} channels")
        stage = name if rest else ""
        first, last = block.layers[0], block.layers[-1]
        title = f"{'    ' if rest else '  '}{block.name:<14}{_block_title(block)}"
        shape = f"{first.resolution_px}>{last.out_px} px"
        macs, params = format_count(count_macs([block])), format_count(count_params([block]))
        if columns() < ROOMY:
            indent = " " * (4 if rest else 2)
            counts, deeper = f"{shape}, {macs} MACs, {params} params", f"{indent}  "
            lines += [wrapped(title.strip(), indent, deeper), wrapped(counts, deeper, deeper)]
        else:
            lines.append(f"{title:<{18 + width}}{shape:>12} {macs:>8} {params:>8}")
    return "\n".join(lines)


def _block_title(block: BlockSpec) -> str:
    kernels = sorted({layer.kernel for layer in block.layers if layer.kernel > 1})
    widths = [layer.c_out for layer in block.layers]
    kernel = f" {'/'.join(f'{k}x{k}' for k in kernels)}" if kernels else ""
    return f"{block.kind}{kernel}, widest {max(widths)}"


def network_facts(space: SearchSpace, blocks: Sequence[BlockSpec]) -> dict[str, Any]:
    """Return a network's counts of MACs and parameters, in total and by block."""
    return {
        "space": space.name,
        "resolution_px": space.input.resolution_px,
        "params": count_params(blocks),
        "macs": count_macs(blocks),
        "blocks": [
            {
                "name": block.name,
                "kind": block.kind,
                "params": count_params([block]),
                "macs": count_macs([block]),
                "layers": [{name: getattr(layer, name) for name in _LAYER_FACTS} for layer in block.layers],
            }
            for block in blocks
        ],
    }


def space_facts(space: SearchSpace) -> dict[str, Any]:
    """Return the contents of a searchable space, with the range of its counts."""
    small, large = (lower(space, arch) for arch in smallest_and_largest(space))
    return {
        "space": space.name,
        "resolution_px": space.input.resolution_px,
        "networks": math.prod(len(p.candidates) for p in space.positions),
        "params": {"min": count_params(small), "max": count_params(large)},
        "macs": {"min": count_macs(small), "max": count_macs(large)},
        "stages": [
            {
                "channels": stage.channels,
                "stride": stage.stride,
                "positions": [list(p.names) for p in space.positions if p.stage == i],
            }
            for i, stage in enumerate(space.stages)
        ],
    }


def describe_space(space: SearchSpace) -> str:
    """Format a searchable space: its stages, their candidates, and the range of its counts."""
    facts = space_facts(space)
    params, macs = facts["params"], facts["macs"]
    networks = f"{facts['networks']:.3g} networks of {len(space.positions)} positions"
    lines = [
        wrapped(f"{space.name}: {networks}, {space.input.resolution_px} px"),
        f"  MACs        {format_count(macs['min'])} to {format_count(macs['max'])}",
        f"  parameters  {format_count(params['min'])} to {format_count(params['max'])}",
        _indented(
            f"stem: {space.stem.kernel}x{space.stem.kernel} stride {space.stem.stride}, "
            f"{space.stem.channels} channels, {space.norm}, {space.activation}"
        ),
    ]
    listed: dict[tuple[str, ...], int] = {}  # candidates, with the first stage that has them
    for i, stage in enumerate(space.stages):
        positions = [p for p in space.positions if p.stage == i]
        lines.append(
            _indented(
                f"stage {i + 1}: {stage.channels} channels, {len(positions)} positions, stride {stage.stride}"
            )
        )
        for names in dict.fromkeys(p.names for p in positions):
            first = listed.setdefault(names, i)
            # indented lines, without line breaks in a name
            whole = ", ".join(short_name(name).replace(" ", "\N{NO-BREAK SPACE}") for name in names)
            if first < i and len(names) > MOST_REPEATED:
                whole = f"the {len(names)} candidates of stage {first + 1}"
            lines.append(wrapped(whole, "    ", "    "))
    head = f"{space.head.channels} channels, " if space.head.channels else ""
    lines.append(f"  head: {head}{space.head.classes} classes")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return wrapped(text, "  ", "    ")


def size_line(space: SearchSpace, limits: Limits, macs: int, params: int) -> str:
    """Format the size of a network, with the limits on it if there are any."""
    most = {limit.name: f" of {format_count(limit.budget)}" for limit in limits if limit.table is None}
    return (
        f"{format_count(macs)}{most.get('macs', '')} MACs, "
        f"{format_count(params)}{most.get('params', '')} parameters, at {space.input.resolution_px} px"
    )
