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
        """Return scores over the family: those of candidates, and the recorded number of each resolution."""
        numbers = {entry["resolution_px"]: entry["number"] for entry in self.document["spaces"]}
        return FamilyScores(lambda space: rows, numbers)


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
    for key, found, expected in (
        ("family_digest", document["family_digest"], family.digest),
        ("space", document["space"], space.name),
        ("spaces", [entry["space"] for entry in document["spaces"]], names),
        ("certificate.layouts", document["certificate"]["layouts"], len(family)),
    ):
        if found != expected:
            raise CheckpointError(
                f"{path}: {key} is {found!r:.60}, expected {expected!r:.60}: edited or damaged"
            )
    if layout not in family or family.at(layout).digest != space.digest:
        raise CheckpointError(f"{path}: space {space.name} of the run is none of {file}")
    return FamilyRun(folder, family, document, layout, {"margin": arch["margin"]})


def check_family_certificate(run: FamilyRun, rows: Scores, screened: int) -> None:
    """Solve over the family again, by the measured scores of the candidates.

    Raises CheckpointError unless the certificate's score, rank and bounds come out.
    """
    certificate, path = run.document["certificate"], run.folder / FAMILY_FILE
    layouts = {run.family.name_of(layout): layout for layout in run.family.layouts()}
    found = solve_family(
        run.family, run.scores(rows), lambda space: run.limits_at(layouts[space.name]), screened
    )
    slack = BELOW_BOUND * math.fsum(max(row) - min(row) for row in rows) + 1e-9
    rest = certificate["rest_bound"]
    figures = {
        "score_bound": (certificate["score_bound"], found.bound),
        "rest_bound": (-math.inf if rest is None else rest, found.rest_bound),
    }
    for key, (value, other) in figures.items():
        if value != other and abs(value - other) > slack:
            raise CheckpointError(
                f"{path}: certificate.{key} is {value}, but {other} when solved again: edited or damaged"
            )
    rank = certificate["rank"]
    if rank is not None:
        if rank > len(found.networks):
            raise CheckpointError(f"{path}: certificate.rank is {rank} of {len(found.networks)} networks")
        score = found.networks[rank - 1].score
        if abs(score - certificate["score"]) > slack:
            raise CheckpointError(
                f"{path}: certificate.score is {certificate['score']}, but network {rank} of the family has "
                f"{score} when solved again: edited or damaged"
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
