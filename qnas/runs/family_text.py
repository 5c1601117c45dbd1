"""The layouts of a family of spaces in words: before a search, and what became of them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from qnas.common.units import format_count
from qnas.runs.family import FamilyRun
from qnas.runs.network_text import describe_space, space_facts
from qnas.runs.text import field, table_rows, wrapped
from qnas.solver.layouts import Within
from qnas.solver.limits import Limits
from qnas.spaces.family import Layout, SpaceFamily
from qnas.spaces.lower import count_macs, lower, smallest_and_largest

SHOWN = 16  # layouts that are listed whatever became of them


def family_facts(family: SpaceFamily) -> list[dict[str, Any]]:
    """Return the space at each layout of a family as JSON values, as `network_text.space_facts`."""
    return [space_facts(family.at(layout)) for layout in family.layouts()]


def describe_family(family: SpaceFamily) -> str:
    """Describe a family: the space at its largest layout, its widths, and the range of MACs by resolution."""
    rows = []
    for px in family.resolutions_px:
        ends = (family.at(Layout(px, tuple(map(end, family.widths)))) for end in (min, max))
        narrow, wide = ((space, smallest_and_largest(space)) for space in ends)
        least = count_macs(lower(narrow[0], narrow[1][0]))
        most = count_macs(lower(wide[0], wide[1][1]))
        name = () if family.has_widths else (wide[0].name,)
        rows.append((*name, f"{px} px", format_count(least), format_count(most)))
    titles = ("input",) if family.has_widths else ("space", "input")
    parts = [describe_space(family.at(family.largest_layout))]
    if family.has_widths:
        widths = (
            f"{s}: {', '.join(map(str, row))}" for s, row in enumerate(family.widths, 1) if len(row) > 1
        )
        parts.append(wrapped(f"{len(family)} layouts; channels of stage {'; of '.join(widths)}"))
    return "\n\n".join([*parts, table_rows((*titles, "least MACs", "most MACs"), rows)])


def describe_layouts(family: SpaceFamily, within: Sequence[Within]) -> str:
    """Format the limits of a family, and the range of the networks at each resolution within them."""
    count, limits = len(family), within[0].limits
    asked = " and ".join(
        f"{limit.describe(limit.budget)}{f' on {limit.name}' if limit.table else ''}" for limit in limits
    )
    lines = [
        wrapped(
            f"{family.name} at {count} {'layouts' if family.has_widths else 'resolutions'}, "
            f"{family.largest.head.classes} classes, within {asked}: {len(within)} have networks within"
        )
    ]
    by_px = groupby(within, key=lambda each: each.layout.resolution_px)
    for px, own in by_px:
        of_px = [each.limits for each in own]
        ranges = [_range_of(same) for same in zip(*of_px, strict=True)]
        widths = f", {len(of_px)} choices of widths" if family.has_widths else ""
        lines.append(wrapped(f"{px} px{widths}: networks take {', '.join(ranges)}", "  "))
    return "\n".join(lines)


def _range_of(same: Limits) -> str:
    """Return the range of the networks of several layouts in what one limit limits."""
    least, most = min(limit.least for limit in same), max(limit.most for limit in same)
    on = f" on {same[0].name}" if same[0].table is not None else ""
    return f"{same[0].describe(least)} to {same[0].describe(most)}{on}"


def family_lines(run: FamilyRun) -> Iterator[str]:
    """Yield lines about the layouts of a finished search: the choice, its proof, and why others lost."""
    yield field("layout", chosen_layout(run))
    yield field("", proof_text(run))
    shown = shown_layouts(run)
    for at in shown:
        entry = run.document["spaces"][at]
        label, text = label_of(run, entry), layout_text(entry)
        # with its widths, a layout is too long for the column of names
        yield field("", f"{label}: {text}") if run.family.has_widths else field(f"  {label}", text)
    if rest := len(run.document["spaces"]) - len(shown):
        yield field("", f"{rest} other layouts have none of the best networks (family.json)")


def shown_layouts(run: FamilyRun) -> list[int]:
    """Return the places in family.json of the layouts to show: of many, those of the best networks."""
    entries = run.document["spaces"]
    if len(entries) <= SHOWN:
        return list(range(len(entries)))
    chosen = run.family.name_of(run.layout)
    return [at for at, entry in enumerate(entries) if entry["networks"] or entry["space"] == chosen]


def label_of(run: FamilyRun, entry: Mapping[str, Any]) -> str:
    """Return a layout's entry in words: its resolution, and its widths where there is a choice."""
    return run.family.label_of(Layout(entry["resolution_px"], tuple(entry["channels"])))


def chosen_layout(run: FamilyRun) -> str:
    """Say which layout was chosen, of how many."""
    count = run.document["certificate"]["layouts"]
    return f"{run.family.label_of(run.layout)}, of {count} of {run.family.name}"


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
