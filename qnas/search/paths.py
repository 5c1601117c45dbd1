"""The paths that weight steps train: drawn ones, and the largest and the smallest network.

Drawn paths have one of three distributions:

- even: of largest entropy within the limits;
- by the probabilities: as the architecture parameters have it;
- fair: even, under the condition that all kinds of blocks of a position are equally likely there. The kinds
  then take turns at each place, in an order that is drawn anew each time, so that their numbers of steps
  differ by one at most. FairNAS (arXiv 1907.01845) does so for single candidates. Here identities are drawn,
  as the limits say how many there are, and so are kernels and expansions, which share weights within a kind.

A path runs its blocks in the first places of their stage (`qnas.spaces.block_order`), and a place's weights
are trained by the block that runs there. Turns are therefore taken at places.

The largest network has the candidate of most MACs at each position. Kinds share no weights, so where a
position has several, they take turns there too: the largest network of one kind alone would train no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from qnas.nn.mixed_block import Route
from qnas.nn.pretrained.derivation import own_indices
from qnas.nn.supernet import LimitTensors
from qnas.search.problem import Problem
from qnas.solver.distributions import levelled, max_entropy_strengths
from qnas.solver.kinds import kinds_of, names_of
from qnas.solver.solve import CandidateIndices
from qnas.spaces.block_order import block_labels, take_first_places
from qnas.spaces.lower import Slot, count_macs, fill, skeleton, smallest_and_largest
from qnas.spaces.space import SearchSpace

NO_KIND = -1  # of candidates without layers, and beyond a position's candidates


def kind_numbers(space: SearchSpace) -> NDArray[np.int64]:
    """Return the number of each candidate's kind within its position, (positions, candidates), or NO_KIND."""
    kinds = kinds_of(space)
    found = np.full((len(kinds), max(map(len, kinds))), NO_KIND, dtype=np.int64)
    for row, names in zip(found, kinds, strict=True):
        own = list(dict.fromkeys(name for name in names if name))
        for i, name in enumerate(names):
            if name:
                row[i] = own.index(name)
    return found


def fair_logits(limits: LimitTensors, mask: Tensor, groups: NDArray[np.int64]) -> Tensor:
    """Return the logits of the maximum-entropy probabilities within the limits with equally likely groups.

    (positions, candidates), float64. See `qnas.solver.distributions`.
    """
    fixed, amounts, limit = (part.numpy() for part in limits)
    strengths = max_entropy_strengths(fixed, amounts, limit, mask.numpy(), groups=groups)
    tilted = -np.tensordot(strengths, amounts / limit[:, None, None], 1)
    return torch.from_numpy(levelled(np.where(mask.numpy(), tilted, -np.inf), groups))


class Turns:
    """The turns of each place's kinds: the order of a round depends on the seed, the place and its number."""

    def __init__(self, kinds: Sequence[int], seed: int, stream: int) -> None:
        self.kinds, self._seed, self._stream = kinds, seed, stream  # kinds at each place
        self._orders: dict[int, tuple[int, list[int]]] = {}  # the round of each place, and its order

    def at(self, place: int, number: int) -> int:
        """Return the kind of the block of this number, counted from 0, at a place."""
        kinds = self.kinds[place]
        if kinds == 1:
            return 0
        round_number, turn = divmod(number, kinds)
        if self._orders.get(place, (None,))[0] != round_number:
            rng = np.random.default_rng((self._seed, self._stream, place, round_number))
            self._orders[place] = round_number, rng.permutation(kinds).tolist()
        return self._orders[place][1][turn]


class FairPaths:
    """Fair paths, drawn one after another. Beside the generator, later ones depend on `counts` only."""

    def __init__(self, space: SearchSpace, limits: LimitTensors, mask: Tensor, seed: int) -> None:
        self._labels = block_labels(space)
        groups = kind_numbers(space)
        self._kinds = torch.from_numpy(groups)
        self._p = torch.softmax(fair_logits(limits, mask, groups), 1)
        self._turns = Turns([max(1, int(row.max()) + 1) for row in groups], seed, stream=0)
        self.counts = [0] * len(groups)  # blocks that each place has run

    def draw(self, generator: Generator) -> list[Route]:
        """Draw the next path, with its blocks in the first places of their stage."""
        drawn = torch.multinomial(self._p, 1, generator=generator)[:, 0].tolist()
        path: list[Route] = [0] * len(drawn)
        places = []
        for i, place in enumerate(take_first_places(self._labels, drawn)):
            if self._labels[i][drawn[i]] == 0:
                path[place] = self._labels[place].index(0)
            else:
                places.append(place)
        if not places:
            return path
        places.sort()
        turns = torch.tensor([self._turns.at(place, self.counts[place]) for place in places])
        is_next = self._kinds[places] == turns[:, None]
        # the probabilities of a kind's candidates, up to a factor
        chosen = torch.multinomial(self._p[places] * is_next, 1, generator=generator)[:, 0]
        for place, index in zip(places, chosen.tolist(), strict=True):
            path[place] = index
            self.counts[place] += 1
        return path


def whole_network(problem: Problem) -> CandidateIndices:
    """Return the network that weight steps of the whole train: the pretrained one, else the largest.

    It is the largest too where the space lacks a candidate of the pretrained network.
    """
    space, pretrained = problem.space, problem.pretrained
    own = () if pretrained is None else own_indices(space, pretrained.space)
    if own and None not in own:
        return tuple(place for place in own if place is not None)
    return smallest_and_largest(space)[1].indices(space)


def left_untrained(problem: Problem) -> tuple[str, ...]:
    """Return the kinds of blocks that weight steps of the whole network train at none of their positions."""
    kinds = kinds_of(problem.space)
    trained = {row[i] for row, i in zip(kinds, whole_network(problem), strict=True)}
    return tuple(name for name in names_of(kinds) if name not in trained)


@dataclass(frozen=True)
class Ends:
    """The smallest and the largest network of a space; kinds take turns at each position of the largest."""

    smallest: list[Route]
    by_kind: tuple[tuple[int, ...], ...]  # [position][kind]: its candidate of most MACs
    turns: Turns

    def largest(self, step: int) -> list[Route]:
        """Return the largest network of a weight step, counted from 0."""
        return [row[self.turns.at(i, step)] for i, row in enumerate(self.by_kind)]


def ends_of(space: SearchSpace, seed: int) -> Ends:
    """Return the smallest and the largest network of a space."""
    slots = [part for part in skeleton(space) if isinstance(part, Slot)]
    smallest: list[Route] = []
    by_kind = []
    for slot, kinds in zip(slots, kind_numbers(space).tolist(), strict=True):
        macs = [count_macs([fill(space, slot, c)]) for c in slot.position.candidates]
        smallest.append(macs.index(min(macs)))
        names = range(max(kinds) + 1)
        members = [[i for i, kind in enumerate(kinds) if kind == name] for name in names]
        # a position without blocks has nothing but its identities
        by_kind.append(tuple(max(own, key=macs.__getitem__) for own in members) or (0,))
    return Ends(smallest, tuple(by_kind), Turns([len(row) for row in by_kind], seed, stream=1))
