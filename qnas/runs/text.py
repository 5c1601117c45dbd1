"""What the commands print: plain text of at most 80 columns, and the same facts as JSON values."""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill as fill_text
from typing import Any

from qnas.common.units import format_count, format_ms
from qnas.latency.device import Figures
from qnas.latency.prediction import Prediction
from qnas.latency.table import LatencyTable
from qnas.solver.limits import Limit, Limits
from qnas.spaces.arch import Arch
from qnas.spaces.lower import BlockSpec, Slot, count_macs, count_params, lower, skeleton, smallest_and_largest
from qnas.spaces.space import SearchSpace


def short_name(candidate: str) -> str:
    """Write a candidate's name as `k7 e4`, identity as a dash, and a registered block with its name.

    >>> short_name("quadra_k7_e4"), short_name("quadra_k7_e4_fan"), short_name("identity")
    ('k7 e4', 'k7 e4 fan', '-')
    >>> short_name("star_k7_e4")
    'star k7 e4'
    """
    if candidate == "identity":
        return "-"
    block, _, rest = candidate.partition("_")
    return (rest if block in ("quadra", "mbconv") else candidate).replace("_", " ")


def choices_by_stage(space: SearchSpace, arch: Arch) -> str:
    """Draw the chosen candidates, a line a stage, or as many as they need."""
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
        fit = max(1, (82 - len(title)) // (width + 2))  # on a line of 80 columns
        for start in range(0, len(chosen), fit):
            blocks = "  ".join(f"{short_name(c):<{width}}" for c in chosen[start : start + fit])
            lines.append(f"{title if start == 0 else ' ' * len(title)}{blocks}".rstrip())
    return "\n".join(lines)


def describe_network(space: SearchSpace, blocks: Sequence[BlockSpec]) -> str:
    """Draw a network as a tree of stages and blocks with MACs and parameters."""
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
        lines.append(f"{title:<{18 + width}}{shape:>12} {macs:>8} {params:>8}")
    return "\n".join(lines)


def _block_title(block: BlockSpec) -> str:
    kernels = sorted({layer.kernel for layer in block.layers if layer.kernel > 1})
    widths = [layer.c_out for layer in block.layers]
    kernel = f" {'/'.join(f'{k}x{k}' for k in kernels)}" if kernels else ""
    return f"{block.kind}{kernel}, widest {max(widths)}"


def network_facts(space: SearchSpace, blocks: Sequence[BlockSpec]) -> dict[str, Any]:
    """Return a network's counts, in all and by block."""
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
                "layers": [
                    {
                        "role": layer.role,
                        "op": layer.op,
                        "resolution_px": layer.resolution_px,
                        "out_px": layer.out_px,
                        "c_in": layer.c_in,
                        "c_out": layer.c_out,
                        "kernel": layer.kernel,
                        "stride": layer.stride,
                        "params": layer.params,
                        "macs": layer.macs,
                    }
                    for layer in block.layers
                ],
            }
            for block in blocks
        ],
    }


def space_facts(space: SearchSpace) -> dict[str, Any]:
    """Return what a searchable space holds, with the range of its counts."""
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
    """Draw a searchable space: its stages, their candidates and the range of its counts."""
    facts = space_facts(space)
    params, macs = facts["params"], facts["macs"]
    networks = f"{facts['networks']:.3g} networks of {len(space.positions)} positions"
    lines = [
        wrapped(f"{space.name}: {networks}, {space.input.resolution_px} px"),
        f"  MACs        {format_count(macs['min'])} to {format_count(macs['max'])}",
        f"  parameters  {format_count(params['min'])} to {format_count(params['max'])}",
        f"  stem: {space.stem.kernel}x{space.stem.kernel} stride {space.stem.stride}, "
        f"{space.stem.channels} channels, {space.norm}, {space.activation}",
    ]
    for i, stage in enumerate(space.stages):
        positions = [p for p in space.positions if p.stage == i]
        lines.append(
            f"  stage {i + 1}: {stage.channels} channels, {len(positions)} positions, stride {stage.stride}"
        )
        lists = dict.fromkeys(p.names for p in positions)
        lines += [_fill_names(map(short_name, names)) for names in lists]
    head = f"{space.head.channels} channels, " if space.head.channels else ""
    lines.append(f"  head: {head}{space.head.classes} classes")
    return "\n".join(lines)


def _fill_names(names: Iterable[str]) -> str:
    """Write names in indented lines, none of them broken."""
    whole = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
    return wrapped(whole, "    ", "    ")


def table_rows(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Align columns: those numbered in `left` to the left, the others to the right."""
    every = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def describe_predictions(predictions: Sequence[Prediction], dearest: int) -> str:
    """Show latencies by device, then on each device the layers that are dearest."""
    lines = [
        table_rows(
            ("device", "latency", "from measurements", "with batch norm"),
            [
                (
                    p.device,
                    format_ms(p.latency_ms),
                    f"{p.coverage:.0%}",
                    format_ms(p.batchnorm_ms) if p.batchnorm_ms is not None else "-",
                )
                for p in predictions
            ],
        )
    ]
    for p in predictions:
        lines += ["", f"{p.device}: the dearest layers"]
        for layer in p.layers[:dearest]:
            share = f"{layer.latency_ms / p.latency_ms:>4.0%}"
            begin = f"  {share} {format_ms(layer.latency_ms):>10}  {len(layer.where):>3} x "
            lines.append(wrapped(f"{begin}{layer.what}  ({layer.kind})", "", " " * len(begin)))
        if p.note:
            lines.append(field("  note", p.note))
    return "\n".join(lines)


def figures_facts(figures: Figures) -> dict[str, float | int | None]:
    """Return figures as JSON values: shares and errors as fractions of 1."""
    return {
        "n": figures.n,
        "rmspe": _fraction(figures.rmspe_pct),
        "within_5": _fraction(figures.within_5_pct),
        "within_10": _fraction(figures.within_10_pct),
        "bias": _fraction(figures.bias_pct),
        "spearman": figures.spearman,
    }


def _fraction(percent: float) -> float:
    return round(percent / 100, 6)  # what the division adds to a rounded percentage is no figure


def describe_figures(by_group: Mapping[str, Figures]) -> str:
    """Show how predictions compare with measurements, a line a group, all of them last."""
    groups = [*(name for name in by_group if name != "all"), "all"]
    return table_rows(
        ("family", "n", "RMSPE", "within 5%", "within 10%", "bias", "Spearman"),
        [
            (
                name,
                str(f.n),
                f"{f.rmspe_pct:.1f}%",
                f"{f.within_5_pct:.1f}%",
                f"{f.within_10_pct:.1f}%",
                f"{f.bias_pct:+.1f}%",
                "-" if f.spearman is None else f"{f.spearman:.3f}",
            )
            for name, f in ((name, by_group[name]) for name in groups)
        ],
    )


def latency_line(table: LatencyTable, indices: Sequence[int], budget_ms: float) -> str:
    """Say what a network takes, against the budget, and what share of it rests on measurements."""
    latency_ms = table.latency_ms(indices)
    return (
        f"{format_ms(latency_ms, round_up=True)} of {format_ms(budget_ms)} on {table.device} "
        f"({latency_ms / budget_ms:.1%}); "
        + (f"{table.margin:.1%} of margin kept; " if table.margin else "")
        + f"{table.coverage(indices):.0%} from measurements"
    )


def latency_lines(limits: Limits, indices: Sequence[int], notes: Sequence[str]) -> Iterator[str]:
    """Say what a network takes on each device, each followed by its note where it has one."""
    devices = [(limit.table, limit.budget) for limit in limits if limit.table is not None]
    for i, ((table, budget_ms), note) in enumerate(zip(devices, notes, strict=True)):
        yield field("" if i else "latency", latency_line(table, indices, budget_ms))
        if note:
            yield field("", note)


def size_line(space: SearchSpace, limits: Limits, macs: int, params: int) -> str:
    """Say how large a network is, against what it may be where that is limited."""
    most = {limit.name: f" of {format_count(limit.budget)}" for limit in limits if limit.table is None}
    return (
        f"{format_count(macs)}{most.get('macs', '')} MACs, "
        f"{format_count(params)}{most.get('params', '')} parameters, at {space.input.resolution_px} px"
    )


def describe_limits(space: SearchSpace, limits: Limits) -> str:
    """Say what networks of a space may take and what they do take, and which budgets mean little."""
    lines = []
    for limit in limits:
        least, most = limit.describe(limit.least), limit.describe(limit.most)
        where, verb = (f"on {limit.name} ", "take") if limit.table else ("", "have")
        asked = f"{space.name} {where}within {limit.describe(limit.budget)}"
        lines.append(wrapped(f"{asked}: networks {verb} {least} to {most}"))
        if not limit.binds:
            lines.append(_does_not_bind(limit))
        if limit.table and limit.table.margin:
            most_ms = limit.describe(limit.limit)
            lines.append(
                wrapped(f"a margin of {limit.table.margin:.1%} is kept: predictions may be up to {most_ms}")
            )
    return "\n".join(lines)


def choice_line(ranking: Sequence[Mapping[str, Any]], solved: int) -> str:
    """Say how the first network of a ranking (`rerank.ranking_document`) was chosen from those solved for."""
    first, level = ranking[0], sum(entry["level"] for entry in ranking)
    if solved == 1:
        return f"the only network within the budget; {first['heldout_accuracy']:.1%} on held-out images"
    how = f"by held-out images ({first['heldout_accuracy']:.1%}) from the {solved} best within the budget: "
    if level == 1:
        return how + f"number {first['rank']} of them"
    return how + f"of {level} that are level the one with the most parameters, number {first['rank']} of all"


def describe_budgets(entries: Sequence[Mapping[str, Any]]) -> str:
    """Say what a network was searched for, from the `limits` of its arch.json.

    >>> describe_budgets([{"name": "vpu", "unit": "ms", "budget": 30}])
    '30.00 ms on vpu'
    """
    return " and ".join(
        f"{format_ms(entry['budget'])} on {entry['name']}"
        if entry["unit"] == "ms"
        else f"{format_count(entry['budget'])} {entry['unit']}"
        for entry in entries
    )


def _does_not_bind(limit: Limit) -> str:
    what = "slowest network" if limit.table else "largest network"
    return f"the budget does not bind: the {what} of the space is within it"


def field(name: str, text: str) -> str:
    """Write a named line of a result, wrapped at 80 columns."""
    return wrapped(text, f"{name:<12}", " " * 12)


def wrapped(text: str, first: str = "", further: str = "  ", width: int = 80) -> str:
    """Wrap text, with indents; paths and addresses stay whole, so that they can be copied.

    A number and its unit stay together too.
    """
    return fill_text(
        re.sub(r"(?<=\d) (?=(ms|s|px)\b)", "\N{NO-BREAK SPACE}", text),
        width,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\N{NO-BREAK SPACE}", " ")


def next_command(command: str) -> str:
    """Say what to type next; where that is longer than 80 columns, in lines that a shell joins."""
    lines = wrapped(command, "next        ", " " * 14, width=78).split("\n")
    return " \\\n".join(lines)


def files_in(folder: Path) -> str:
    """Say what lies in a folder."""
    return f"{folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Write accuracies as mean and standard deviation in percent."""
    spread = f" +- {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


CLASSES_SHOWN = 5  # those of least accuracy


def describe_training(learned: str, result: Mapping[str, Any], speed: Mapping[str, Any], files: str) -> str:
    """Show what a network came to: `learned` in a few words, then the facts of result.json, speed.json."""

    def interval(found: Mapping[str, float]) -> str:
        return f"{found['low']:.2%} to {found['high']:.2%}"

    sure = f"{result['interval_level']:.0%} interval {interval(result['top1'])}"
    if top := result["top5"]:
        sure += f"; top-5 {top['value']:.2%} ({interval(top)})"
    deployed = result["deployed"]
    counts = f"{format_count(deployed['macs'])} MACs, {format_count(deployed['params'])} parameters"
    latencies = ", ".join(
        f"{name} {format_ms(found['ms'], round_up=True)}" for name, found in deployed["latency"].items()
    )
    worst = sorted((row for row in result["per_class"] if row["images"]), key=lambda row: row["value"])
    rows = [
        [
            str(row["class"])[:30],
            str(row["images"]),
            f"{row['value']:.1%}",
            f"{row['low']:.1%}",
            f"{row['high']:.1%}",
        ]
        for row in worst[:CLASSES_SHOWN]
    ]
    header = ["class", "images", "accuracy", "from", "to"]
    speed_line = (
        f"{speed['images_per_second']:.0f} images/s here at {speed['resolution_px']} px: batch "
        f"{speed['batch_size']}, {speed['runtime']}, {speed['machine']}, threads {speed['threads']}"
    )
    lines = [field("accuracy", learned), field("", sure)]
    if len(worst) > 1:
        shown = min(CLASSES_SHOWN, len(worst))
        lines.append(field("classes", f"the {shown} of {len(worst)} of least accuracy; all in result.json"))
        lines += [f"{'':12}{line}" for line in table_rows(header, rows).splitlines()]
    if broken := result.get("broken_images"):
        lines.append(field("broken", f"{broken} image{'s' * (broken > 1)} left out: broken.csv"))
    lines += [
        field("size", f"{counts}, at {deployed['resolution_px']} px"),
        *([field("latency", latencies)] if latencies else []),
        field("speed", speed_line),
        field("files", files),
    ]
    return "\n".join(lines)
