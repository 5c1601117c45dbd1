import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from qnas.derive import Scores, Solution, sample_near, solve
from qnas.errors import InfeasibleBudgetError
from qnas.latency.table import Cell, LatencyTable
from qnas.limits import Limits, check_limits, latency_limit


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
    # HiGHS stops within an absolute gap of 1e-6
    best = best_score(table, scores, budget_ms)
    assert solution.score == pytest.approx(best, abs=2e-6)
    assert solution.bound >= best - 1e-9
    assert solution.bound == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("seed", range(40))
def test_the_solution_is_the_best_of_all_networks_within_any_budget(seed: int) -> None:
    table, scores = random_instance(seed)
    rng = np.random.default_rng(1000 + seed)
    latencies = sorted({table.latency_ms(indices) for indices in networks(table)})
    for latency_ms in rng.choice(latencies, size=min(4, len(latencies)), replace=False).tolist():
        # between two networks, exactly one network's latency, and so little below it that a solver's
        # tolerance would let that network pass
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
        assert solution.score == pytest.approx(best_score(table, scores, solution.limits[0].limit), abs=2e-6)


def test_a_budget_that_only_the_margin_rules_out_is_refused_with_the_margin() -> None:
    table = make_table(1.0, [[1.0, 2.0]], margin=0.1)
    with pytest.raises(InfeasibleBudgetError, match=r"fastest takes 2\.000 ms, and 10\.0% of margin"):
        check_limits(within(table, 2.1))
    check_limits(within(table, 2.2001))
