import itertools

import pytest

from qnas.common.errors import InfeasibleBudgetError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.solver.limits import COUNTS, Count, check_limits, count_limit, latency_limit
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
