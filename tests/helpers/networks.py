"""All networks of a space, and the identity of a network."""

import itertools
from collections.abc import Iterator

from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace

WITH_BLOCK_TRANSITIONS = """\
schema: qnas.space/1
name: blocks
source: made for tests
input: {channels: 3, resolution_px: 32}
norm: batchnorm
activation: relu6
stem: {channels: 8, kernel: 3, stride: 2}
transition: block
candidates: [{block: mbconv, kernel: 3, expansion: [2, 4]}, {block: identity}]
stages:
  - {channels: 8, positions: 2, stride: 1}
  - channels: 8
    positions: 1
    stride: 1
    candidates: [{block: identity}, {block: mbconv, kernel: 3, expansion: 4}]
  - {channels: 8, positions: 3, stride: 2}
head: {classes: 10}
"""


def same_network(space: SearchSpace, indices: tuple[int, ...]) -> object:
    """Return the identity of a network: its layers in order, at whichever positions of a stage."""
    return tuple(block.layers for block in lower(space, arch_from_indices(space, indices)) if block.layers)


def all_networks(space: SearchSpace) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(p.candidates)) for p in space.positions))


def all_candidates(space: SearchSpace) -> Arch:
    """Return a network in which every kind of candidate occurs where positions allow it."""
    turns: dict[int, itertools.count[int]] = {}
    return arch_from_indices(
        space,
        tuple(
            next(turns.setdefault(len(p.names), itertools.count())) % len(p.names) for p in space.positions
        ),
    )
