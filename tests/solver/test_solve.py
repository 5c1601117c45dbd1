import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from helpers.networks import all_networks, same_network

from qnas.common.errors import InfeasibleBudgetError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import Cell, LatencyTable
from qnas.solver.distributions import sample_near
from qnas.solver.limits import Limits, check_limits, count_limit, far_from_searched, latency_limit
from qnas.solver.solve import (
    Scores,
    Solution,
    check_feasible,
    largest,
    macs_guided,
    solution_document,
    solve,
    solve_best,
)
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import SearchSpace, load_space


def within(table: LatencyTable, budget_ms: float) -> Limits:
    return (latency_limit(table, budget_ms),)


def make_table(fixed_ms: float, ms: list[list[float]], margin: float = 0.0) -> LatencyTable:
    cells = tuple(tuple(Cell(value) for value in row) for row in ms)
    return LatencyTable("vpu", "mine", "0" * 16, (("runtime", Cell(fixed_ms)),), cells, margin)


def random_instance(seed: int) -> tuple[LatencyTable, Scores]:
    """Draw a table and scores: at odd seeds in nanoseconds, with positions that are alike."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=rng.integers(1, 6))
    scale = 10.0 ** rng.integers(-2, 3)
    rows = [rng.uniform(0, scale, n) * rng.integers(0, 2, n) for n in sizes]
    if seed % 2:
        rows = [np.round(rows[0], 6)] * len(sizes)
    table = make_table(float(rng.uniform(0, scale)), [row.tolist() for row in rows])
    scores = tuple(tuple(np.log(rng.dirichlet(np.ones(len(row)))).tolist()) for row in rows)
    return table, scores


def networks(table: LatencyTable) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(row)) for row in table.ms))


def best_score(table: LatencyTable, scores: Scores, budget_ms: float) -> float:
    """The highest score within the budget by looking at every network; -inf if there is none."""
    return max(
        (
            sum(row[i] for row, i in zip(scores, indices, strict=True))
            for indices in networks(table)
            if table.latency_ms(indices) <= budget_ms
        ),
        default=-np.inf,
    )


def check(solution: Solution, table: LatencyTable, scores: Scores, budget_ms: float) -> None:
    assert solution.latency_ms == table.latency_ms(solution.indices) <= budget_ms == solution.limits[0].budget
    assert solution.score == pytest.approx(
        sum(row[i] for row, i in zip(scores, solution.indices, strict=True)), abs=1e-12
    )
    best = best_score(table, scores, budget_ms)
    assert solution.score == pytest.approx(best, abs=1e-9)
    assert solution.bound >= best - 1e-9
    assert solution.bound == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_the_solution_is_the_best_of_all_networks_within_any_budget(seed: int) -> None:
    table, scores = random_instance(seed)
    rng = np.random.default_rng(1000 + seed)
    latencies = sorted({table.latency_ms(indices) for indices in networks(table)})
    for latency_ms in rng.choice(latencies, size=min(4, len(latencies)), replace=False).tolist():
        # between two networks, exactly one network's latency, and so little below it that a solver
        # with a tolerance would let that network pass
        for budget_ms in (latency_ms * 1.01, latency_ms, latency_ms - 1e-9, np.nextafter(latency_ms, 0)):
            if budget_ms < latencies[0]:
                with pytest.raises(InfeasibleBudgetError):
                    solve(scores, within(table, float(budget_ms)))
            else:
                check(solve(scores, within(table, float(budget_ms))), table, scores, float(budget_ms))


def test_a_budget_just_below_what_many_alike_networks_take_is_kept() -> None:
    # 10 equal positions: thousands of networks share each latency
    rng = np.random.default_rng(0)
    row = np.round(rng.uniform(0.1, 2.0, 4), 6).tolist()
    table = make_table(1.0, [row] * 10)
    scores = tuple(tuple(np.log(rng.dirichlet(np.ones(4))).tolist()) for _ in range(10))
    latency_ms = solve(scores, within(table, 0.5 * table.slowest_ms)).latency_ms
    by_counts = [  # the distinct latencies
        table.latency_ms([0] * a + [1] * b + [2] * c + [3] * (10 - a - b - c))
        for a in range(11)
        for b in range(11 - a)
        for c in range(11 - a - b)
    ]
    for below in (1e-12, 1e-9, 1e-7, 1e-6):
        solution = solve(scores, within(table, latency_ms - below))
        assert solution.latency_ms <= latency_ms - below
        assert min(abs(solution.latency_ms - t) for t in by_counts) < 1e-12


def test_with_room_for_all_every_position_takes_its_best() -> None:
    table, scores = random_instance(4)
    solution = solve(scores, within(table, 2 * table.slowest_ms))
    assert solution.indices == tuple(int(np.argmax(row)) for row in scores)


def test_a_budget_that_no_network_meets_is_answered_with_the_fastest() -> None:
    table = make_table(1.0, [[0.5, 2.0], [1.25, 0.75]])
    check_limits(within(table, 2.25))
    for refuse in (
        lambda: check_limits(within(table, 2.2499)),
        lambda: solve(((0.0, 0.0),) * 2, within(table, 2.2499)),
    ):
        with pytest.raises(InfeasibleBudgetError) as error:
            refuse()
        assert str(error.value) == "no network of mine runs in 2.250 ms on vpu: the fastest takes 2.250 ms"


def test_the_fastest_networks_latency_as_printed_is_a_budget_that_works() -> None:
    for seed in range(20):
        table, scores = random_instance(seed)
        with pytest.raises(InfeasibleBudgetError) as error:
            check_limits(within(table, 0.5 * table.fastest_ms))
        printed_ms = float(str(error.value).split("the fastest takes ")[1].removesuffix(" ms"))
        assert solve(scores, within(table, printed_ms)).latency_ms <= printed_ms


def test_samples_lie_in_the_window_and_are_about_equally_frequent() -> None:
    rng = np.random.default_rng(0)
    ms = rng.uniform(0.1, 3.0, (5, 4)).round(6).tolist()
    ms[2] = ms[1]
    table = make_table(2.0, ms)
    low_ms, high_ms = 9.0, 9.5
    inside = [i for i in networks(table) if low_ms <= table.latency_ms(i) <= high_ms]
    assert len(inside) > 50
    n = 40 * len(inside)
    found = sample_near(table, low_ms, high_ms, n, np.random.default_rng(1))
    assert len(found) == n
    counts = Counter(found)
    assert set(counts) <= set(inside)
    chi_square = sum((counts[i] - 40) ** 2 / 40 for i in inside)
    freedom = len(inside) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_the_networks_at_the_ends_of_the_window_are_drawn_as_often_as_others() -> None:
    # few bins: rounding moves these totals from the window's 15 bins to 16
    table = make_table(0.0, [[1.24, 1.26, 1.76]] * 4)
    low_ms, high_ms = 4.96 - 1e-9, 5.04 + 1e-9
    inside = [i for i in networks(table) if low_ms <= table.latency_ms(i) <= high_ms]
    n = 100 * len(inside)
    found = Counter(sample_near(table, low_ms, high_ms, n, np.random.default_rng(0), bins=15))
    assert len(inside) == 2**4
    assert set(found) == set(inside)
    assert 60 < min(found.values()) <= max(found.values()) < 140


def test_an_empty_window_gives_no_networks() -> None:
    table = make_table(2.0, [[1.0, 3.0]] * 4)
    rng = np.random.default_rng(0)
    assert sample_near(table, 0.0, 1.0, 10, rng) == []  # below the fixed part
    assert sample_near(table, 3.0, 5.9, 10, rng) == []  # below the fastest, 6
    assert sample_near(table, 6.5, 7.5, 10, rng) == []  # between two latencies
    assert sample_near(table, 15.0, 20.0, 10, rng) == []  # above the slowest, 14
    assert len(sample_near(table, 6.0, 6.0, 10, rng)) == 10


def test_the_same_seed_draws_the_same_networks() -> None:
    table = make_table(0.0, [[1.0, 2.0, 3.0]] * 8)
    drawn = [sample_near(table, 14, 16, 20, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("seed", range(10))
def test_a_margin_is_kept_from_the_budget(seed: int) -> None:
    table, scores = random_instance(seed)
    careful = replace(table, margin=0.25)
    for budget_ms in np.linspace(careful.fastest_ms, careful.slowest_ms, 5) * 1.2500001:
        solution = solve(scores, within(careful, float(budget_ms)))
        assert solution.latency_ms * 1.25 <= budget_ms * (1 + 1e-12)
        assert solution.limits[0].limit == pytest.approx(budget_ms / 1.25)
        assert solution.limits[0].budget == budget_ms
        assert solution.score == pytest.approx(best_score(table, scores, solution.limits[0].limit), abs=1e-9)


def test_a_budget_that_only_the_margin_rules_out_is_refused_with_the_margin() -> None:
    table = make_table(1.0, [[1.0, 2.0]], margin=0.1)
    with pytest.raises(InfeasibleBudgetError, match=r"fastest takes 2\.000 ms, and 10\.0% of margin"):
        check_limits(within(table, 2.1))
    check_limits(within(table, 2.2001))


def some_scores(space: SearchSpace, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return tuple(tuple(np.log(rng.dirichlet(np.ones(len(p.candidates)))).tolist()) for p in space.positions)


@pytest.mark.parametrize("seed", range(4))
def test_the_k_best_are_different_networks_within_all_limits(seed: int, tiny_space: SearchSpace) -> None:
    scores = some_scores(tiny_space, seed)
    tables = [compute_table(load_device(name), tiny_space) for name in ("vpu", "cpu")]
    limits = (
        *(latency_limit(table, 0.8 * table.slowest_ms) for table in tables),
        count_limit(tiny_space, "params", 5000),
    )
    best: dict[object, float] = {}
    for indices in all_networks(tiny_space):
        if all(limit.amount(indices) <= limit.limit for limit in limits):
            score = sum(row[i] for row, i in zip(scores, indices, strict=True))
            key = same_network(tiny_space, indices)
            best[key] = max(best.get(key, -np.inf), score)
    assert len(best) > 12
    solutions = solve_best(tiny_space, scores, limits, 12)
    assert [s.score for s in solutions] == pytest.approx(sorted(best.values(), reverse=True)[:12], abs=1e-12)
    assert len({same_network(tiny_space, s.indices) for s in solutions}) == 12
    assert [s.rank for s in solutions] == list(range(1, 13))
    for solution in solutions:
        assert solution.bound == pytest.approx(solutions[0].score, abs=1e-9)
        assert solution.solved == 12
        assert all(limit.amount(solution.indices) <= limit.limit for limit in limits)
    assert solve(scores, limits).indices == solutions[0].indices


def test_the_document_of_a_solution_proves_every_limit(tiny_space: SearchSpace) -> None:
    tables = [compute_table(load_device(name), tiny_space) for name in ("vpu", "cpu")]
    limits = (*(latency_limit(t, 0.6 * t.slowest_ms) for t in tables), count_limit(tiny_space, "macs", 2e6))
    solution = solve_best(tiny_space, some_scores(tiny_space, 0), limits, 5)[2]
    document = solution_document(tiny_space, solution, {})
    assert document["certificate"]["rank"] == 3
    assert document["certificate"]["solved"] == 5
    assert [entry["name"] for entry in document["limits"]] == ["myriad-vpu", "cortex-a76", "macs"]
    for entry in document["limits"]:
        assert entry["fixed"] + sum(entry["positions"]) == pytest.approx(entry["amount"], rel=1e-12)
        assert entry["least"] <= entry["amount"] <= entry["limit"] <= entry["budget"]
    assert document["limits"][0]["amount"] == document["latency_ms"]
    assert document["limits"][1]["table_digest"] == tables[1].digest
    assert document["limits"][2]["amount"] == document["macs"]


def test_limits_that_only_together_are_too_tight_are_refused_before_a_search() -> None:
    # fast on one device is slow on the other
    first, second = make_table(0.0, [[0.0, 1.0]] * 4), make_table(0.0, [[1.0, 0.0]] * 4)
    both = (latency_limit(first, 1.0), latency_limit(second, 1.0))
    check_limits(both)
    with pytest.raises(InfeasibleBudgetError, match=r"vpu 1\.000 ms and vpu 1\.000 ms at once"):
        check_feasible(both)
    check_feasible((latency_limit(first, 2.0), latency_limit(second, 2.0)))


def test_a_search_for_macs_alone_stops_where_more_macs_break_the_budget(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), tiny_space)
    scores = some_scores(tiny_space, 3)
    counts = {
        count_macs(lower(tiny_space, arch_from_indices(tiny_space, i))) for i in all_networks(tiny_space)
    }
    # all that limits on MACs lead to, from the tightest to none
    path = [solve(scores, (count_limit(tiny_space, "macs", n),)).indices for n in sorted(counts)]
    path = list(dict.fromkeys(path))
    assert len(path) > 4
    for share in (0.2, 0.4, 0.6, 0.8):
        limits = within(table, table.fastest_ms + share * (table.slowest_ms - table.fastest_ms))
        guided = macs_guided(tiny_space, scores, limits)
        assert guided is not None
        fits = [limits[0].amount(indices) <= limits[0].limit for indices in path]
        at = path.index(guided.indices)
        assert fits[at]
        assert not any(fits[at + 1 : at + 2])
        assert guided.score <= solve(scores, limits).score
    free = within(table, 2 * table.slowest_ms)
    unlimited = macs_guided(tiny_space, scores, free)
    assert unlimited is not None
    assert unlimited.indices == solve(scores, free).indices == path[-1]


def test_a_search_for_macs_alone_keeps_the_limits_on_counts(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), tiny_space)
    few = count_limit(tiny_space, "params", 2500)
    limits = (*within(table, table.slowest_ms), few, count_limit(tiny_space, "macs", 1e6))
    guided = macs_guided(tiny_space, some_scores(tiny_space, 0), limits)
    assert guided is not None
    assert all(limit.amount(guided.indices) <= limit.limit for limit in limits)


def test_the_largest_network_has_the_most_macs_within_the_limits(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("cpu"), tiny_space)
    limits = within(table, (table.fastest_ms + table.slowest_ms) / 2)
    macs = {
        indices: count_macs(lower(tiny_space, arch_from_indices(tiny_space, indices)))
        for indices in all_networks(tiny_space)
        if limits[0].amount(indices) <= limits[0].limit
    }
    assert macs[largest(tiny_space, limits).indices] == max(macs.values())


def test_a_budget_far_from_what_the_probabilities_expect_is_said() -> None:
    table = make_table(1.0, [[0.0, 4.0]] * 2)
    even: Scores = ((float(np.log(0.5)),) * 2,) * 2  # 5 ms are expected
    for budget_ms in (4.1, 5.0, 6.5):
        assert far_from_searched(even, within(table, budget_ms), pressed=True) is None
    assert "expect 5.000 ms on vpu, 43% above what is allowed" in str(
        far_from_searched(even, within(table, 3.5), pressed=True)
    )
    assert "29% below" in str(far_from_searched(even, within(table, 7.0), pressed=True))
    # a budget that no network reaches is not further away than the slowest network
    assert "44% below" in str(far_from_searched(even, within(table, 90.0), pressed=True))
    assert far_from_searched(even, within(table, 90.0), pressed=False) is None
    # of two limits the one that is met most nearly counts
    other = make_table(1.0, [[0.0, 4.0]] * 2)
    assert far_from_searched(even, (*within(table, 8.0), *within(other, 5.0)), pressed=True) is None


def test_samples_are_within_all_limits(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), tiny_space)
    few = count_limit(tiny_space, "params", 3000)
    low_ms, high_ms = 0.3 * table.slowest_ms, 0.8 * table.slowest_ms
    inside = [i for i in all_networks(tiny_space) if low_ms <= table.latency_ms(i) <= high_ms]
    assert any(few.amount(i) > few.limit for i in inside)
    found = sample_near(table, low_ms, high_ms, 100, np.random.default_rng(0), within=(few,))
    assert len(found) == 100
    assert set(found) <= {i for i in inside if few.amount(i) <= few.limit}


def test_twenty_networks_of_a_shipped_space_are_solved_for_in_a_second() -> None:
    space = load_space("quadranet-mobile")
    table = compute_table(load_device("vpu"), space)
    started = time.process_time()
    solutions = solve_best(space, some_scores(space, 0), within(table, 0.4 * table.slowest_ms))
    assert time.process_time() - started < 1.0
    assert len(solutions) == 20
