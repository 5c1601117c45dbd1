"""The order of blocks and identities within a stage, which makes no difference to a network.

Block X in the second position of a stage and identity in the third make the same network as the reverse. A
block's effect and its best weights depend on the number of blocks before it. The weights of a supernet are
therefore those of a stage's first block, second block and so on, wherever these stand. Each is then trained
by every path with enough blocks. For example, if three positions are identity half of the time, seven paths
of eight train the weights of the first block, not only the four with a block in the first position.
"""

from collections.abc import Sequence
from typing import Any

from qnas.spaces.lower import BlockSpec, fill, skeleton
from qnas.spaces.space import SearchSpace

Labels = tuple[tuple[int, ...], ...]  # [position][candidate], of `block_labels`


def block_labels(space: SearchSpace) -> Labels:
    """Return a number for each candidate of each position, by which equal networks are recognised.

    0 is a candidate without layers. A block has one number at consecutive positions of one shape, so two
    networks are the same if and only if their sequences of labels without zeros are.
    """
    numbers: dict[Any, int] = {}
    labels = []
    run, before = 0, None
    for part in skeleton(space):
        if isinstance(part, BlockSpec):
            before = None
            continue
        position = part.position
        shape = (position.c_out, part.resolution_px) if position.keeps_shape else None
        if shape is None or shape != before:
            run += 1
        before = shape
        labels.append(
            tuple(
                numbers.setdefault((run, candidate), len(numbers) + 1)
                if fill(space, part, candidate).layers
                else 0
                for candidate in position.candidates
            )
        )
    return tuple(labels)


def runs_of(labels: Labels) -> list[range]:
    """Return the runs of positions of one shape and the same candidates, within which blocks can be moved."""
    kinds = [frozenset(row) for row in labels]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)]


def take_first_places(labels: Labels, network: Sequence[int]) -> list[int]:
    """Return, for each position, its new position when the blocks of each run come first.

    It is a permutation within each run that keeps the order of blocks and that of the other candidates.
    """
    places = list(range(len(labels)))
    for run in runs_of(labels):
        order = sorted(run, key=lambda i: labels[i][network[i]] == 0)
        for place, i in zip(run, order, strict=True):
            places[i] = place
    return places


def place_blocks_first(labels: Labels, network: Sequence[int]) -> tuple[int, ...]:
    """Return the same network with the blocks of each run in its first positions, in their order."""
    placed = list(network)
    for i, place in enumerate(take_first_places(labels, network)):
        placed[place] = labels[place].index(labels[i][network[i]])
    return tuple(placed)
