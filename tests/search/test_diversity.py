"""The choice of different networks: kinds of blocks, depth, kernels and expansion."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.networks import same_network
from helpers.tiny import TWO_KINDS

from qnas.common.errors import ArchError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.verification import check_certificate
from qnas.search.diversity import choose_diverse, farthest, features, parts_of, pool_of
from qnas.solver.kinds import count_blocks, kinds_of
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import Scores, Solution, solution_document, solve_best
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.space import SearchSpace, load_space, parse_space

SMALL = load_space("quadranet-small-mixed")


def limits_of(space: SearchSpace) -> Limits:
    table = compute_table(load_device("cpu"), space)
    params = count_limit(space, "params", 1e12)
    return latency_limit(table, (table.fastest_ms + table.slowest_ms) / 2), params


def scores_that_favour(space: SearchSpace, kind: str) -> Scores:
    rng = np.random.default_rng(0)
    return tuple(
        tuple(
            0.0 if not name else float(rng.normal(0.3, 0.05)) + (0.5 if name == kind else 0.0) for name in row
        )
        for row in kinds_of(space)
    )


def apart(space: SearchSpace, networks: list[tuple[int, ...]]) -> float:
    """The least distance between two networks."""
    points = features(space, networks)
    return min(float(np.abs(points[i] - points[j]).sum()) for i, j in combinations(range(len(points)), 2))


def test_points_are_taken_far_from_each_other() -> None:
    points = np.array([[0.0], [0.1], [0.2], [1.0], [0.5], [0.9]])
    assert farthest(points, range(6), 3) == [0, 3, 4]
    assert farthest(points, [1, 2, 5], 2) == [1, 5]
    assert farthest(points, range(6), 3, [5]) == [5, 0, 4]
    assert farthest(points, range(6), 10) == [0, 3, 4, 2, 1, 5]
    assert farthest(points, [], 3) == []
    assert farthest(np.zeros((3, 1)), range(3), 2) == [0, 1]


def test_networks_differ_by_kind_depth_and_kernel_but_not_by_the_place_of_an_identity() -> None:
    (position, *_) = SMALL.positions
    names = list(position.names)
    linear, larger, quadratic = map(
        names.index, ("quadra_k3_e2_linear", "quadra_k7_e2_linear", "quadra_k3_e2")
    )
    none = names.index("identity")
    base = (linear,) * 10
    others = [(larger, *base[1:]), (quadratic, *base[1:]), (none, *base[1:]), (*base[:-1], none)]
    points = features(SMALL, [base, *others, (base[0], none, *base[2:])])
    distances = np.abs(points - points[0]).sum(1)
    assert all(distances[1:] > 0)
    assert distances[2] > distances[1]  # another kind is further than another kernel
    assert np.abs(points[3] - points[5]).sum() == 0
    assert np.abs(points[3] - points[4]).sum() > 0


def diverse(
    space: SearchSpace, scores: Scores, limits: Limits, count: int, solved: int, **of_pool: Any
) -> list[Solution]:
    """Choose networks of a single pool."""
    pool = pool_of(space, scores, limits, solved, **of_pool)
    return [each for _, each in choose_diverse([pool], count)]


@pytest.mark.parametrize("kind", ["quadra", "quadra_linear"])
def test_where_the_scores_favour_one_kind_the_best_of_the_others_is_there(kind: str) -> None:
    space, limits = SMALL, limits_of(SMALL)
    scores = scores_that_favour(space, kind)
    best = solve_best(space, scores, limits, 60)
    kinds = kinds_of(space)
    assert all(count_blocks(kinds, each.indices)[kind] >= 4 for each in best)
    found = diverse(space, scores, limits, 6, 60)
    assert len({each.indices for each in found}) == 6
    assert found[0] == best[0]
    other = {"quadra": "quadra_linear", "quadra_linear": "quadra"}[kind]
    of_other = solve_best(space, scores, limits, 1, (other,))[0]
    assert of_other.indices in {each.indices for each in found}
    for each in found:
        assert all(limit.amount(each.indices) <= limit.limit for limit in limits)
        assert each.bound >= each.score - 1e-9
        again = solve_best(space, scores, limits, each.solved, each.kinds, each.stages)[each.rank - 1]
        assert again == each
    chosen = [each.indices for each in found]
    assert apart(space, chosen) > 2 * apart(space, [each.indices for each in best[:6]])


def test_where_the_scores_think_little_of_a_stage_networks_with_blocks_there_are_among_them() -> None:
    space, limits = SMALL, limits_of(SMALL)
    first = [position.stage == 0 for position in space.positions]
    scores = tuple(
        tuple(0.0 if not name else -0.2 if is_first else score for name, score in zip(*rows, strict=True))
        for is_first, *rows in zip(first, kinds_of(space), scores_that_favour(space, "quadra"), strict=True)
    )

    def blocks(network: tuple[int, ...]) -> int:
        """The number of blocks in the first stage."""
        return sum(bool(row[i]) for row, i, own in zip(kinds_of(space), network, first, strict=True) if own)

    assert not any(blocks(each.indices) for each in solve_best(space, scores, limits, 10))
    found = diverse(space, scores, limits, 6, 10)
    there = [each for each in found if blocks(each.indices)]
    assert len(there) >= 2
    assert all(1 in each.stages for each in there)
    for each in there:
        again = solve_best(space, scores, limits, each.solved, each.kinds, each.stages)[each.rank - 1]
        assert again == each


def test_the_parts_of_a_space_are_its_kinds_and_the_stages_that_can_be_empty() -> None:
    of_two = parts_of(parse_space(TWO_KINDS, "two-kinds.yaml"))
    linear, quadratic = ("quadra_linear",), ("quadra",)
    assert of_two == [
        (linear, ()),
        (quadratic, ()),
        ((), (1,)),
        ((), (2,)),
        (linear, (1, 2)),
        (quadratic, (1, 2)),
    ]
    # one kind, and stages that begin with a block
    assert parts_of(load_space("quadranet-small")) == [((), (1,)), ((), (2,)), ((), (3,)), ((), (1, 2, 3))]
    assert parts_of(load_space("proxyless-mobile")) == []


def test_the_given_network_comes_first_and_known_ones_are_left_out() -> None:
    space, limits = SMALL, limits_of(SMALL)
    scores = scores_that_favour(space, "quadra")
    best = solve_best(space, scores, limits, 30)
    found = diverse(space, scores, limits, 4, 30, first=best[7].indices)
    assert found[0] == best[7]
    known = [each.indices for each in found]
    more = diverse(space, scores, limits, 4, 30, without=known)
    assert len(more) == 4
    for each in more:
        assert same_network(space, each.indices) not in [same_network(space, other) for other in known]


def test_networks_that_use_little_of_the_budget_are_taken_last() -> None:
    space = parse_space(TWO_KINDS, "two-kinds.yaml")
    table = compute_table(load_device("vpu"), space)
    limits = (latency_limit(table, table.slowest_ms),)
    scores = scores_that_favour(space, "quadra")
    every = diverse(space, scores, limits, 10_000, 10_000)
    distinct = len(solve_best(space, scores, limits, 10_000))
    assert len(every) == distinct
    fills = [limits[0].amount(each.indices) / limits[0].limit for each in every]
    small = [fill < 0.7 * max(fills) for fill in fills]
    known = [each.indices for each in every]
    assert diverse(space, scores, limits, 3, 10_000, without=known) == []
    # but for the best and those of a kind, which come first
    assert small[3:] == sorted(small[3:])


def test_a_certificate_holds_among_the_networks_that_it_names(tmp_path: Path) -> None:
    space, limits = SMALL, limits_of(SMALL)
    scores = tuple(
        tuple(score if not name else -0.2 for name, score in zip(*rows, strict=True))
        for rows in zip(kinds_of(space), scores_that_favour(space, "quadra"), strict=True)
    )
    (found, *_) = solve_best(space, scores, limits, 3, (), (1, 3))
    arch, path = arch_from_indices(space, found.indices), tmp_path / "arch.json"
    document = solution_document(space, found, {})
    check_certificate(document, space, arch, limits, scores, 3, path)
    for stages, said in (
        ([1], "score_bound is"),  # a network without the other block scores more
        ([1, 2, 3], "score_bound is"),
        ([4], "certificate.stages: the space has only 3"),
    ):
        document["certificate"]["stages"] = stages
        with pytest.raises(ArchError, match=said):
            check_certificate(document, space, arch, limits, scores, 3, path)


@pytest.mark.parametrize("constant", [-100.0, 100.0])
def test_of_several_pools_the_best_of_a_kind_or_stage_is_that_over_all(constant: float) -> None:
    space, limits = SMALL, limits_of(SMALL)
    pools = [
        pool_of(space, scores_that_favour(space, kind), limits, 20) for kind in ("quadra", "quadra_linear")
    ]
    better = int(constant > 0)
    leaders = {(better, pools[better].networks[place]) for place in pools[better].leaders.values()}
    firsts = {(number, pool.networks[0]) for number, pool in enumerate(pools)}
    chosen = choose_diverse(pools, len(leaders | firsts), [0.0, constant])
    assert chosen[0] == (0, pools[0].networks[0])
    assert set(chosen) == leaders | firsts
