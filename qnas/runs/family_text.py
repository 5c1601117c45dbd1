"""The layouts of a family of spaces in words: before a search, and what became of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qnas.common.units import format_count
from qnas.runs.family import FamilyRun
from qnas.runs.network_text import describe_space, space_facts
from qnas.runs.text import field, table_rows, wrapped
from qnas.solver.layouts import Within
from qnas.spaces.family import SpaceFamily
from qnas.spaces.lower import count_macs, lower, smallest_and_largest


def family_facts(family: SpaceFamily) -> list[dict[str, Any]]:
    """Return the space at each layout of a family as JSON values, as `network_text.space_facts`."""
    return [space_facts(family.at(layout)) for layout in family.layouts()]


def describe_family(family: SpaceFamily) -> str:
    """Describe a family: the space at its largest layout, and the range of MACs at each."""
    rows = []
    for layout in family.layouts():
        space = family.at(layout)
        least, most = (count_macs(lower(space, arch)) for arch in smallest_and_largest(space))
        rows.append((space.name, f"{layout.resolution_px} px", format_count(least), format_count(most)))
    table = table_rows(("space", "input", "least MACs", "most MACs"), rows)
    return f"{describe_space(family.at(family.largest_layout))}\n\n{table}"


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
    yield field("layout", chosen_layout(run))
    yield field("", proof_text(run))
    for entry in run.document["spaces"]:
        yield field(f"  {entry['resolution_px']} px", layout_text(entry))


def chosen_layout(run: FamilyRun) -> str:
    """Say which layout was chosen, of how many."""
    return f"{run.layout.resolution_px} px, of {run.document['certificate']['layouts']} of {run.family.name}"


def proof_text(run: FamilyRun) -> str:
    """Say what the solve over the family proved."""
    certificate = run.document["certificate"]
    layouts, solved, rest = (certificate[key] for key in ("layouts", "solved", "rest_bound"))
    best = f"the {certificate['networks']} best networks by score at all layouts are proven"
    if solved == layouts or rest is None:
        return f"{best}, with {solved} of {layouts} layouts solved"
    return f"{best}, with {solved} of {layouts} layouts solved: no network of the others is above {rest:.4f}"


def layout_text(entry: Mapping[str, Any]) -> str:
    """Say what became of a layout, by its entry in a family.json."""
    if entry["trained_px"] is None:
        return "no network is within the limits"
    text = f"trained at {entry['trained_px']} px"
    if entry["best"] is None:
        return f"{text}; none of the best networks: none can score above {entry['bound']:.4f}"
    return f"{text}; {entry['networks']} of the best networks, the first with score {entry['best']:.4f}"
