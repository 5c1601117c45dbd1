"""A family of search spaces: one at each of its layouts, which fix what latencies depend on besides blocks.

A layout is an input resolution and a width for each stage. The space at a layout is a SearchSpace as any
other, with its own name, digest, tables and limits; the solver says which layout is best (`solver.layouts`).
In a file, `input.resolution_px: [128, 160, 192, 224]` makes a family; a file without lists is a family of
one space.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from qnas.common.arguments import check_arguments
from qnas.common.documents import read_mapping
from qnas.common.errors import SpaceError, one_line
from qnas.common.resources import read_named
from qnas.spaces.lower import check_resolution
from qnas.spaces.space import SCHEMA, SearchSpace, check_space, load_at_resolution

MOST_OF_A_CHOICE = 32  # values of a resolution, or of the width of a stage
NAME_CHARACTERS = 100  # of a space's name


@dataclass(frozen=True, order=True)
class Layout:
    """An input resolution, and the channels of each stage."""

    resolution_px: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class SpaceFamily:
    """The spaces at all layouts of these resolutions and widths.

    >>> from qnas.spaces.space import load_space
    >>> family = make_family(load_space("quadranet-small"), [32, 24])
    >>> len(family), [family.at(layout).name for layout in family.layouts()]
    (2, ['quadranet-small-24px', 'quadranet-small-32px'])
    """

    largest: SearchSpace  # at the largest layout, under the name of the family
    resolutions_px: tuple[int, ...]  # rising
    widths: tuple[tuple[int, ...], ...]  # of each stage, rising

    def __post_init__(self) -> None:
        choices = [self.resolutions_px, *self.widths]
        assert all(tuple(sorted(set(row))) == row and row for row in choices), choices
        assert self.largest_layout == layout_of(self.largest), self.largest_layout

    def __len__(self) -> int:
        return len(self.resolutions_px) * math.prod(map(len, self.widths))

    @property
    def name(self) -> str:
        """The name of the file, which those of the spaces begin with."""
        return self.largest.name

    @property
    def largest_layout(self) -> Layout:
        """The layout of the highest resolution and the greatest widths."""
        return Layout(max(self.resolutions_px), tuple(map(max, self.widths)))

    def layouts(self) -> Iterator[Layout]:
        """Yield all layouts, by rising resolution, then widths."""
        for px, *channels in product(self.resolutions_px, *self.widths):
            yield Layout(px, tuple(channels))

    def __contains__(self, layout: Layout) -> bool:
        return (
            layout.resolution_px in self.resolutions_px
            and len(layout.channels) == len(self.widths)
            and all(c in row for c, row in zip(layout.channels, self.widths, strict=True))
        )

    def covering(self) -> Iterator[Layout]:
        """Yield layouts in which every pair of widths of neighbouring stages occurs, at each resolution.

        With at most n widths a stage, these are n * n a resolution: the widths numbered i + s * j of stage s,
        for all i and j below n, take every pair of values in neighbouring stages.
        """
        n = max(map(len, self.widths))
        rows = {
            tuple(row[(i + s * j) % n % len(row)] for s, row in enumerate(self.widths))
            for i, j in product(range(n), repeat=2)
        }
        for px, channels in product(self.resolutions_px, sorted(rows)):
            yield Layout(px, channels)

    def name_of(self, layout: Layout) -> str:
        """Return the name of the space at a layout: `union-mobile-160px`, with the widths that differ."""
        assert layout in self, layout
        parts = [self.name, f"{layout.resolution_px}px"] if len(self.resolutions_px) > 1 else [self.name]
        chosen = [c for c, row in zip(layout.channels, self.widths, strict=True) if len(row) > 1]
        parts += ["-".join(["c", *map(str, chosen)])] if chosen else []
        name = "-".join(parts)
        if len(name) <= NAME_CHARACTERS:
            return name
        code = hashlib.sha256(name.encode()).hexdigest()[:16]
        return f"{name[: NAME_CHARACTERS - 17]}-{code}"

    def at(self, layout: Layout) -> SearchSpace:
        """Return the space at a layout."""
        content = self.largest.written()
        content["name"] = self.name_of(layout)
        content["input"]["resolution_px"] = layout.resolution_px
        for stage, channels in zip(content["stages"], layout.channels, strict=True):
            stage["channels"] = channels
        return SearchSpace.model_validate(content)

    def with_classes(self, classes: int) -> "SpaceFamily":
        """Return the same family for another number of classes."""
        return replace(self, largest=self.largest.with_classes(classes))

    @cached_property
    def digest(self) -> str:
        """The identity of the family's spaces."""
        content = [self.largest.digest, self.resolutions_px, self.widths]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Return the family as text that `parse_family` reads back to an equal value."""
        content = self.largest.written()
        content["input"]["resolution_px"] = list(self.resolutions_px)
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def layout_of(space: SearchSpace) -> Layout:
    """Return the layout of a space."""
    return Layout(space.input.resolution_px, tuple(stage.channels for stage in space.stages))


def make_family(space: SearchSpace, resolutions_px: Sequence[int] | None = None) -> SpaceFamily:
    """Return the family of a space at these input resolutions, by default at its own alone.

    Raises SpaceError for a resolution that is no whole number, there twice, or too small for the space.
    """
    values = [space.input.resolution_px] if resolutions_px is None else list(resolutions_px)
    return _make(space.written(), values, f"space {space.name}")


def _make(content: Mapping[str, Any], resolutions_px: Sequence[Any], where: str) -> SpaceFamily:
    key = f"{where}: input.resolution_px"
    if not 0 < len(resolutions_px) <= MOST_OF_A_CHOICE:
        raise SpaceError(f"{key}: expected 1 to {MOST_OF_A_CHOICE} values, got {len(resolutions_px)}")
    if wrong := [px for px in resolutions_px if isinstance(px, bool) or not isinstance(px, int)]:
        raise SpaceError(f"{key}: expected whole numbers, got {one_line(repr(wrong[0]), 60)}")
    if twice := [px for px in resolutions_px if resolutions_px.count(px) > 1]:
        raise SpaceError(f"{key}: {twice[0]} is there twice")
    largest = check_space(
        {**content, "input": {**content["input"], "resolution_px": max(resolutions_px)}}, where
    )
    check_resolution(largest, min(resolutions_px))
    widths = tuple((stage.channels,) for stage in largest.stages)
    return SpaceFamily(largest, tuple(sorted(resolutions_px)), widths)


def parse_family(text: str, where: str) -> SpaceFamily:
    """Read a family from YAML text; `where` names it in messages.

    Raises SpaceError with every problem in one line.
    """
    content = read_mapping(text, where, SCHEMA, SpaceError)
    part = content.get("input")
    given = part.get("resolution_px") if isinstance(part, dict) else None
    if isinstance(given, list):
        return _make(content, given, where)
    space = check_space(content, where)
    return make_family(space)


def load_family(name_or_path: str | Path) -> SpaceFamily:
    """Load a shipped space or your own as a family, whether or not it has lists.

    Raises SpaceError as `load_space`.

    >>> len(load_family("quadranet-small"))
    1
    """
    check_arguments(space=name_or_path)
    if (space := load_at_resolution(name_or_path)) is not None:
        return make_family(space)
    return parse_family(*read_named("search_spaces", name_or_path, "search space", SpaceError))
