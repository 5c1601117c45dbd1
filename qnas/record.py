"""A finished search as its folder holds it: what was asked, what was found, and the tables it rests on.

Nothing but the folder is read, and no torch imported: a run can be explained years later, on a machine
that knows neither its device nor its data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnas.arch import ARCH_FILE, SPACE_FILE, Arch, make_arch, read_arch_document
from qnas.derive import SEARCH_FILE, Searched, read_searched
from qnas.errors import ArchError, CheckpointError
from qnas.files import read_json
from qnas.latency.table import read_table
from qnas.limits import Limit, Limits, count_limit, latency_limit
from qnas.space import SearchSpace, load_space

CONFIG_FILE = "config.json"  # of a run: what was asked


@dataclass(frozen=True)
class Record:
    """A finished search."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    document: Mapping[str, Any]  # arch.json
    found: Mapping[str, Any]  # search.json
    space: SearchSpace
    arch: Arch  # that was derived
    limits: Limits  # that it was searched within, the first a device's
    searched: Searched

    @property
    def indices(self) -> tuple[int, ...]:
        """The derived network's candidates by number."""
        return self.arch.indices(self.space)


def read_record(folder: Path, document: Mapping[str, Any] | None = None) -> Record:
    """Read a finished search; `document` is its arch.json where that is about to be written.

    Raises CheckpointError, ArchError, SpaceError or TableError where the folder holds no whole search.
    """
    if not (folder / SEARCH_FILE).is_file():
        raise CheckpointError(f"{folder}: no {SEARCH_FILE} here: not the folder of a finished search")
    document = document or read_arch_document(folder / ARCH_FILE)
    space = load_space(folder / SPACE_FILE)
    if document["space_digest"] != space.digest:
        raise ArchError(f"{folder / ARCH_FILE}: of another space than {folder / SPACE_FILE}")
    return Record(
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
    """Return what the network of an arch.json is within, with latencies from the tables beside it."""
    return tuple(_limit(folder, entry, space) for entry in document["limits"])


def _limit(folder: Path, entry: Mapping[str, Any], space: SearchSpace) -> Limit:
    name = entry["name"]
    if entry["unit"] != "ms":
        return count_limit(space, name, entry["budget"])
    table = read_table(folder / f"table-{name}.csv", space, device=name)
    # a table's file does not hold the margin that is kept on it
    table = replace(table, margin=entry["budget"] / entry["limit"] - 1)
    return replace(latency_limit(table, entry["budget"]), limit=entry["limit"])
