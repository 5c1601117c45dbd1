"""Solving among some kinds of blocks, against every network; and scores corrected by kind."""

import math

import numpy as np
import pytest
from helpers.networks import all_networks
from helpers.tiny import TWO_KINDS

from qnas.common.errors import InfeasibleBudgetError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.solver.kinds import corrected, count_blocks, kinds_of, names_of, places_of, places_with_blocks
from qnas.solver.limits import Limits, latency_limit
from qnas.solver.solve import Scores, solution_document, solve_best
from qnas.spaces.space import SearchSpace, parse_space

KINDS = ("quadra_linear", "quadra")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return parse_space(TWO_KINDS, "two-kinds.yaml")


def some_scores(space: SearchSpace, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return tuple(tuple(rng.normal(size=len(position.candidates)).tolist()) for position in space.positions)


def half(space: SearchSpace) -> Limits:
    table = compute_table(load_device("vpu"), space)
    return (latency_limit(table, (table.fastest_ms + table.slowest_ms) / 2),)


def of_one_kind(space: SearchSpace, network: tuple[int, ...], kind: str) -> bool:
    return all(row[i] in ("", kind) for row, i in zip(kinds_of(space), network, strict=True))


def test_the_kind_of_a_candidate_is_that_of_its_block(space: SearchSpace) -> None:
    kinds = kinds_of(space)
    assert names_of(kinds) == KINDS
    for position, row in zip(space.positions, kinds, strict=True):
        for name, kind in zip(position.names, row, strict=True):
            linear = "quadra_linear" if name.endswith("linear") else "quadra"
            assert kind == ("" if name == "identity" else linear)
    names = space.positions[0].names
    network = [names.index(n) for n in ("quadra_k5_e2", "identity", "quadra_k3_e2", "quadra_k3_e2_linear")]
    assert count_blocks(kinds, network) == {"quadra_linear": 1, "quadra": 2}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_a_kind_are_those_of_all_networks_of_the_kind(
    seed: int, kind: str, space: SearchSpace
) -> None:
    scores, limits = some_scores(space, seed), half(space)

    def score(network: tuple[int, ...]) -> float:
        return math.fsum(row[i] for row, i in zip(scores, network, strict=True))

    own = [
        network
        for network in all_networks(space)
        if of_one_kind(space, network, kind) and limits[0].amount(network) <= limits[0].limit
    ]
    found = solve_best(space, scores, limits, 5, (kind,))
    assert found[0].score == pytest.approx(max(map(score, own)))
    assert found[0].bound == pytest.approx(found[0].score)
    for rank, each in enumerate(found, 1):
        assert each.indices in own
        assert each.score == pytest.approx(score(each.indices))
        assert (each.rank, each.kinds, each.limits) == (rank, (kind,), limits)
    assert solution_document(space, found[0], {})["certificate"]["kinds"] == [kind]
    assert "kinds" not in solution_document(space, solve_best(space, scores, limits, 1)[0], {})["certificate"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stages", [(1,), (2,), (1, 2)])
def test_the_best_with_blocks_in_stages_are_those_of_all_such_networks(
    seed: int, stages: tuple[int, ...], space: SearchSpace
) -> None:
    # a block lowers the score wherever it stands, so that the best of all has none
    scores = tuple(
        tuple(score - 5 * bool(kind) for score, kind in zip(*rows, strict=True))
        for rows in zip(some_scores(space, seed), kinds_of(space), strict=True)
    )
    limits = half(space)
    firsts = [2 * (stage - 1) for stage in stages]  # two positions each

    def score(network: tuple[int, ...]) -> float:
        return math.fsum(row[i] for row, i in zip(scores, network, strict=True))

    own = [
        network
        for network in all_networks(space)
        if all(kinds_of(space)[at][network[at]] for at in firsts)
        and limits[0].amount(network) <= limits[0].limit
    ]
    found = solve_best(space, scores, limits, 5, (), stages)
    assert found[0].score == found[0].bound == pytest.approx(max(map(score, own)))
    assert {each.indices for each in found} <= set(own)
    assert [each.stages for each in found] == [stages] * 5
    assert solution_document(space, found[0], {})["certificate"]["stages"] == list(stages)
    (best,) = solve_best(space, scores, limits, 1)
    assert not any(row[i] for row, i in zip(kinds_of(space), best.indices, strict=True))
    assert "stages" not in solution_document(space, best, {})["certificate"]
    of_kind = solve_best(space, scores, limits, 1, ("quadra",), stages)[0]
    assert of_one_kind(space, of_kind.indices, "quadra")
    assert of_kind.indices in own


def test_a_stage_that_always_has_a_block_keeps_its_candidates(space: SearchSpace) -> None:
    every = tuple(tuple(range(len(row))) for row in kinds_of(space))
    none = space.positions[2].names.index("identity")
    assert places_with_blocks(space, every, ()) == every
    found = places_with_blocks(space, every, (2,))
    assert found[2] == tuple(i for i in every[2] if i != none)
    assert (*found[:2], *found[3:]) == (*every[:2], *every[3:])
    only_none = (*every[:2], (none,), every[3])
    assert places_with_blocks(space, only_none, (1, 2))[2] == (none,)


def test_a_position_without_the_kind_keeps_its_candidates() -> None:
    kinds = (("a", "b", ""), ("b", "c"), ("a", "a"))
    assert places_of(kinds, ("a",)) == ((0, 2), (0, 1), (0, 1))
    assert places_of(kinds, ("b", "c")) == ((1, 2), (0, 1), (0, 1))


def test_a_kind_of_which_no_network_is_fast_enough_is_refused(space: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), space)
    with pytest.raises(InfeasibleBudgetError):
        solve_best(space, some_scores(space, 0), (latency_limit(table, table.fastest_ms / 2),), 1, KINDS[:1])


def test_a_bias_raises_the_scores_of_its_kind_only() -> None:
    kinds = (("a", "b", ""), ("b", "a"))
    scores = ((1.0, 2.0, 3.0), (4.0, 5.0))
    assert corrected(scores, kinds, {"b": 0.5}) == ((1.0, 2.5, 3.0), (4.5, 5.0))
    assert corrected(scores, kinds, {}) == scores
