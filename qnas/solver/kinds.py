"""Kinds of blocks in a space: solving among some of them only, and scores corrected by a number for each.

A kind is that of `BlockSpec`: `quadra`, `quadra_linear`, `mbconv` and so on, whatever the kernel and the
expansion. A candidate without layers, the identity, has none.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from qnas.spaces.lower import BlockSpec, fill, skeleton
from qnas.spaces.space import SearchSpace

Kinds = tuple[tuple[str, ...], ...]  # [position][candidate]; "" for a candidate without layers
Value = TypeVar("Value", int, float)


def kinds_of(space: SearchSpace) -> Kinds:
    """Return the kind of each candidate at each position."""
    rows = []
    for part in skeleton(space):
        if not isinstance(part, BlockSpec):
            blocks = [fill(space, part, candidate) for candidate in part.position.candidates]
            rows.append(tuple(block.kind if block.layers else "" for block in blocks))
    return tuple(rows)


def names_of(kinds: Kinds) -> tuple[str, ...]:
    """Return the names of the kinds, in the order of their first candidates."""
    return tuple(name for name in dict.fromkeys(name for row in kinds for name in row) if name)


def count_blocks(kinds: Kinds, network: Sequence[int]) -> dict[str, int]:
    """Return the number of a network's blocks of each kind of the space."""
    chosen = [row[i] for row, i in zip(kinds, network, strict=True)]
    return {name: chosen.count(name) for name in names_of(kinds)}


def places_of(kinds: Kinds, allowed: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the candidates of these kinds, by position; those without layers are among them.

    A position that has none of them keeps all its candidates, as every network has one there.
    """
    kept = [tuple(j for j, name in enumerate(row) if not name or name in allowed) for row in kinds]
    return tuple(places or tuple(range(len(row))) for places, row in zip(kept, kinds, strict=True))


def first_positions(space: SearchSpace) -> dict[int, int]:
    """Return the number of the first position of each stage, by the stage, from 1."""
    found: dict[int, int] = {}
    for number, position in enumerate(space.positions):
        found.setdefault(position.stage + 1, number)
    return found


def places_with_blocks(
    space: SearchSpace, places: Sequence[Sequence[int]], stages: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Leave out of these candidates the identity at the first position of each of these stages, from 1.

    A stage that has blocks has them there in one of its placements. Where nothing else is left at a position,
    all its candidates stay.
    """
    kinds, firsts = kinds_of(space), first_positions(space)
    found = [tuple(row) for row in places]
    for at in (firsts[stage] for stage in stages):
        found[at] = tuple(j for j in found[at] if kinds[at][j]) or found[at]
    return tuple(found)


def take(rows: Sequence[Sequence[Value]], places: Sequence[Sequence[int]]) -> tuple[tuple[Value, ...], ...]:
    """Return the entries of these candidates only, by position."""
    return tuple(tuple(row[j] for j in own) for row, own in zip(rows, places, strict=True))


def corrected(
    scores: Sequence[Sequence[float]], kinds: Kinds, biases: Mapping[str, float]
) -> tuple[tuple[float, ...], ...]:
    """Return the scores, each raised by the bias of its candidate's kind; kinds without one stay."""
    return tuple(
        tuple(score + biases.get(name, 0.0) for score, name in zip(row, names, strict=True))
        for row, names in zip(scores, kinds, strict=True)
    )
