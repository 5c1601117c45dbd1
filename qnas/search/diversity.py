"""A diverse set of good networks: the best, the best of some kinds and stages, and others far from these.

The k best networks within a budget differ in a block or two. Where the supernet favours a kind of block, all
of them are of that kind, and where it thinks little of blocks in a stage, none of them has one there. So the
pool also has, solved for with the same proof, the best networks of each kind alone, the best with a block in
each stage, and the best of each kind with blocks in all stages. From the pool, networks are taken one by one,
each the farthest from those taken before (greedy k-centre: Gonzalez, 1985), first among the best of each of
these and then among those that use most of the budget: a network of little latency is far from all others,
and seldom good.

Several layouts of a family have a pool each. The best of a kind or stage is then that over all of them, and
the best network of each layout is among the first, too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qnas.common.errors import InfeasibleBudgetError
from qnas.solver.kinds import count_blocks, first_positions, kinds_of, names_of
from qnas.solver.limits import Limits
from qnas.solver.solve import CandidateIndices, Scores, Solution, solve_best
from qnas.spaces.block_order import Labels, block_labels
from qnas.spaces.space import SearchSpace

OF_EACH = 40  # networks that are solved for of each kind and stage
WINDOW = 0.7  # share of the largest use of the limits in the pool that networks have at least
KIND_WEIGHT = 2.0  # of the kinds of blocks, against that of the depth and that of each parameter

Floats = NDArray[np.float64]
Part = tuple[tuple[str, ...], tuple[int, ...]]  # kinds and stages, as of `solve_best`


@dataclass(frozen=True)
class Pool:
    """Different networks of a space to choose among, the best first."""

    networks: tuple[Solution, ...]
    points: Floats  # (networks, F): what they differ in, see `features`
    leaders: Mapping[Part, int]  # of each kind and stage, by its place in `networks`


def pool_of(
    space: SearchSpace,
    scores: Scores,
    limits: Limits,
    solved: int,
    *,
    first: CandidateIndices | None = None,
    without: Collection[CandidateIndices] = (),
) -> Pool:
    """Return the `solved` best networks within the limits, and the best of each kind and stage.

    The first is `first`, which must be among the `solved` best, or else the best by score. Networks
    equal to one of `without` are left out. Raises InfeasibleBudgetError where no network is within the
    limits.
    """
    best = list(solve_best(space, scores, limits, solved))
    of_each: dict[Part, tuple[Solution, ...]] = {}
    for part in parts_of(space):
        try:
            of_each[part] = solve_best(space, scores, limits, min(solved, OF_EACH), *part)
        except InfeasibleBudgetError:
            continue  # no network of this kind alone, or with blocks there, is within the limits
    if first is not None:
        best.sort(key=lambda solution: solution.indices != first)
        assert best[0].indices == first, "not one of the best"
    labels = block_labels(space)
    pool = _different(labels, [*best, *(each for own in of_each.values() for each in own)], without)
    places = {_sequence(labels, each.indices): place for place, each in enumerate(pool)}
    leaders = {part: places.get(_sequence(labels, own[0].indices)) for part, own in of_each.items()}
    return Pool(
        tuple(pool),
        features(space, [solution.indices for solution in pool]) if pool else np.empty((0, 0)),
        {part: place for part, place in leaders.items() if place is not None},
    )


def choose_diverse(
    pools: Sequence[Pool], count: int, constants: Sequence[float] = (0.0,)
) -> list[tuple[int, Solution]]:
    """Return up to `count` different networks, each with the number of its pool, in the order they are taken.

    The first is the first one of the first pool. Points of all pools have the same coordinates; `constants`
    are what each pool adds to the scores of its networks.
    """
    every = [(number, each) for number, pool in enumerate(pools) for each in pool.networks]
    if not every:
        return []
    starts = np.cumsum([0, *(len(pool.networks) for pool in pools)]).tolist()
    leading: dict[Part, tuple[float, int]] = {}  # over all pools: the score, and the place in `every`
    for start, pool, constant in zip(starts, pools, constants, strict=False):
        for part, place in pool.leaders.items():
            found = (constant + pool.networks[place].score, -(start + place))
            leading[part] = max(found, leading.get(part, found))
    firsts = {start for start, pool in zip(starts, pools, strict=False) if pool.networks}
    firsts |= {-place for _, place in leading.values()}
    fills = [_fill(solution) for _, solution in every]
    points = np.concatenate([pool.points for pool in pools if pool.networks])
    taken: list[int] = []
    for among in (
        sorted(firsts),
        [i for i, fill in enumerate(fills) if fill >= WINDOW * max(fills)],
        range(len(every)),  # only if there are no others
    ):
        taken = farthest(points, among, count, taken)
    return [every[i] for i in taken]


def parts_of(space: SearchSpace) -> list[Part]:
    """Return the kinds and the stages, from 1, whose best networks are among the pool, as for `solve_best`.

    They are each kind alone, each stage that can be without blocks, and each kind with all these stages.
    """
    kinds = kinds_of(space)
    of_kind = [(name,) for name in names_of(kinds)]
    firsts = first_positions(space).items()
    open_stages = tuple(stage for stage, at in firsts if "" in kinds[at] and any(kinds[at]))
    alone: list[Part] = []
    if len(of_kind) > 1:
        alone += [(each, ()) for each in of_kind]
    alone += [((), (stage,)) for stage in open_stages]
    if len(open_stages) > 1:
        alone += [(each if len(of_kind) > 1 else (), open_stages) for each in of_kind]
    return alone


def _fill(solution: Solution) -> float:
    """Return the largest share of a limit that a network takes."""
    return max(limit.amount(solution.indices) / limit.limit for limit in solution.limits)


def features(space: SearchSpace, networks: Sequence[CandidateIndices]) -> Floats:
    """Return the coordinates of networks, (networks, F), whose distances (L1) say how much they differ.

    They are the blocks of each kind, as shares of the positions; the blocks of each stage, likewise; and the
    mean of each parameter that is a number (kernel, expansion) over the blocks that have it, as a share of
    its largest value in the space.
    """
    kinds = kinds_of(space)
    names, stages = names_of(kinds), sorted({position.stage for position in space.positions})
    largest: dict[str, int] = {}
    for position in space.positions:
        for candidate in position.candidates:
            for name, value in candidate.parameters.items():
                if isinstance(value, int):
                    largest[name] = max(largest.get(name, 1), value)
    rows = []
    for network in networks:
        counts = count_blocks(kinds, network)
        depths = dict.fromkeys(stages, 0)
        values: dict[str, list[int]] = {name: [] for name in largest}
        for position, i, row in zip(space.positions, network, kinds, strict=True):
            depths[position.stage] += bool(row[i])
            for name, value in position.candidates[i].parameters.items() if row[i] else ():
                if isinstance(value, int):
                    values[name].append(value)
        whole = len(space.positions)
        rows.append(
            [
                # a block of another kind changes two of these
                *(KIND_WEIGHT / 2 * counts[name] / whole for name in names),
                *(depths[stage] / whole for stage in stages),
                *(float(np.mean(found or [0])) / largest[name] for name, found in values.items()),
            ]
        )
    return np.array(rows, dtype=np.float64).reshape(len(networks), -1)


def farthest(
    points: Floats, among: Sequence[int] | range, count: int, taken: Sequence[int] = ()
) -> list[int]:
    """Take points (n, F) up to `count` in all, each the farthest (L1) from the nearest one taken before.

    Only points of `among` are taken, the first of them first; of equally far ones, the earlier.
    """
    chosen, left = list(taken), [i for i in among if i not in taken]
    if not chosen and left and count:
        chosen.append(left.pop(0))
    while left and len(chosen) < count:
        apart = np.abs(points[left][:, None] - points[chosen][None]).sum(2).min(1)
        chosen.append(left.pop(int(apart.argmax())))
    return chosen


def _sequence(labels: Labels, network: CandidateIndices) -> tuple[int, ...]:
    """Return what equal networks have in common, wherever their identities stand."""
    return tuple(row[i] for row, i in zip(labels, network, strict=True) if row[i])


def _different(
    labels: Labels, solutions: Sequence[Solution], without: Collection[CandidateIndices]
) -> list[Solution]:
    """Return the solutions that are different networks, in order."""
    seen, found = {_sequence(labels, network) for network in without}, []
    for solution in solutions:
        if (key := _sequence(labels, solution.indices)) not in seen:
            seen.add(key)
            found.append(solution)
    return found
