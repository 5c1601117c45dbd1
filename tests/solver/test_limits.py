import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from qnas.common.errors import InfeasibleBudgetError, TableError, UsageError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.intervals import Errors, Uncertainty
from qnas.latency.table import LatencyTable
from qnas.solver.limits import COUNTS, Count, check_limits, count_limit, latency_limit
from qnas.solver.solve import solve
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace

COUNTED = {"params": count_params, "macs": count_macs}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_that_of_the_lowered_network(name: Count, tiny_space: SearchSpace) -> None:
    limit = count_limit(tiny_space, name, 1e9)
    counts = []
    for indices in itertools.product(*(range(len(p.candidates)) for p in tiny_space.positions)):
        blocks = lower(tiny_space, arch_from_indices(tiny_space, indices))
        counts.append(COUNTED[name](blocks))
        assert limit.amount(indices) == counts[-1]
    assert limit.least == min(counts)
    assert limit.most == max(counts)
    assert not limit.binds
    assert count_limit(tiny_space, name, max(counts) - 1).binds


def test_a_latency_is_the_tables(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("cpu"), tiny_space)
    limit = latency_limit(table, 1.0)
    for indices in ((0, 0, 0, 0), (4, 4, 1, 1), (3, 2, 0, 1)):
        assert limit.amount(indices) == table.latency_ms(indices)
    assert (limit.least, limit.most) == (table.fastest_ms, table.slowest_ms)


def test_each_limit_that_no_network_meets_is_refused_with_the_least(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("cpu"), tiny_space)
    within = latency_limit(table, 2 * table.slowest_ms)
    fewest = count_limit(tiny_space, "params", 1e9).least
    check_limits((within, count_limit(tiny_space, "params", fewest)))
    with pytest.raises(
        InfeasibleBudgetError, match="no network has at most 865 parameters: the smallest has 866 parameters"
    ):
        check_limits((within, count_limit(tiny_space, "params", fewest - 1)))
    with pytest.raises(InfeasibleBudgetError, match=r"runs in .* on cortex-a76: the fastest takes"):
        check_limits((latency_limit(table, 0.5 * table.fastest_ms), within))


def test_amounts_are_written_in_their_units(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("cpu"), tiny_space)
    limits = (latency_limit(table, 1.0), *(count_limit(tiny_space, name, 1e9) for name in COUNTS))
    assert [limit.describe(2.5e6) for limit in limits] == ["2500000 ms", "2.50M parameters", "2.50M MACs"]
    assert [limit.unit for limit in limits] == ["ms", "parameters", "MACs"]


def with_errors(space: SearchSpace) -> LatencyTable:
    errors = (Errors(level=0.8, low=-0.1, high=0.15), Errors(level=0.9, low=-0.2, high=0.3))
    known = Uncertainty(source="test", networks=100, families=5, weight=3.0, errors=errors)
    return replace(compute_table(load_device("vpu"), space), uncertainty=known, margin=0.5)


def test_the_solve_is_the_best_of_all_whose_upper_end_is_within_the_budget(tiny_space: SearchSpace) -> None:
    table, rng = with_errors(tiny_space), np.random.default_rng(0)
    networks = list(itertools.product(*(range(len(p.candidates)) for p in tiny_space.positions)))
    ends = {
        level: [interval.high_ms for n in networks if (interval := table.interval(n, level)) is not None]
        for level in (0.8, 0.9)
    }
    for level in (0.8, 0.9):
        for budget_ms in np.quantile(ends[level], (0.05, 0.3, 0.7, 1.0)).tolist():
            scores = tuple(tuple(rng.normal(size=len(p.names)).tolist()) for p in tiny_space.positions)
            limit = latency_limit(table, budget_ms * (1 + 1e-12), level)
            found = solve(scores, (limit,))
            within = [n for n, end in zip(networks, ends[level], strict=True) if end <= limit.limit]
            best = max(math.fsum(row[i] for row, i in zip(scores, n, strict=True)) for n in within)
            assert found.score == pytest.approx(best, abs=1e-9)
            interval = table.interval(found.indices, level)
            assert interval is not None
            assert interval.high_ms == pytest.approx(limit.amount(found.indices))
            assert interval.high_ms <= budget_ms * (1 + 1e-9)
            assert found.latency_ms == table.latency_ms(found.indices) <= limit.slowest_within_ms


def test_a_higher_confidence_leaves_fewer_networks(tiny_space: SearchSpace) -> None:
    table = with_errors(tiny_space)
    plain, low, high = (latency_limit(table, 1.0, level) for level in (None, 0.8, 0.9))
    assert (plain.limit, low.limit, high.limit) == (1.0 / 1.5, 1.0, 1.0)  # in place of the margin
    assert plain.least < low.least < high.least
    assert low.latency_ms((0, 0, 0, 0)) == plain.amount((0, 0, 0, 0))


def test_a_confidence_that_cannot_be_kept_is_refused(tiny_space: SearchSpace) -> None:
    table = with_errors(tiny_space)
    with pytest.raises(UsageError, match=r"`confidence=0.99`.* at most 0.9"):
        latency_limit(table, 1.0, 0.99)
    with pytest.raises(TableError, match=r"on myriad-vpu are unknown, so `confidence=0.9` cannot be kept"):
        latency_limit(replace(table, uncertainty=None), 1.0, 0.9)
    with pytest.raises(InfeasibleBudgetError, match=r"at the upper end of its 0.9 interval"):
        check_limits((latency_limit(table, table.fastest_ms, 0.9),))
