"""The solver against every network of small instances, and against HiGHS at the size of a real space."""

import itertools
import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from qnas.solver import knapsack
from qnas.solver.knapsack import k_best
from qnas.solver.limits import Limit, Limits

Rows = list[list[float]]


def make_limit(cells: Rows, most: float, fixed: float = 0.0) -> Limit:
    return Limit("vpu", most, most, fixed, tuple(map(tuple, cells)))


def alike_in_runs(positions: int, candidates: int, run: int) -> list[list[int]]:
    """Labels as of stages of `run` positions in which candidate 0 is identity."""
    return [[1 + i // run * candidates + c if c else 0 for c in range(candidates)] for i in range(positions)]


def sequence(labels: list[list[int]], network: Sequence[int]) -> tuple[int, ...]:
    return tuple(row[c] for row, c in zip(labels, network, strict=True) if row[c])


def total(scores: Rows, network: Sequence[int]) -> float:
    return math.fsum(row[c] for row, c in zip(scores, network, strict=True))


def by_brute_force(scores: Rows, limits: Limits, k: int, labels: list[list[int]]) -> list[float]:
    """The scores of the k best different networks by looking at every one."""
    best: dict[tuple[int, ...], float] = {}
    for network in itertools.product(*(range(len(row)) for row in scores)):
        if all(limit.amount(network) <= limit.limit for limit in limits):
            key = sequence(labels, network)
            best[key] = max(best.get(key, -math.inf), total(scores, network))
    return sorted(best.values(), reverse=True)[:k]


def random_instance(seed: int) -> tuple[Rows, Limits, list[list[int]], int]:
    """Draw an instance: ties, budgets on the last bit of an amount, tables that differ within a run."""
    rng = np.random.default_rng(seed)
    positions, candidates = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    run, alike = int(rng.integers(1, 4)), rng.random() < 0.7
    scores = rng.normal(size=(positions, candidates)) * rng.integers(0, 2, (positions, 1))
    digits, fixed = int(rng.integers(1, 7)), float(rng.uniform(0, 3))
    networks = list(itertools.product(range(candidates), repeat=positions))
    limits = []
    for _ in range(int(rng.integers(1, 4))):
        drawn = rng.uniform(0, 1, (positions, candidates)).round(digits)
        cells = [drawn[i // run if alike else i].tolist() for i in range(positions)]
        amounts = sorted({make_limit(cells, 1.0, fixed).amount(network) for network in networks})
        some = amounts[int(rng.integers(len(amounts) // 3, len(amounts)))]
        most = (some, float(np.nextafter(some, 0)), 1.01 * some)[int(rng.integers(3))]
        limits.append(make_limit(cells, most, fixed))
    return scores.tolist(), tuple(limits), alike_in_runs(positions, candidates, run), int(rng.integers(1, 25))


@pytest.mark.parametrize("seed", range(100))
def test_the_k_best_are_those_of_all_networks(seed: int) -> None:
    scores, limits, labels, k = random_instance(seed)
    found = k_best(scores, limits, k, labels)
    best = by_brute_force(scores, limits, k, labels)
    assert found.scores == pytest.approx(best, abs=1e-12)
    assert list(found.scores) == [total(scores, network) for network in found.networks]
    assert all(limit.amount(network) <= limit.limit for limit in limits for network in found.networks)
    assert len({sequence(labels, network) for network in found.networks}) == len(found.networks)
    assert found.left_out <= (min(best) if len(best) == k else -math.inf) + 1e-8


def large_instance(seed: int, limits: int, positions: int = 72, candidates: int = 7) -> tuple[Rows, Limits]:
    """Draw scores and costs that rise with the candidate, in stages of 6 positions."""
    rng = np.random.default_rng(seed)
    scores = np.log(rng.dirichlet(np.ones(candidates), positions)).tolist()
    width = np.sort(rng.uniform(0.2, 2.0, (positions // 6, candidates)), 1)
    width[:, 0] = 0
    found = []
    for i in range(limits):
        cost = (width * rng.uniform(0.2, 1.2, width.shape)).round(6)
        cells = np.repeat(cost, 6, axis=0)
        found.append(make_limit(cells.tolist(), (0.4 + 0.05 * i) * float(cells.max(1).sum())))
    return scores, tuple(found)


def by_highs(scores: Rows, limits: Limits) -> float:
    """The highest score by a general mixed-integer solver, to its tolerance of 1e-6."""
    one_each = np.repeat(np.eye(len(scores)), [len(row) for row in scores], axis=1)
    within = [
        LinearConstraint(np.concatenate(limit.cells)[None], -np.inf, limit.limit - limit.fixed)
        for limit in limits
    ]
    result = milp(
        -np.concatenate(scores),
        integrality=np.ones(one_each.shape[1]),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), *within],
        options={"mip_rel_gap": 0.0},
    )
    return -float(result.fun)


@pytest.mark.parametrize("limits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_at_a_real_spaces_size_the_best_is_that_of_another_solver_and_proven(seed: int, limits: int) -> None:
    scores, within = large_instance(seed, limits)
    labels = alike_in_runs(72, 7, 6)
    started = time.process_time()
    found = k_best(scores, within, 20, labels)
    assert time.process_time() - started < 2.0  # 0.4 s alone on a machine
    assert found.scores[0] == pytest.approx(by_highs(scores, within), abs=2e-6)
    assert len(found.networks) == 20
    assert found.left_out <= found.scores[-1] + 1e-8
    assert len({sequence(labels, network) for network in found.networks}) == 20


def test_what_is_left_out_for_want_of_room_stays_in_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, within = large_instance(0, 1)
    labels = alike_in_runs(72, 7, 6)
    proven = k_best(scores, within, 20, labels)
    monkeypatch.setattr(knapsack, "KEPT", (25,))
    hasty = k_best(scores, within, 20, labels)
    assert hasty.left_out > hasty.scores[-1]
    for best, found in zip(proven.scores, hasty.scores, strict=True):
        assert found <= best <= max(found, hasty.left_out)


def test_with_scores_that_are_all_equal_any_networks_will_do() -> None:
    _, within = large_instance(0, 2)
    found = k_best([[0.0] * 7] * 72, within, 20, alike_in_runs(72, 7, 6))
    assert found.scores == (0.0,) * 20
    assert found.left_out <= 0


def test_limits_that_no_network_meets_together_leave_none() -> None:
    either = make_limit([[0.0, 1.0]] * 3, 1.0), make_limit([[1.0, 0.0]] * 3, 1.0)
    found = k_best([[0.0, 0.0]] * 3, either, 5, [[1, 2]] * 3)
    assert found.networks == ()
    assert found.left_out == -math.inf


def test_of_equal_networks_the_best_placed_stands_for_all() -> None:
    # candidate 1 in either of two positions is one network
    loose = (make_limit([[0.0, 1.0]] * 2, 10.0),)
    found = k_best([[0.0, -1.0], [0.0, -0.5]], loose, 10, alike_in_runs(2, 2, 2))
    assert found.networks == ((0, 0), (0, 1), (1, 1))
    assert found.scores == (0.0, -0.5, -1.5)


def test_a_network_over_the_limit_by_its_last_bit_pushes_none_out() -> None:
    over = float(np.nextafter(1.0, 2.0))
    found = k_best([[1.0, 0.0]], (make_limit([[over, 1.0]], 1.0),), 1, [[1, 2]])
    assert found.networks == ((1,),)


def test_placements_of_one_network_count_once_where_they_take_different_amounts() -> None:
    # X may stand in either position, and beats Z with both; Z is the second best network all the same
    limit = make_limit([[0.0, 2.0, 3.0], [0.0, 2.5, 10.0]], 3.0)
    found = k_best([[0.0, 5.0, 4.0], [0.0, 4.9, 4.0]], (limit,), 2, alike_in_runs(2, 3, 2))
    assert found.scores == (5.0, 4.0)


def test_what_an_early_pass_found_is_not_lost_in_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, within = large_instance(1, 1)
    labels = alike_in_runs(72, 7, 6)
    monkeypatch.setattr(knapsack, "KEPT", (25,))
    early = k_best(scores, within, 20, labels)
    monkeypatch.setattr(knapsack, "KEPT", (25, 1))
    both = k_best(scores, within, 20, labels)
    assert both.scores == early.scores
    assert both.left_out > both.scores[-1]
