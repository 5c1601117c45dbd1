"""An architecture: one candidate chosen for every position of a space.

It is a value that is passed around, never the state of a module. Its file is JSON with a schema
and the digest of its space, so that it cannot be read with another space by mistake.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from qnas.common.documents import ABSENT, Digest, Document, Name, check_content
from qnas.common.errors import ArchError, nearest, one_line
from qnas.common.reading import LINE_CHARACTERS, read_json
from qnas.spaces.space import FEWEST_CLASSES, MOST_CLASSES, SearchSpace

SCHEMA = "qnas.arch/1"
MOST_POSITIONS = 10_000


@dataclass(frozen=True)
class Arch:
    """The names of the chosen candidates, one per position, in order.

    >>> from qnas.spaces.space import load_space
    >>> space = load_space("quadranet-small")
    >>> Arch(("quadra_k3_e4",) * 4 + ("identity",) * 6).indices(space)
    (1, 1, 1, 1, 6, 6, 6, 6, 6, 6)
    """

    choices: tuple[str, ...]

    def indices(self, space: SearchSpace) -> tuple[int, ...]:
        """Return the chosen candidate's number at each position."""
        return tuple(p.names.index(c) for p, c in zip(space.positions, self.choices, strict=True))


def make_arch(space: SearchSpace, choices: tuple[str, ...], where: str = "architecture") -> Arch:
    """Check choices against a space. Raises ArchError with every problem in one line."""
    if len(choices) != len(space.positions):
        raise ArchError(
            f"{where}: {len(choices)} choices, but space {space.name} has {len(space.positions)} positions"
        )
    problems = [
        f"position {p.name}: {c!r} is not a candidate ({nearest(str(c), p.names)})"
        for p, c in zip(space.positions, choices, strict=True)
        if c not in p.names
    ]
    if problems:
        raise ArchError(f"{where}: {one_line('; '.join(problems), LINE_CHARACTERS - 10)}")
    return Arch(choices)


def arch_from_indices(space: SearchSpace, indices: tuple[int, ...]) -> Arch:
    """Return the architecture with these candidate numbers."""
    return Arch(tuple(p.names[i] for p, i in zip(space.positions, indices, strict=True)))


def sample_arch(space: SearchSpace, rng: np.random.Generator) -> Arch:
    """Draw an architecture, every candidate of a position equally likely."""
    return arch_from_indices(space, tuple(int(rng.integers(len(p.candidates))) for p in space.positions))


def only_arch(space: SearchSpace) -> Arch:
    """Return the one network of a fixed space."""
    assert space.is_fixed, space.name
    return arch_from_indices(space, (0,) * len(space.positions))


def arch_document(space: SearchSpace, arch: Arch, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of an arch.json: the architecture and facts about it."""
    return {
        "schema": SCHEMA,
        "space": space.name,
        "space_digest": space.digest,
        "classes": space.head.classes,
        "choices": list(arch.choices),
        **details,
    }


class ArchFields(Document):
    """What every arch.json has."""

    file_schema: Literal["qnas.arch/1"] = Field(alias="schema")
    space: Name
    space_digest: Digest
    classes: int = Field(ABSENT, ge=FEWEST_CLASSES, le=MOST_CLASSES)
    choices: list[Annotated[str, Field(max_length=200)]] = Field(max_length=MOST_POSITIONS)


def read_arch(path: Path, space: SearchSpace) -> Arch:
    """Read an arch.json of this space.

    Raises ArchError when the file is damaged, of another schema or of another space.
    """
    return arch_of(read_arch_document(path), space, path)


def arch_of(document: Mapping[str, Any], space: SearchSpace, path: Path) -> Arch:
    """Return the architecture of an arch.json's content. Raises ArchError if it is of another space."""
    if document["space"] != space.name or document["space_digest"] != space.digest:
        same = " (another version of it)" if document["space"] == space.name else ""
        raise ArchError(
            f"{path}: belongs to space {one_line(document['space'], 60)!r}, digest "
            f"{document['space_digest']}{same}, expected {space.name!r}, digest {space.digest}"
        )
    classes, of_space = document.get("classes"), space.head.classes
    if classes not in (None, of_space):
        raise ArchError(f"{path}: classes: {classes}, the head of its space has {of_space}")
    return make_arch(space, tuple(document["choices"]), str(path))


def read_arch_document(path: Path, model: type[ArchFields] = ArchFields) -> dict[str, Any]:
    """Read an arch.json without its space and check its form. Raises ArchError."""
    content = read_json(path, ArchError)
    check_content(model, content, str(path), ArchError)
    return content
