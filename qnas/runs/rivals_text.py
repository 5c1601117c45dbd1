"""The public networks within a budget as text."""

from collections import Counter
from collections.abc import Iterator, Sequence

from qnas.common.errors import abbreviate
from qnas.common.units import format_count, format_mj, format_ms
from qnas.latency.device import Device
from qnas.latency.rivals import DeviceLatency, Rival, Rivals
from qnas.runs.text import field, next_command, table_rows, wrapped

FRONT = "*"
# What keeps the two kinds of accuracy apart, wherever rivals are shown.
NOT_YOUR_DATA = (
    "ImageNet top-1 of published weights at that resolution, some trained on more images than ImageNet's; "
    "it says nothing of accuracies on other data"
)
_MOST_OPERATORS = 6  # named in a line


def describe_rivals(rivals: Rivals, top: int | None) -> str:
    """Format the first `top` networks as a table, the front marked, and explain their figures."""
    shown = rivals.networks[:top]
    lines = [wrapped(_title(rivals)), table_rows(*_table(rivals, shown), keys=3)]
    if len(shown) < len(rivals.networks):
        lines.append(wrapped(f"and {len(rivals.networks) - len(shown)} more: --top {len(rivals.networks)}"))
    lines += ["", field(FRONT, "no other network within the limits is as accurate and as fast")]
    lines.append(field("top-1", NOT_YOUR_DATA))
    lines.append(field("known", "the share of the latency that rests on measurements"))
    lines += [field("note", note) for note in _notes(shown)]
    lines.append(field("source", rivals.source))
    first = rivals.budgets[0].device
    device = first.aliases[0] if first.aliases else first.name
    lines.append(next_command(f"qnas predict timm:{shown[0].network.name} --device {device}"))
    return "\n".join(lines)


def _title(rivals: Rivals) -> str:
    limits = []
    for budget in rivals.budgets:
        kept = ""
        if budget.confidence is not None:
            kept = f" (upper ends of {budget.confidence:.4g} intervals)"
        elif budget.device.margin:
            kept = f" (margin kept: predictions up to {format_ms(budget.limit_ms)})"
        each = f" {budget.device.per_image}".rstrip()
        limits.append(f"{format_ms(budget.budget_ms)}{each} on {budget.device.name}{kept}")
        if budget.max_mj is not None:
            limits.append(f"{format_mj(budget.max_mj)} on {budget.device.name}")
    for most, what in ((rivals.max_params, "parameters"), (rivals.max_macs, "MACs")):
        if most is not None:
            limits.append(f"{format_count(most)} {what}")
    return f"{len(rivals.networks)} of {rivals.known} public networks are within {' and '.join(limits)}"


def _table(rivals: Rivals, shown: Sequence[Rival]) -> tuple[list[str], list[list[str]], tuple[int, ...]]:
    """Return the header, the rows and the columns to align to the left."""
    header = ["", "network", "px", "top-1"]
    for budget, latency in zip(rivals.budgets, shown[0].latencies, strict=True):
        took = "latency" if len(rivals.budgets) == 1 else budget.device.name
        header += [took, interval_header(latency), "known", *(["energy"] * budget.device.states_energy)]
    header += ["params", "MACs"]
    devices = [budget.device for budget in rivals.budgets]
    return header, [_row(rival, devices) for rival in shown], (0, 1)


def _row(rival: Rival, devices: Sequence[Device]) -> list[str]:
    network = rival.network
    cells = [FRONT if rival.on_front else "", network.name, str(network.resolution_px)]
    cells.append("-" if network.imagenet_top1 is None else f"{network.imagenet_top1:.1%}")
    for device, latency in zip(devices, rival.latencies, strict=True):
        cells += [
            format_ms(latency.latency_ms, round_up=True),
            interval_cell(latency),
            f"{latency.coverage:.0%}",
        ]
        if device.states_energy:
            mj = latency.energy_mj
            cells.append("unknown" if mj is None else format_mj(mj, round_up=True))
    return [*cells, format_count(network.params), format_count(network.macs)]


def interval_header(latency: DeviceLatency) -> str:
    """Return the header of a column of `interval_cell`: the share of networks, which is equal for all."""
    return "interval" if latency.interval is None else f"{100 * latency.interval.level:g}%, ms"


def interval_cell(latency: DeviceLatency) -> str:
    """Write the ends of an interval for a column, or that it is unknown."""
    return "unknown" if latency.interval is None else latency.interval.ends


def _notes(shown: Sequence[Rival]) -> Iterator[str]:
    """Yield how operators that latency models do not know are priced, and how many networks have them."""
    for what, names in (
        ("estimated, each priced by its multiply-adds", (name for r in shown for name in r.stand_ins)),
        ("uncovered, each priced as a pass over its map", (name for r in shown for name in r.uncovered)),
    ):
        counts = [f"{name} (in {n} of {len(shown)})" for name, n in Counter(names).items()]
        if counts:
            yield f"{what}: {abbreviate(counts, most=_MOST_OPERATORS)}"
