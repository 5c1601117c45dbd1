"""A finished search, read from its folder: its request, its results and its latency tables.

Only the folder is needed and no torch, so a run can be explained on a machine without its device and data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnas.common.errors import ArchError, CheckpointError
from qnas.runs.documents import check_solved, read_arch_facts, read_search_document
from qnas.runs.family import FamilyRun, read_family_run
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import ARCH_FILE, CONFIG_FILE, SEARCH_FILE, SPACE_FILE
from qnas.runs.verification import (
    check_certificate,
    check_finalists,
    check_request,
    check_search,
    read_limits,
    recompute,
)
from qnas.solver.kinds import corrected, kinds_of
from qnas.solver.limits import Limits
from qnas.solver.solve import Scores
from qnas.spaces.arch import Arch, arch_of
from qnas.spaces.space import SearchSpace, load_space

MOST_SOLVED = 2_000  # networks of a derivation for which its certificate is solved again


@dataclass(frozen=True)
class Searched:
    """The scores that a finished search gave the candidates of its space."""

    log_probabilities: Scores
    effects: Scores | None  # nats that each candidate adds to the held-out loss; None: not measured
    pressed: bool  # whether the budget was binding
    screened: int  # number of networks solved for, of which some were ranked
    # the scores of each round of finalists, of the one whose network was chosen, and as they are corrected
    # after the last one; without finalists all are the measured ones
    by_round: tuple[Scores, ...] = ()
    certified_round: int = 1
    after: Scores | None = None

    @property
    def measured(self) -> Scores:
        """The scores that the search measured, by which networks were ranked."""
        if self.effects is None:
            return self.log_probabilities
        return tuple(tuple(-nats for nats in row) for row in self.effects)

    @property
    def scores(self) -> Scores:
        """The scores of which derivation maximises the sum."""
        return self.measured if self.after is None else self.after

    @property
    def certified(self) -> Scores:
        """The scores that the search's own network was solved for, of which its certificate speaks."""
        return self.by_round[self.certified_round - 1] if self.by_round else self.measured

    def correction(self, network: Sequence[int]) -> float:
        """Return by how many nats finalists showed a network's loss to be lower than by its effects."""
        rows = zip(self.scores, self.measured, network, strict=True)
        return math.fsum(after[i] - before[i] for after, before, i in rows)


def read_searched(folder: Path, space: SearchSpace) -> Searched:
    """Read the scores of a finished search.

    Raises CheckpointError if the folder has none for this space.
    """
    return _searched(read_search_document(folder), space, folder / SEARCH_FILE)


def _searched(found: Mapping[str, Any], space: SearchSpace, path: Path) -> Searched:
    """Return the scores of a search.json. Raises CheckpointError if they are not for this space."""
    effects = found["effects"]
    log_probabilities = _rows(path, found["log_probabilities"], "log_probabilities", space)
    for position, row in zip(space.positions, log_probabilities, strict=True):
        if not math.isclose(math.fsum(map(math.exp, row)), 1.0, abs_tol=1e-3):  # they were float32
            raise CheckpointError(
                f"{path}: log_probabilities: those of position {position.name} do not add up to 1"
            )
    searched = Searched(
        log_probabilities,
        None if effects is None else _rows(path, effects["nats"], "effects.nats", space),
        pressed=found["budget_binds"],
        screened=found["screened"],
    )
    finalists = found.get("finalists")
    if finalists is None:
        return searched
    kinds = kinds_of(space)
    return replace(
        searched,
        by_round=tuple(corrected(searched.measured, kinds, each["biases"]) for each in finalists["rounds"]),
        certified_round=finalists["networks"][finalists["winner"] - 1]["round"],
        after=corrected(searched.measured, kinds, finalists["biases"]),
    )


def _rows(path: Path, rows: Sequence[Sequence[float]], name: str, space: SearchSpace) -> Scores:
    """Return the numbers in a file for each candidate of each position."""
    if [len(row) for row in rows] != [len(position.candidates) for position in space.positions]:
        raise CheckpointError(f"{path}: no {name} for each candidate of space {space.name}: search again")
    return tuple(tuple(map(float, row)) for row in rows)


@dataclass(frozen=True)
class FinishedRun:
    """A finished search and the contents of its folder."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    document: Mapping[str, Any]  # arch.json
    found: Mapping[str, Any]  # search.json
    space: SearchSpace
    arch: Arch  # the derived architecture
    limits: Limits  # limits of the search, the first one a device's
    searched: Searched
    family: FamilyRun | None = None  # that the space was chosen from

    @property
    def indices(self) -> tuple[int, ...]:
        """The indices of the derived network's candidates."""
        return self.arch.indices(self.space)


def asked_devices(run: FinishedRun) -> list[str]:
    """Return the requested devices, by name or path; those of arch.json if no request is recorded."""
    asked = [entry["device"] for entry in run.config.get("limits", ()) if "device" in entry]
    return asked or [limit.name for limit in run.limits if limit.table is not None]


def check_rankable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a run's config.json lacks an entry that a ranking on images needs."""
    searched = config.get("search", {})
    known = {**config, **{f"search.{key}": value for key, value in searched.items()}}
    needed = ("data", "data_digest", "search.resolution_px", "search.threads")
    missing = [key for key in needed if key not in known]
    if missing:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: no {', '.join(missing)}: without it networks cannot be ranked on "
            "held-out images"
        )


def verify_certificate(found: FoundArch) -> None:
    """Solve again for the certificate of a search's or a derivation's network, if its search is near.

    Raises ArchError if another score, rank or bound comes out. Without the search, there are no scores to
    solve for.
    """
    document, path = found.document, found.folder / ARCH_FILE
    if "certificate" not in document or found.unchecked:
        return
    supernet = str(document.get("supernet", ""))
    places = [found.folder, found.folder.parent]  # the latter of a training in its run
    places += [(place / supernet).parent for place in places if supernet]
    run = next((place for place in places if (place / SEARCH_FILE).is_file()), None)
    if run is None:
        return
    limits = recompute(document, found.space, found.arch, path).limits
    searched = read_searched(run, found.space)
    asked = min(document["certificate"]["solved"], MOST_SOLVED) if supernet else 0
    most = max(searched.screened, asked)
    scores = searched.scores if supernet else searched.certified  # a derivation's, or the search's own
    check_certificate(document, found.space, found.arch, limits, scores, most, path)


def read_finished_run(folder: Path, document: Mapping[str, Any] | None = None) -> FinishedRun:
    """Read a finished search. `document` is its arch.json if it is not written yet.

    Its facts are recomputed (`runs.verification`), but for the certificate, which `explain` solves for again.
    Raises CheckpointError, ArchError, SpaceError or TableError if the folder has no complete search, or files
    that contradict each other.
    """
    found = read_search_document(folder)
    path = folder / ARCH_FILE
    document = document or read_arch_facts(path)
    check_solved(document, folder)
    space = load_space(folder / SPACE_FILE)
    if document["space_digest"] != space.digest:
        raise ArchError(f"{path}: its space is not that of {folder / SPACE_FILE}")
    config, arch = read_config(folder), arch_of(document, space, path)
    limits = read_limits(folder, document, space)
    recompute(document, space, arch, path)
    searched = _searched(found, space, folder / SEARCH_FILE)
    check_request(config, document, folder)
    check_search(found, document, space, limits, searched.measured, searched.log_probabilities, folder)
    family = read_family_run(folder, space, document)
    if "finalists" in found or "finalist" in document:

        def limits_of(name: str) -> Limits:
            return limits if family is None else family.limits_at(family.layout_named(name))

        check_finalists(found, document, space, limits, searched.by_round, folder, limits_of)
    return FinishedRun(folder, config, document, found, space, arch, limits, searched, family)
