"""The files of a search over a family: what was chosen among its layouts, and how the others compare.

The run's other files are those of a search in the space at the chosen layout, so that whatever reads a run
reads this one. Beside them are `family.yaml`, `family.json`, and the latency tables of all layouts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnas.common.files import write_json, write_text
from qnas.latency.table import table_text
from qnas.runs import names
from qnas.search.family_selection import FamilySelection
from qnas.search.selection import Ranked, ranking_document
from qnas.search.state import SearchState
from qnas.solver.layouts import SOLVER
from qnas.solver.limits import Limits
from qnas.solver.solve import limit_entry
from qnas.spaces.family import Layout
from qnas.spaces.space import SearchSpace

SCHEMA = "qnas.family/1"


def write_family(
    state: SearchState, selection: FamilySelection, layout: Layout, winner: Ranked, folder: Path
) -> None:
    """Write what a search over a family found: of all layouts, and as the space of the chosen one."""
    own = state.problem.at(layout)
    write_space(own.space, own.limits, folder)
    family = state.problem.family
    assert family is not None
    limits = {each.layout: each.limits for each in family.within}
    limits |= {
        layout: family.limits_of(family.family.at(layout))
        for layout in family.family.layouts()
        if layout not in limits
    }
    for each, of_layout in limits.items():
        write_tables(
            family.family.at(each), of_layout, folder / names.layout_folder(family.family.name_of(each))
        )
    write_json(folder / names.FAMILY_FILE, _document(state, selection, layout, winner, limits))


def write_space(space: SearchSpace, limits: Limits, folder: Path) -> None:
    """Write the space of a run, and its tables."""
    write_text(folder / names.SPACE_FILE, space.to_yaml())
    write_tables(space, limits, folder)


def write_tables(space: SearchSpace, limits: Limits, folder: Path) -> None:
    """Write the latency tables of a space."""
    for limit in limits:
        if limit.table is not None:
            write_text(folder / names.table_file(limit.table.device), table_text(limit.table, space))


def _document(
    state: SearchState,
    selection: FamilySelection,
    layout: Layout,
    winner: Ranked,
    limits: Mapping[Layout, Limits],
) -> dict[str, Any]:
    """Return the content of family.json."""
    problem, found, scores = state.problem, selection.found, selection.scores
    assert problem.family is not None
    family = problem.family.family
    rows = scores.candidates(problem.space)
    score = scores.constant(layout) + sum(
        row[i] for row, i in zip(rows, winner.solution.indices, strict=True)
    )
    ranks = {(each.layout, each.solution.indices): each.rank for each in found.networks}
    trained = {each.layout: each.trained_px for each in problem.layouts}
    verdicts = {verdict.layout: verdict for verdict in found.verdicts}
    spaces = []
    for each in family.layouts():
        space, verdict = family.at(each), verdicts[each]
        spaces.append(
            {
                "space": space.name,
                "space_digest": space.digest,
                "resolution_px": each.resolution_px,
                "channels": list(each.channels),
                "trained_px": trained.get(each),
                "number": scores.constant(each),
                "bound": verdict.bound if each in trained else None,
                "best": verdict.best,
                "networks": verdict.networks,
                "solved": verdict.solved,
                "limits": [limit_entry(limit, _least(limit.cells)) for limit in limits[each]],
            }
        )
    return {
        "schema": SCHEMA,
        "family": family.name,
        "family_digest": family.digest,
        "space": family.name_of(layout),
        "certificate": {
            "solver": SOLVER,
            "score": score,
            "rank": ranks.get((layout, winner.solution.indices)),
            "score_bound": found.bound,
            "networks": len(found.networks),
            "layouts": found.layouts,
            "solved": found.solved,
            "rest_bound": found.rest_bound if found.rest_bound > float("-inf") else None,
        },
        # what resolutions (stage 0) and widths (stages from 1) add to the scores of networks
        "numbers": [
            {"stage": stage, "value": value, "number": number}
            for stage, row in enumerate((scores.resolutions, *scores.widths))
            for value, number in row.items()
        ],
        "spaces": spaces,
        "ranking": [
            {"space": family.name_of(each.layout), **ranking_document([each.ranked])[0]}
            for each in selection.ranking
        ],
    }


def _least(cells: tuple[tuple[float, ...], ...]) -> tuple[int, ...]:
    """Return the network of the smallest amount."""
    return tuple(row.index(min(row)) for row in cells)
