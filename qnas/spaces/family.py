"""A family of search spaces: one at each of its layouts, which fix what latencies depend on besides blocks.

A layout is an input resolution and a width for each stage. The space at a layout is a SearchSpace as any
other, with its own name, digest, tables and limits; the solver says which layout is best (`solver.layouts`).
In a file, `input.resolution_px: [128, 160, 192, 224]` makes a family, and so does `channels: [16, 24, 32]`
of a stage; a file without lists is a family of one space. All spaces of a family have the same positions with
the same candidates, and the same blocks between them: a network is a layout and a choice of candidates.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from qnas.spaces.lower import Slot, check_resolution, skeleton
from qnas.spaces.space import (
    SCHEMA,
    SearchSpace,
    check_space,
    listed_choices,
    load_at_resolution,
)

MOST_OF_A_CHOICE = 32  # values of a resolution, or of the width of a stage
MOST_LAYOUTS = 256  # of a search, which trains at all of them; the solver takes more
CHANNELS_STEP = 8  # channels that a multiplied width is a multiple of, as runtimes' vectors are
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
    def choices(self) -> int:
        """The number of resolutions and widths besides one of each."""
        return sum(len(row) - 1 for row in (self.resolutions_px, *self.widths))

    @property
    def has_widths(self) -> bool:
        """Whether a stage has several widths."""
        return any(len(row) > 1 for row in self.widths)

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

    def label_of(self, layout: Layout) -> str:
        """Return a layout in words: `160 px`, `160 px, 24-40-80 channels`."""
        px = f"{layout.resolution_px} px"
        return f"{px}, {'-'.join(map(str, layout.channels))} channels" if self.has_widths else px

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
        return check_space(content, f"space {content['name']}")

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
        for stage, widths in zip(content["stages"], self.widths, strict=True):
            stage["channels"] = list(widths) if len(widths) > 1 else widths[0]
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def layout_of(space: SearchSpace) -> Layout:
    """Return the layout of a space."""
    return Layout(space.input.resolution_px, tuple(stage.channels for stage in space.stages))


def make_family(
    space: SearchSpace,
    resolutions_px: Sequence[int] | None = None,
    widths: Sequence[Sequence[int]] | None = None,
) -> SpaceFamily:
    """Return the family of a space at these input resolutions, and these channels of each stage.

    By default, both are the space's own alone. Raises SpaceError for a value that is no whole number, there
    twice, or that the space does not fit: too small a resolution, or widths with other blocks than the rest.
    """
    values = [space.input.resolution_px] if resolutions_px is None else list(resolutions_px)
    rows = [[stage.channels] for stage in space.stages] if widths is None else [list(row) for row in widths]
    where = f"space {space.name}"
    if len(rows) != len(space.stages):
        raise SpaceError(f"{where}: expected widths for {len(space.stages)} stages, got {len(rows)}")
    return _make(space.written(), values, rows, where)


def multiplied_widths(space: SearchSpace, multipliers: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Return the channels of each stage at these multiples of its own, each to the nearest multiple of 8.

    The width multiplier of MobileNet (arXiv 1704.04861), for each stage by itself. A stage that nothing
    separates from the stem or the stage before it, as it has its width and no stride, keeps it, and so does
    that stage. Raises SpaceError for a multiplier that is not positive.

    >>> from qnas.spaces.space import load_space
    >>> multiplied_widths(load_space("quadranet-small"), [0.5, 1.0])
    ((32,), (32, 64), (64, 128))
    """
    if wrong := [x for x in multipliers if isinstance(x, bool) or not isinstance(x, int | float) or x <= 0]:
        raise SpaceError(f"width multipliers: expected positive numbers, got {one_line(repr(wrong[0]), 60)}")
    if not multipliers:
        raise SpaceError("width multipliers: expected one or more")

    def multiplied(channels: int, by: float) -> int:
        # a multiplier of 1 keeps what is no multiple
        step = CHANNELS_STEP
        return channels if by == 1 else max(step, math.floor(by * channels / step + 0.5) * step)

    kept, before = set[int](), space.stem.channels
    for i, stage in enumerate(space.stages):
        if stage.stride == 1 and stage.channels == before:
            kept |= {i - 1, i}
        before = stage.channels
    return tuple(
        (stage.channels,)
        if i in kept
        else tuple(sorted({multiplied(stage.channels, by) for by in multipliers}))
        for i, stage in enumerate(space.stages)
    )


def _make(
    content: Mapping[str, Any], resolutions_px: Sequence[Any], widths: Sequence[Sequence[Any]], where: str
) -> SpaceFamily:
    _check_values(resolutions_px, f"{where}: input.resolution_px")
    for i, row in enumerate(widths):
        _check_values(row, f"{where}: stages[{i}].channels")
    largest = check_space(_at_ends(content, resolutions_px, widths, max), where)
    check_space(_at_ends(content, resolutions_px, widths, min), where)
    check_resolution(largest, min(resolutions_px))
    family = SpaceFamily(largest, tuple(sorted(resolutions_px)), tuple(tuple(sorted(row)) for row in widths))
    _check_blocks(family, where)
    return family


def _at_ends(
    content: Mapping[str, Any],
    resolutions_px: Sequence[int],
    widths: Sequence[Sequence[int]],
    end: Callable[[Sequence[int]], int],
) -> dict[str, Any]:
    """Return the content of the space at the largest or the smallest layout."""
    rows = zip(content["stages"], widths, strict=True)
    return {
        **content,
        "input": {**content["input"], "resolution_px": end(resolutions_px)},
        "stages": [{**stage, "channels": end(row)} for stage, row in rows],
    }


def _check_values(values: Sequence[Any], where: str) -> None:
    """Raise SpaceError unless the values of a list are different whole numbers, and not too many."""
    if not 0 < len(values) <= MOST_OF_A_CHOICE:
        raise SpaceError(f"{where}: expected 1 to {MOST_OF_A_CHOICE} values, got {len(values)}")
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int)]:
        raise SpaceError(f"{where}: expected whole numbers, got {one_line(repr(wrong[0]), 60)}")
    if twice := [value for value in values if values.count(value) > 1]:
        raise SpaceError(f"{where}: {twice[0]} is there twice")


def _check_blocks(family: SpaceFamily, where: str) -> None:
    """Raise SpaceError unless all layouts have the same blocks and candidates.

    Where a stage has no stride and the width before it, nothing changes the shape between them: there is no
    transition, or its first position has candidates that keep the shape. A supernet has such a block in all
    of its networks, or in none.
    """
    at_one_size = replace(family, resolutions_px=family.resolutions_px[-1:])
    largest = _blocks_of(family.largest)
    for layout in at_one_size.covering():
        own = _blocks_of(family.at(layout))
        if own == largest:
            continue
        differing = next(name for name in {**largest, **own} if largest.get(name) != own.get(name))
        stage = int(differing.partition(".")[0])
        before = "the stem" if stage == 1 else f"stage {stage - 1}"
        raise SpaceError(
            f"{where}: stages[{stage - 1}].channels: block {differing} differs between widths, since the "
            f"stage has no stride and some of its widths are those of {before}: expected the same single "
            "width, or no width in both"
        )


def _blocks_of(space: SearchSpace) -> dict[str, Any]:
    """Return the candidates of each position, and the kind of each other block, by name."""
    parts = skeleton(space)
    return {
        part.position.name if isinstance(part, Slot) else part.name: (
            part.position.candidates if isinstance(part, Slot) else part.kind
        )
        for part in parts
    }


def parse_family(text: str, where: str) -> SpaceFamily:
    """Read a family from YAML text; `where` names it in messages.

    Raises SpaceError with every problem in one line.
    """
    content = read_mapping(text, where, SCHEMA, SpaceError)
    if not listed_choices(content):
        return make_family(check_space(content, where))
    part, stages = content.get("input"), content.get("stages")
    if not (isinstance(part, dict) and isinstance(stages, list)):
        return make_family(check_space(content, where))  # raises
    widths = (stage.get("channels") if isinstance(stage, dict) else None for stage in stages)
    entries = [part.get("resolution_px"), *widths]
    if None in entries:
        first = {"input": _without_lists(part), "stages": [_without_lists(stage) for stage in stages]}
        return make_family(check_space({**content, **first}, where))  # raises
    px, *rows = (entry if isinstance(entry, list) else [entry] for entry in entries)
    return _make(content, px, rows, where)


def _without_lists(part: Any) -> Any:
    """Return a part of a file with the first value of each of its lists of choices."""
    if not isinstance(part, dict):
        return part
    choices = ("resolution_px", "channels")
    return {k: v[0] if k in choices and isinstance(v, list) and v else v for k, v in part.items()}


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
