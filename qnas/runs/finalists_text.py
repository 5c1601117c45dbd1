"""The finalists of a search in words: a line or a table row for each, and what they say about the effects."""

from collections.abc import Iterator, Mapping
from typing import Any

from qnas.common.units import format_ms
from qnas.latency.intervals import LEVEL
from qnas.runs.family import FamilyRun
from qnas.runs.text import field
from qnas.solver.limits import Limits
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace


def finalist_lines(
    found: Mapping[str, Any], limits: Limits, space: SearchSpace, family: FamilyRun | None = None
) -> Iterator[str]:
    """Yield lines about the `finalists` of a search.json: the choice, each network, and the corrections."""
    yield field("chosen", chosen_line(found))
    for entry in found["networks"]:
        accuracies = ", ".join(f"{share:.1%} ({epochs})" for epochs, share in by_rung(found, entry))
        problem = entry.get("problem", "")
        shown = accuracies if not problem else f"ended early: {problem}"
        yield field(
            f"finalist {entry['number']}",
            f"{blocks_text(entry)}; {latency_text(entry, limits, space, family)}; held-out {shown}",
        )
    yield field("corrected", corrections_text(found))


def chosen_line(found: Mapping[str, Any]) -> str:
    """Say how the network was chosen among the finalists."""
    count, winner = len(found["networks"]), found["networks"][found["winner"] - 1]
    accuracy = winner["heldout_accuracies"][-1]
    start = "the supernet's weights" if found["from"] == "supernet" else "scratch"
    after = f"{found['epochs']} epoch{'s' * (found['epochs'] > 1)}"
    which = f"finalist {winner['number']} of {count}, each" if count > 1 else "the only finalist,"
    px = winner.get("resolution_px", found["resolution_px"])
    return (
        f"{which} trained by itself from {start}, at {px} px; held-out accuracy {accuracy:.1%} after {after}"
    )


def by_rung(found: Mapping[str, Any], entry: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return the epochs at the end of each rung that a finalist reached, with its held-out accuracy."""
    known = entry["heldout_accuracies"]
    ends = [rung["epochs"] for rung in found["rounds"][entry["round"] - 1]["rungs"]]
    return [(epochs, known[epochs - 1]) for epochs in ends if epochs <= len(known)]


def blocks_text(entry: Mapping[str, Any]) -> str:
    """Describe a finalist by its kinds of blocks: `5 quadra, 2 mbconv`."""
    return ", ".join(f"{count} {kind}" for kind, count in entry["blocks"].items()) or "no blocks"


def latency_text(
    entry: Mapping[str, Any], limits: Limits, space: SearchSpace, family: FamilyRun | None = None
) -> str:
    """Format a finalist's latency on each device, with its interval where that is known.

    Of a family, its resolution and widths too: its limits are those of the space at its own layout.
    """
    at = ""
    if family is not None and "space" in entry:
        layout = family.layout_named(entry["space"])
        limits, at = family.limits_at(layout), f" at {family.family.label_of(layout)}"
    indices = Arch(tuple(entry["choices"])).indices(space)
    devices = [limit for limit in limits if limit.table is not None]
    parts = []
    for limit in devices:
        assert limit.table is not None
        text = format_ms(limit.latency_ms(indices), round_up=True)
        interval = limit.table.interval(indices, limit.confidence or LEVEL)
        if interval is not None:
            text += f" ({format_ms(interval.low_ms)} to {format_ms(interval.high_ms, round_up=True)})"
        parts.append(f"{text} on {limit.name}" if len(devices) > 1 else text)
    return " and ".join(parts) + at


def corrections_text(found: Mapping[str, Any]) -> str:
    """Say what the finalists' losses showed of the kinds of blocks beyond the effects."""
    explained = found["explained"]
    if explained is None:
        return "not the effects: none were measured, or there are too few finalists"
    if not found["biases"]:
        return "not the effects: no number for each kind of block predicts the finalists left out"
    words = ", ".join(f"{kind} {nats:+.3f}" for kind, nats in found["biases"].items())
    return (
        f"the effects, by what a block of each kind lowers the loss beyond its effect: {words} nats; this "
        f"explains {explained:.0%} of what the effects leave of the finalists' losses, each left out in turn"
    )
