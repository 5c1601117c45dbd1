"""A search over a family of spaces, read from the folder of the finished run.

The run itself is one in the space at the chosen layout. `family.json` tells of all layouts, and `layouts/`
has their latency tables, so that the solve over the family can be repeated: `check_family_certificate`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnas.common.errors import CheckpointError
from qnas.common.reading import YAML_CHARACTERS, read_text
from qnas.runs.documents import FamilyDocument, read_document
from qnas.runs.names import FAMILY_FILE, FAMILY_SPACE_FILE, layout_folder
from qnas.runs.verification import BELOW_BOUND, read_limits
from qnas.solver.layouts import FamilyScores, FamilySolutions, solve_family
from qnas.solver.limits import Limits
from qnas.solver.solve import Scores, Solution
from qnas.spaces.arch import make_arch
from qnas.spaces.family import Layout, SpaceFamily, layout_of, parse_family
from qnas.spaces.space import SearchSpace


@dataclass(frozen=True)
class FamilyRun:
    """The family of a finished search, and what the search found of its layouts."""

    folder: Path
    family: SpaceFamily
    document: Mapping[str, Any]  # family.json
    layout: Layout  # the chosen one
    margins: Mapping[str, Any]  # the `margin` of the run's arch.json

    def entry(self, layout: Layout) -> Mapping[str, Any]:
        """Return what family.json says of a layout."""
        entries: list[Mapping[str, Any]] = self.document["spaces"]
        return next(entry for entry in entries if entry["space"] == self.family.name_of(layout))

    def layout_named(self, space: str) -> Layout:
        """Return the layout of the space of this name. Raises CheckpointError where there is none."""
        for layout in self.family.layouts():
            if self.family.name_of(layout) == space:
                return layout
        raise CheckpointError(f"{self.folder / FAMILY_FILE}: no space {space!r:.60} in {self.family.name}")

    def limits_at(self, layout: Layout) -> Limits:
        """Return the limits of the search in the space at a layout. Raises TableError as `read_limits`."""
        space = self.family.at(layout)
        document = {"limits": self.entry(layout)["limits"], **self.margins}
        return read_limits(self.folder / layout_folder(space.name), document, space)

    def scores(self, rows: Scores) -> FamilyScores:
        """Return scores over the family: those of candidates, and the numbers of resolutions and widths."""
        found: list[dict[int, float]] = [{} for _ in range(1 + len(self.family.widths))]
        for entry in self.document["numbers"]:
            found[entry["stage"]][entry["value"]] = entry["number"]
        resolutions, *widths = found
        return FamilyScores(lambda space: rows, resolutions, tuple(widths))


def read_family_run(folder: Path, space: SearchSpace, arch: Mapping[str, Any]) -> FamilyRun | None:
    """Return the family of a finished search whose space and arch.json these are; None if there is none.

    Raises CheckpointError or SpaceError where its files are damaged or contradict each other.
    """
    path, file = folder / FAMILY_FILE, folder / FAMILY_SPACE_FILE
    if not path.is_file() and not file.is_file():
        return None
    document = read_document(path, FamilyDocument)
    family = parse_family(
        read_text(file, CheckpointError, "the family", limit=4 * YAML_CHARACTERS), str(file)
    )
    layout = layout_of(space)
    names = [family.name_of(each) for each in family.layouts()]
    asked = [_asked(entry) for entry in arch["limits"]]
    facts: dict[str, tuple[Any, Any]] = {
        "family_digest": (document["family_digest"], family.digest),
        "space": (document["space"], space.name),
        "spaces": ([entry["space"] for entry in document["spaces"]], names),
        "certificate.layouts": (document["certificate"]["layouts"], len(family)),
    }
    for at, (each, entry) in enumerate(zip(family.layouts(), document["spaces"], strict=False)):
        facts[f"spaces[{at}].resolution_px"] = entry["resolution_px"], each.resolution_px
        facts[f"spaces[{at}].channels"] = entry["channels"], list(each.channels)
        facts[f"spaces[{at}].limits"] = [_asked(limit) for limit in entry["limits"]], asked
    places = [1 + len(family.widths) > entry["stage"] for entry in document["numbers"]]
    facts["numbers"] = all(places), True
    for key, (found, expected) in facts.items():
        if found != expected:
            raise _edited(path, key, found, expected)
    if layout not in family or family.at(layout).digest != space.digest:
        raise CheckpointError(f"{path}: space {space.name} of the run is none of {file}")
    return FamilyRun(folder, family, document, layout, {"margin": arch["margin"]})


def _asked(entry: Mapping[str, Any]) -> tuple[str, str, float, float]:
    """Return what a limit asks for, which is the same at all layouts."""
    return entry["name"], entry["unit"], entry["budget"], entry["limit"]


def _edited(path: Path, key: str, found: Any, expected: Any) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {found!r:.60}, expected {expected!r:.60}: edited or damaged")


def check_family_certificate(run: FamilyRun, rows: Scores, screened: int) -> None:
    """Solve over the family again, by the measured scores of the candidates.

    Raises CheckpointError unless the certificate's score, rank and bounds come out, and those of each layout,
    and the amounts and scores of the ranked networks. ArchError where one of these is not of the space.
    """
    certificate, path, family = run.document["certificate"], run.folder / FAMILY_FILE, run.family
    layouts = {family.name_of(layout): layout for layout in family.layouts()}
    limits = {name: run.limits_at(layout) for name, layout in layouts.items()}
    scores = run.scores(rows)
    found = solve_family(family, scores, lambda space: limits[space.name], screened)
    slack = BELOW_BOUND * math.fsum(max(row) - min(row) for row in rows) + 1e-9
    figures: dict[str, tuple[Any, float | None]] = {
        "certificate.score_bound": (certificate["score_bound"], found.bound),
        "certificate.rest_bound": (certificate["rest_bound"], found.rest_bound),
        "certificate.networks": (certificate["networks"], len(found.networks)),
    }
    if certificate["rank"] is not None:
        of_rank = found.networks[: certificate["rank"]][-1]
        figures["certificate.score"] = certificate["score"], of_rank.score
        figures["certificate.rank"] = certificate["rank"], of_rank.rank
    for at, verdict in enumerate(found.verdicts):
        entry = run.entry(verdict.layout)
        figures[f"spaces[{at}].number"] = entry["number"], scores.constant(verdict.layout)
        if entry["trained_px"] is None:  # no network within all limits at once, whatever a bound says
            continue
        figures[f"spaces[{at}].bound"] = entry["bound"], verdict.bound
        figures[f"spaces[{at}].best"] = entry["best"], verdict.best
    for at, entry in enumerate(run.document["ranking"]):
        where = f"ranking[{at}]"
        space = family.at(run.layout_named(entry["space"]))
        indices = make_arch(space, tuple(entry["choices"]), f"{path}: {where}").indices(space)
        figures[f"{where}.score"] = (
            entry["score"],
            math.fsum(row[i] for row, i in zip(rows, indices, strict=True)),
        )
        for number, limit in enumerate(limits[entry["space"]]):
            amounts = entry["amounts"]
            amount = amounts[number] if number < len(amounts) else None
            figures[f"{where}.amounts[{number}]"] = amount, limit.amount(indices)
    for key, (value, other) in figures.items():
        finite = None if other is not None and math.isinf(other) else other
        if value is None or finite is None:
            if value is not finite:
                raise _edited(path, key, value, finite)
        elif not math.isclose(value, finite, rel_tol=BELOW_BOUND, abs_tol=slack):
            raise CheckpointError(
                f"{path}: {key} is {value}, but {finite} when solved again: edited or damaged"
            )


def solved_text(found: FamilySolutions) -> str:
    """Say how many layouts a solve needed: `2 of 4 layouts`."""
    return f"{found.solved} of {found.layouts} layouts"


def solved_document(
    family: SpaceFamily, found: FamilySolutions, layout: Layout, solution: Solution
) -> dict[str, Any]:
    """Return what an arch.json says of the solve over a family that its network is from."""
    (own,) = (e for e in found.networks if e.layout == layout and e.solution.indices == solution.indices)
    return {
        "name": family.name,
        "digest": family.digest,
        "score": own.score,
        "rank": own.rank,
        "score_bound": found.bound,
        "networks": len(found.networks),
        "layouts": found.layouts,
        "solved": found.solved,
        "rest_bound": found.rest_bound if math.isfinite(found.rest_bound) else None,
    }
