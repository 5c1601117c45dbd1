"""An architecture read from a run's folder or an arch.json, with its space."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnas.common.errors import ArchError, QnasWarning
from qnas.runs.documents import read_arch_facts, read_result_document
from qnas.runs.names import ARCH_FILE, RESULT_FILE, SPACE_FILE, SUBNET_FOLDER
from qnas.runs.verification import check_result, recompute
from qnas.spaces.arch import Arch, arch_of, only_arch
from qnas.spaces.family import SpaceFamily, load_family
from qnas.spaces.space import SearchSpace, load_space


@dataclass(frozen=True)
class FoundArch:
    """An architecture read from a file, with its space."""

    space: SearchSpace
    arch: Arch
    document: Mapping[str, Any]
    folder: Path  # of the file
    unchecked: tuple[str, ...] = field(default=(), kw_only=True)  # why latencies could not be recomputed


def find_arch(path: Path, space: str | None = None) -> FoundArch:
    """Read the architecture of a run's folder or of an arch.json.

    Its space is the first of these: the given one (by name or path), the copy beside it, the shipped
    space of its name. Latencies, limits and sizes in the file are recomputed; a warning names a latency for
    which that is impossible. Raises ArchError, SpaceError or TableError if the file is damaged or was edited.
    """
    file = path / ARCH_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ArchError(f"{path}: no {ARCH_FILE} in this folder: not a run, or its search is not complete")
    document = read_arch_facts(file)
    beside = file.parent / SPACE_FILE
    found = load_space(space or (beside if beside.is_file() else document["space"]))
    classes = document.get("classes", found.head.classes)
    if document["space_digest"] != found.digest:  # a search has its space with the classes of its data
        found = found.with_classes(classes)
    arch = arch_of(document, found, file)
    unchecked = recompute(document, found, arch, file).unchecked
    for reason in unchecked:
        warnings.warn(reason, QnasWarning, stacklevel=2)
    return FoundArch(found, arch, document, file.parent, unchecked=unchecked)


def read_result(folder: Path, found: FoundArch) -> dict[str, Any]:
    """Return the result.json of a network's training, checked against the network.

    Raises CheckpointError if it is missing, damaged or contradicts itself or the network.
    """
    result = read_result_document(folder)
    check_result(result, found.space, found.arch, folder)
    return result


def trained_folder(folder: Path) -> Path | None:
    """Return the folder of the trained network in a run's folder or in this one; None without one."""
    places = (folder / SUBNET_FOLDER, folder)
    return next((place for place in places if (place / RESULT_FILE).is_file()), None)


def family_of_file(target: str | Path) -> SpaceFamily | None:
    """Return the family of a space's file with several layouts; None for anything else."""
    path = Path(target)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    family = load_family(path)
    return family if len(family) > 1 else None


def find_network(target: str | Path, space: str | None = None) -> tuple[SearchSpace, Arch | None]:
    """Return the space and architecture of a run, an arch.json or a space; None if the space is not fixed."""
    path = Path(target)
    if path.is_dir() or path.suffix == ".json":
        found = find_arch(path, space)
        return found.space, found.arch
    if len(path.parts) > 1 and not path.exists():
        raise ArchError(f"{target}: no such run, file or space")
    searched = load_space(target)
    return searched, only_arch(searched) if searched.is_fixed else None
