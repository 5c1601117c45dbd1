"""Latencies, prediction errors and limits as text, as wide as the output, and as JSON values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qnas.common.errors import abbreviate
from qnas.common.units import format_count, format_mj, format_ms, format_per_image, format_rate
from qnas.latency.device import Figures, load_device
from qnas.latency.intervals import describe_interval
from qnas.latency.prediction import (
    ENOUGH_MEASURED,
    Part,
    Prediction,
    arch_parts,
    estimated_ms,
    source_note,
)
from qnas.runs.text import ROOMY, columns, field, table_rows, wrapped
from qnas.solver.limits import ENERGY, ENERGY_UNIT, Limits
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace


def describe_predictions(predictions: Sequence[Prediction], dearest: int) -> str:
    """Format the latency on each device, then the slowest layers on each device."""
    rows, metered = [], any(p.energy_mj is not None for p in predictions)
    for p in predictions:
        with_norm = format_ms(p.batchnorm_ms) if p.batchnorm_ms is not None else "-"
        took = format_ms(p.latency_ms)
        if p.per_image:
            took += f" ({format_rate(p.latency_ms)})"
        energy = [] if not metered else ["-" if p.energy_mj is None else format_mj(p.energy_mj)]
        interval = describe_interval(p.interval)
        rows.append((p.device, took, interval, *energy, f"{p.coverage:.0%}", with_norm))
    heads = ("device", "latency", "interval", *(["energy"] * metered), "from measurements", "with batch norm")
    lines = [table_rows(heads, rows)]
    for p in predictions:
        lines += ["", f"{p.device}: the slowest layers{f', in ms {p.per_image}' if p.per_image else ''}"]
        for layer in p.layers[:dearest]:
            share = f"{layer.latency_ms / p.latency_ms:>4.0%}"
            begin = f"  {share} {format_ms(layer.latency_ms):>10}  {len(layer.where):>3} x "
            indent = len(begin) if columns() >= ROOMY else 8
            lines.append(wrapped(f"{begin}{layer.what}  ({layer.kind})", "", " " * indent))
        if p.note:
            lines.append(field("  note", p.note))
        if p.coverage < ENOUGH_MEASURED:
            lines.append(field("  warning", few_measured(p.device, p.coverage, p.parts, p.latency_ms)))
    return "\n".join(lines)


def few_measured(device: str, coverage: float, parts: Iterable[Part], latency_ms: float) -> str:
    """Say that too little of a latency rests on measured kernels, and which kernels are estimates."""
    shares = [f"{kind} ({ms / latency_ms:.0%})" for kind, ms in estimated_ms(parts).items()]
    return (
        f"{coverage:.0%} of the latency on {device} rests on measured kernels, less than "
        f"{ENOUGH_MEASURED:.0%}; estimates: {abbreviate(shares)}"
    )


def figures_facts(figures: Figures) -> dict[str, float | int | None]:
    """Return figures as JSON values, with shares and errors as fractions of 1."""
    # rounded, since the division adds digits to a rounded percentage
    fractions = {
        name: round(getattr(figures, f"{name}_pct") / 100, 6)
        for name in ("rmspe", "within_5", "within_10", "bias")
    }
    return {"n": figures.n, **fractions, "spearman": figures.spearman}


def describe_figures(by_group: Mapping[str, Figures]) -> str:
    """Format how predictions compare with measurements, one line per group, with all groups last."""
    rows = []
    for name in (*(name for name in by_group if name != "all"), "all"):
        f = by_group[name]
        percents = [f"{share:.1f}%" for share in (f.rmspe_pct, f.within_5_pct, f.within_10_pct)]
        spearman = "-" if f.spearman is None else f"{f.spearman:.3f}"
        rows.append((name, str(f.n), *percents, f"{f.bias_pct:+.1f}%", spearman))
    return table_rows(("family", "n", "RMSPE", "within 5%", "within 10%", "bias", "Spearman"), rows)


def latency_lines(
    limits: Limits, space: SearchSpace, arch: Arch, latency: str, devices: Iterable[str]
) -> Iterator[str]:
    """Yield lines with a network's latency on each device and, where known, the source of the prediction."""
    tables = [(limit, limit.table) for limit in limits if limit.table is not None]
    indices = arch.indices(space)
    for i, ((limit, table), name) in enumerate(zip(tables, devices, strict=True)):
        latency_ms, budget_ms = table.latency_ms(indices), limit.budget
        where = f"{table.device} at {space.input.resolution_px} px"
        where += f", batch {load_device(name).batch}" if limit.throughput else ""
        took = f"{limit.describe(latency_ms, round_up=True)} of {limit.describe(budget_ms)} on {where}"
        margin = f"{table.margin:.1%} of margin kept; " if table.margin else ""
        source = f"{table.coverage(indices):.0%} from measurements"
        yield field("" if i else "latency", f"{took} ({latency_ms / budget_ms:.1%}); {margin}{source}")
        interval = describe_interval(limit.interval(indices))
        kept = "; its upper end stays within the budget" if limit.confidence else ""
        yield field("", f"interval {interval}{kept}")
        if note := source_note(latency, load_device(name), space, arch):
            yield field("", note)


def measured_lines(
    limits: Limits, space: SearchSpace, arch: Arch, latency: str, devices: Iterable[str]
) -> Iterator[str]:
    """Yield a warning for each device on which too little of a network's latency rests on measurements."""
    tables, indices = [limit.table for limit in limits if limit.table is not None], arch.indices(space)
    for table, name in zip(tables, devices, strict=True):
        if (coverage := table.coverage(indices)) < ENOUGH_MEASURED:
            parts = arch_parts(latency, load_device(name), table, space, arch)
            yield field("warning", few_measured(table.device, coverage, parts, table.latency_ms(indices)))


def energy_lines(limits: Limits, indices: Sequence[int]) -> Iterator[str]:
    """Yield a line with a network's energy on each device where it is limited."""
    for limit in (each for each in limits if each.energy_of):
        amount = limit.amount(indices)
        took = f"{format_mj(amount, round_up=True)} of {limit.describe(limit.budget)}"
        yield field("energy", f"{took} ({amount / limit.budget:.1%}), by the device's file")


def describe_limits(space: SearchSpace, limits: Limits) -> str:
    """Format the limits of a space, the range of its networks, and warnings about budgets."""
    lines, px, classes = [], space.input.resolution_px, f"{space.head.classes} classes"
    for limit in limits:
        least, most = limit.describe(limit.least), limit.describe(limit.most)
        where = f"on {limit.name} " if limit.table else ""
        verb = "take" if limit.table or limit.energy_of else "have"
        if limit.confidence:
            verb = f"have {limit.confidence:.4g} intervals that end at"
        asked = f"{space.name} {where}at {px} px, {classes}, within {limit.describe(limit.budget)}"
        lines.append(wrapped(f"{asked}: networks {verb} {least} to {most}"))
        if not limit.binds:
            what = "slowest network" if limit.table else "largest network"
            lines.append(wrapped(f"the budget does not bind: the {what} of the space is within it"))
        if (origin := limit.table.origin if limit.table else None) and origin.file_precision != "fp32":
            of_files = f"the latencies on {limit.name} are of files in {origin.file_precision}"
            lines.append(wrapped(f"{of_files}: training is in float, and qnas export checks such a file"))
        if limit.table and limit.table.margin:
            most_ms = limit.describe(limit.limit)
            lines.append(
                wrapped(f"a margin of {limit.table.margin:.1%} is kept: predictions may be up to {most_ms}")
            )
    return "\n".join(lines)


def describe_budgets(entries: Sequence[Mapping[str, Any]]) -> str:
    """Format the budgets of a network from the `limits` of its arch.json.

    >>> describe_budgets([{"name": "vpu", "unit": "ms", "budget": 30}])
    '30.00 ms on vpu'
    """
    return " and ".join(map(_describe_budget, entries))


def _describe_budget(entry: Mapping[str, Any]) -> str:
    if entry["unit"] == "ms":
        is_rate = entry.get("quantity") == "throughput"
        return f"{(format_per_image if is_rate else format_ms)(entry['budget'])} on {entry['name']}"
    if entry["unit"] == ENERGY_UNIT:
        return f"{format_mj(entry['budget'])} on {entry['name'].removeprefix(f'{ENERGY}-')}"
    return f"{format_count(entry['budget'])} {entry['unit']}"
