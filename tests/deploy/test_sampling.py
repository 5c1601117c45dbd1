from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qnas.common.errors import CheckpointError, UsageError
from qnas.deploy.sampling import CSV_FILE, choose_networks, write_sample
from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.fitting.measurements import read_measured
from qnas.latency.table import LatencyTable
from qnas.runs.found_arch import find_arch
from qnas.solver.distributions import sample_near
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space

N = 60


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("quadranet-small")


@pytest.fixture(scope="module")
def table(space: SearchSpace) -> LatencyTable:
    return load_table(load_device("cpu"), space)


@pytest.fixture(scope="module")
def networks(space: SearchSpace, table: LatencyTable) -> list[tuple[int, ...]]:
    return choose_networks(space, table, N, 0)


def test_one_seed_gives_one_sample(
    space: SearchSpace, table: LatencyTable, networks: list[tuple[int, ...]]
) -> None:
    assert choose_networks(space, table, N, 0) == networks
    assert choose_networks(space, table, N, 1) != networks


def test_networks_are_all_different(networks: list[tuple[int, ...]]) -> None:
    assert len(set(networks)) == len(networks) == N


def test_every_tenth_of_the_latency_range_holds_about_a_tenth_of_the_networks(
    table: LatencyTable, networks: list[tuple[int, ...]]
) -> None:
    edges = np.linspace(table.fastest_ms, table.slowest_ms, 11)
    held, _ = np.histogram([table.latency_ms(indices) for indices in networks], edges)
    # windows at the lower end hold one network or none, and then others take their place
    assert held.min() >= 0.5 * N / 10
    assert held.max() <= 1.5 * N / 10


def test_every_candidate_occurs_at_every_position_and_all_but_identity_alike(
    networks: list[tuple[int, ...]],
) -> None:
    counts = np.array([np.bincount(position, minlength=7) for position in np.array(networks).T])
    assert counts.min() >= N / 7 / 3
    *blocks, identity = counts.sum(axis=0)
    # the fastest and the slowest networks consist of identities and of the dearest block
    assert max(blocks[:-1]) < 1.4 * min(blocks)
    assert blocks[-1] < 2 * min(blocks)
    assert identity < 4 * min(blocks)


def test_networks_pin_down_latencies_over_the_whole_range(
    space: SearchSpace, table: LatencyTable, networks: list[tuple[int, ...]]
) -> None:
    """By the variance of a least-squares prediction: costs of blocks, errors relative to the latency."""

    def row(indices: tuple[int, ...]) -> NDArray[np.float64]:
        layers = [b.layers for b in lower(space, arch_from_indices(space, indices)) if b.layers not in fixed]
        counts = [1, *(layers.count(block) for block in distinct)]
        return np.array(counts) / table.latency_ms(indices)

    def error(sample: list[tuple[int, ...]]) -> float:
        rows = np.array([row(indices) for indices in sample])
        covariance = np.linalg.inv(rows.T @ rows)
        return float(np.sqrt(np.einsum("ij,jk,ik->i", probes, covariance, probes).mean()))

    sizes = [len(p.candidates) for p in space.positions]
    alike = [lower(space, arch_from_indices(space, (i,) * len(sizes))) for i in range(7)]
    fixed = [b.layers for b in alike[-1]]  # of identities: in every network
    distinct = list(dict.fromkeys(b.layers for blocks in alike for b in blocks if b.layers not in fixed))
    assert len(distinct) == 18
    rng = np.random.default_rng(0)
    edges = np.linspace(table.fastest_ms, table.slowest_ms, 21)
    windows = [sample_near(table, low, high, 8, rng) for low, high in pairwise(edges)]
    probes = np.array([row(indices) for window in windows for indices in window])
    random = [tuple(int(rng.integers(size)) for size in sizes) for _ in range(N)]
    edges = np.linspace(table.fastest_ms, table.slowest_ms, N + 1)
    spread = [i for low, high in pairwise(edges) for i in sample_near(table, low, high, 1, rng)]
    assert error(networks) < 0.9 * error(spread) < 0.3 * error(random)


def test_more_networks_than_there_are_are_refused(tiny_space: SearchSpace) -> None:
    table = load_table(load_device("cpu"), tiny_space)
    assert len(choose_networks(tiny_space, table, 40, 0)) == 40
    with pytest.raises(UsageError, match="`networks=101`: space tiny has only 100 networks"):
        choose_networks(tiny_space, table, 101, 0)


def test_a_written_sample_reads_back(
    space: SearchSpace, networks: list[tuple[int, ...]], tmp_path: Path
) -> None:
    file = write_sample(space, networks[:12], tmp_path, kind=None, seed=0, quiet=True)
    assert file == tmp_path / CSV_FILE
    rows = read_measured(file, space)
    assert [row.arch.indices(space) for row in rows] == networks[:12]
    assert [row.name for row in rows][:2] == ["quadranet-small-01", "quadranet-small-02"]
    assert {row.latency_ms for row in rows} == {None}
    for row in rows:
        found = find_arch(tmp_path / f"{row.name}.json")
        assert (found.arch, found.space.digest) == (row.arch, space.digest)


def test_a_sample_that_may_hold_times_is_not_replaced(
    space: SearchSpace, networks: list[tuple[int, ...]], tmp_path: Path
) -> None:
    file = write_sample(space, networks[:3], tmp_path, kind=None, seed=0)
    file.write_text("times", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists already, perhaps with times: `force=True`"):
        write_sample(space, networks[:4], tmp_path, kind=None, seed=0)
    assert file.read_text(encoding="utf-8") == "times"
    write_sample(space, networks[:4], tmp_path, kind=None, seed=0, force=True)
    assert len(read_measured(file, space)) == 4
