"""A finished search, read from its folder: its request, its results and its latency tables.

Only the folder is needed and no torch, so a run can be explained on a machine without its device and data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnas.common.errors import ArchError, CheckpointError
from qnas.common.reading import read_json
from qnas.latency.table import read_table
from qnas.runs.names import ARCH_FILE, CONFIG_FILE, SEARCH_FILE, SPACE_FILE, table_file
from qnas.solver.limits import Limit, Limits, count_limit, latency_limit
from qnas.solver.solve import Scores
from qnas.spaces.arch import Arch, make_arch, read_arch_document
from qnas.spaces.space import SearchSpace, load_space


@dataclass(frozen=True)
class Searched:
    """The scores that a finished search gave the candidates of its space."""

    log_probabilities: Scores
    effects: Scores | None  # nats that each candidate adds to the held-out loss; None: not measured
    pressed: bool  # whether the budget was binding
    screened: int  # number of networks solved for, of which some were ranked

    @property
    def scores(self) -> Scores:
        """The scores of which derivation maximises the sum."""
        if self.effects is None:
            return self.log_probabilities
        return tuple(tuple(-nats for nats in row) for row in self.effects)


def read_searched(folder: Path, space: SearchSpace) -> Searched:
    """Read the scores of a finished search.

    Raises CheckpointError if the folder has none for this space.
    """
    path = folder / SEARCH_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {SEARCH_FILE} here: not the folder of a finished search")
    content = read_json(path, CheckpointError)
    found, screened = content.get("effects"), content.get("screened")
    return Searched(
        _rows(path, content, "log_probabilities", space),
        None if found is None else _rows(path, found, "nats", space),
        pressed=content.get("budget_binds") is not False,
        screened=max(0, screened) if isinstance(screened, int) else 0,
    )


def _rows(path: Path, content: Any, name: str, space: SearchSpace) -> Scores:
    """Return the numbers in a file for each candidate of each position."""
    rows = content.get(name) if isinstance(content, dict) else None
    sizes = [len(position.candidates) for position in space.positions]
    if (
        not isinstance(rows, list)
        or [len(row) if isinstance(row, list) else -1 for row in rows] != sizes
        or not all(isinstance(value, float | int) for row in rows for value in row)
    ):
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
    known = {**config, **{f"search.{key}": value for key, value in config.get("search", {}).items()}}
    missing = [
        key for key in ("data", "data_digest", "search.resolution_px", "search.threads") if key not in known
    ]
    if missing:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: no {', '.join(missing)}: without it networks cannot be ranked on "
            "held-out images"
        )


def read_finished_run(folder: Path, document: Mapping[str, Any] | None = None) -> FinishedRun:
    """Read a finished search. `document` is its arch.json if it is not written yet.

    Raises CheckpointError, ArchError, SpaceError or TableError if the folder has no complete search.
    """
    if not (folder / SEARCH_FILE).is_file():
        raise CheckpointError(f"{folder}: no {SEARCH_FILE} here: not the folder of a finished search")
    document = document or read_arch_document(folder / ARCH_FILE)
    space = load_space(folder / SPACE_FILE)
    if document["space_digest"] != space.digest:
        raise ArchError(f"{folder / ARCH_FILE}: its space is not that of {folder / SPACE_FILE}")
    return FinishedRun(
        folder,
        read_json(folder / CONFIG_FILE, CheckpointError),
        document,
        read_json(folder / SEARCH_FILE, CheckpointError),
        space,
        make_arch(space, tuple(document["choices"]), str(folder / ARCH_FILE)),
        read_limits(folder, document, space),
        read_searched(folder, space),
    )


def read_limits(folder: Path, document: Mapping[str, Any], space: SearchSpace) -> Limits:
    """Return the limits of an arch.json, with latencies from the tables in the folder."""
    return tuple(_limit(folder, entry, space) for entry in document["limits"])


def _limit(folder: Path, entry: Mapping[str, Any], space: SearchSpace) -> Limit:
    name = entry["name"]
    if entry["unit"] != "ms":
        return count_limit(space, name, entry["budget"])
    table = read_table(folder / table_file(name), space, device=name)
    # the file of a table does not contain the margin
    table = replace(table, margin=entry["budget"] / entry["limit"] - 1)
    return replace(latency_limit(table, entry["budget"]), limit=entry["limit"])
