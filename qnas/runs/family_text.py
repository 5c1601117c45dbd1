"""The layouts of a family of spaces in words: before a search, and what became of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qnas.runs.family import FamilyRun
from qnas.runs.text import field, wrapped
from qnas.solver.layouts import Within
from qnas.spaces.family import SpaceFamily


def describe_layouts(family: SpaceFamily, within: Sequence[Within]) -> str:
    """Format the limits of a family, and the range of the networks at each layout within them."""
    count, limits = len(family), within[0].limits
    asked = " and ".join(
        f"{limit.describe(limit.budget)}{f' on {limit.name}' if limit.table else ''}" for limit in limits
    )
    lines = [
        wrapped(
            f"{family.name} at {count} resolutions, {family.largest.head.classes} classes, within {asked}: "
            f"{len(within)} have networks within"
        )
    ]
    for each in within:
        ranges = [
            f"{limit.describe(limit.least)} to {limit.describe(limit.most)}"
            f"{f' on {limit.name}' if limit.table else ''}"
            for limit in each.limits
        ]
        lines.append(wrapped(f"{each.layout.resolution_px} px: networks take {', '.join(ranges)}", "  "))
    return "\n".join(lines)


def family_lines(run: FamilyRun) -> Iterator[str]:
    """Yield lines about the layouts of a finished search: the choice, its proof, and why others lost."""
    certificate = run.document["certificate"]
    layouts, solved = certificate["layouts"], certificate["solved"]
    yield field("layout", f"{run.layout.resolution_px} px, of {layouts} layouts of {run.family.name}")
    rest = certificate["rest_bound"]
    others = (
        "" if solved == layouts or rest is None else f"; no network of the others scores above {rest:.4f}"
    )
    networks = certificate["networks"]
    yield field("", f"the {networks} best networks of all are proven: {solved} layouts solved{others}")
    for entry in run.document["spaces"]:
        yield field(f"  {entry['resolution_px']} px", layout_text(entry))


def layout_text(entry: Mapping[str, Any]) -> str:
    """Say what became of a layout, by its entry in a family.json."""
    if entry["trained_px"] is None:
        return "no network is within the limits"
    text = f"trained at {entry['trained_px']} px"
    if entry["best"] is None:
        return f"{text}; no network among the best: none can score above {entry['bound']:.4f}"
    of = f"{entry['networks']} of the best networks, the first with score {entry['best']:.4f}"
    return f"{text}; {of}"
