from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers.tiny import TWO_KINDS

from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.mixed_block import Route
from qnas.nn.supernet import LimitTensors, candidate_mask, even_logits, limit_tensors, probabilities
from qnas.search.paths import FairPaths, ends_of, fair_logits, kind_numbers
from qnas.solver.distributions import levelled, max_entropy_strengths
from qnas.solver.kinds import count_blocks, kinds_of, names_of
from qnas.solver.limits import count_limit, latency_limit
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.block_order import block_labels, place_blocks_first
from qnas.spaces.lower import count_macs, lower, smallest_and_largest
from qnas.spaces.space import SearchSpace, load_space, parse_space


@pytest.fixture
def two_kinds() -> SearchSpace:
    return parse_space(TWO_KINDS, "two-kinds.yaml")


def limits_at(space: SearchSpace, share: float) -> LimitTensors:
    table = compute_table(load_device("cpu"), space)
    reach = table.slowest_ms - table.fastest_ms
    return limit_tensors((latency_limit(table, table.fastest_ms + share * reach),))


def indices_of(path: Sequence[Route]) -> tuple[int, ...]:
    found = tuple(route for route in path if isinstance(route, int))
    assert len(found) == len(path)
    return found


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_kinds_take_turns_at_every_place(two_kinds: SearchSpace, share: float) -> None:
    fair = FairPaths(two_kinds, limits_at(two_kinds, share), candidate_mask(two_kinds), seed=3)
    kinds, generator = kinds_of(two_kinds), torch.Generator().manual_seed(0)
    seen: list[list[str]] = [[] for _ in kinds]
    for _ in range(200):
        path = indices_of(fair.draw(generator))
        assert place_blocks_first(block_labels(two_kinds), path) == path
        for own, row, index in zip(seen, kinds, path, strict=True):
            own.append(row[index])
        for own in seen:
            counts = [own.count(name) for name in names_of(kinds)]
            assert max(counts) - min(counts) <= 1
    assert all("" in own for own in seen) or share == 1.0, "the limits ask for identities"
    # the turns are not the same at all places, nor in all rounds
    assert len({tuple(own[:20]) for own in seen}) > 1
    blocks = [name for name in seen[0] if name]
    assert len({tuple(blocks[i : i + 2]) for i in range(0, len(blocks) - 1, 2)}) == 2


def test_the_counts_and_the_generator_are_all_that_later_paths_depend_on(two_kinds: SearchSpace) -> None:
    limits, mask = limits_at(two_kinds, 0.5), candidate_mask(two_kinds)
    first, generator = FairPaths(two_kinds, limits, mask, seed=1), torch.Generator().manual_seed(0)
    for _ in range(7):
        first.draw(generator)
    twin, again = FairPaths(two_kinds, limits, mask, seed=1), torch.Generator()
    twin.counts, state = list(first.counts), generator.get_state()
    again.set_state(state)
    expected = [first.draw(generator) for _ in range(20)]
    assert [twin.draw(again) for _ in range(20)] == expected
    # another seed has other turns
    other = FairPaths(two_kinds, limits, mask, seed=2)
    again.set_state(state)
    other.counts = list(twin.counts)
    assert [other.draw(again) for _ in range(20)] != expected


@pytest.mark.parametrize("name", ["union-mobile", "two-kinds"])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_fair_paths_are_within_the_limits_on_average(name: str, share: float, two_kinds: SearchSpace) -> None:
    space = two_kinds if name == "two-kinds" else load_space(name)
    limits, mask, groups = limits_at(space, share), candidate_mask(space), kind_numbers(space)
    p = torch.softmax(fair_logits(limits, mask, groups), 1)
    expected = float(limits.fixed[0] + (p * limits.cells[0]).sum())
    assert expected <= float(limits.limit[0]) * (1 + 1e-4)
    for row, own in zip(p.numpy(), groups, strict=True):
        masses = [row[own == kind].sum() for kind in range(own.max() + 1)]
        assert masses == pytest.approx([masses[0]] * len(masses))
    even = probabilities(even_logits(limits, mask), mask)
    assert not torch.allclose(p, even, atol=0.01), "evenly drawn kinds are not equally likely here"
    if share < 0.5:  # a limit that binds is taken
        assert expected == pytest.approx(float(limits.limit[0]), rel=1e-3)


def test_fair_probabilities_have_the_largest_entropy_of_their_kind(two_kinds: SearchSpace) -> None:
    """Against a general solver, on one position: the entropy under both conditions."""
    from scipy.optimize import minimize

    cells = np.array([1.0, 3.0, 2.0, 6.0, 0.0])
    groups = np.array([[0, 0, 1, 1, -1]])
    limit, fixed = np.array([2.0]), np.array([0.5])
    mask = np.ones((1, 5), dtype=bool)
    (strength,) = max_entropy_strengths(fixed, cells[None, None], limit, mask, tolerance=1e-9, groups=groups)
    logits = levelled(-strength * cells[None] / limit[0], groups)[0]
    ours = np.exp(logits) / np.exp(logits).sum()
    found = minimize(
        lambda p: float((p * np.log(np.maximum(p, 1e-300))).sum()),
        np.full(5, 0.2),
        method="SLSQP",
        bounds=[(1e-9, 1)] * 5,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "eq", "fun": lambda p: p[:2].sum() - p[2:4].sum()},
            {"type": "ineq", "fun": lambda p: limit[0] - fixed[0] - p @ cells},
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    assert ours == pytest.approx(found.x, abs=1e-4)


def test_with_one_kind_fair_is_even(tiny_space: SearchSpace) -> None:
    limits, mask = limits_at(tiny_space, 0.4), candidate_mask(tiny_space)
    fair = torch.softmax(fair_logits(limits, mask, kind_numbers(tiny_space)), 1)
    torch.testing.assert_close(fair, probabilities(even_logits(limits, mask), mask), atol=1e-4, rtol=0)


def test_the_ends_of_a_space_are_its_smallest_and_largest_network(tiny_space: SearchSpace) -> None:
    ends = ends_of(tiny_space, seed=0)
    least, most = (arch.indices(tiny_space) for arch in smallest_and_largest(tiny_space))
    assert indices_of(ends.smallest) == least
    assert {indices_of(ends.largest(step)) for step in range(5)} == {most}


def test_kinds_take_turns_in_the_largest_network(two_kinds: SearchSpace) -> None:
    ends, kinds = ends_of(two_kinds, seed=0), kinds_of(two_kinds)
    found = [indices_of(ends.largest(step)) for step in range(40)]
    assert found == [indices_of(ends_of(two_kinds, seed=0).largest(step)) for step in range(40)]
    assert len(set(found)) > 2, "kinds are mixed"
    for place, row in enumerate(kinds):
        names = [row[path[place]] for path in found]
        assert all(set(names[i : i + 2]) == {"quadra", "quadra_linear"} for i in range(0, 40, 2))
    # each has the most MACs among the networks with its kinds
    for path in found[:4]:
        macs = count_macs(lower(two_kinds, arch_from_indices(two_kinds, path)))
        for place, row in enumerate(kinds):
            for other, name in enumerate(row):
                if name == row[path[place]]:
                    changed = (*path[:place], other, *path[place + 1 :])
                    assert count_macs(lower(two_kinds, arch_from_indices(two_kinds, changed))) <= macs
    assert not any(count_blocks(kinds, indices_of(ends.smallest)).values())


def test_limits_of_every_sort_hold_for_fair_paths(two_kinds: SearchSpace) -> None:
    table = compute_table(load_device("cpu"), two_kinds)
    least, most = smallest_and_largest(two_kinds)
    macs = [count_macs(lower(two_kinds, arch)) for arch in (least, most)]
    both = limit_tensors(
        (
            latency_limit(table, 0.5 * (table.fastest_ms + table.slowest_ms)),
            count_limit(two_kinds, "macs", macs[0] + 0.2 * (macs[1] - macs[0])),
        )
    )
    p = torch.softmax(fair_logits(both, candidate_mask(two_kinds), kind_numbers(two_kinds)), 1)
    expected = both.fixed + (p * both.cells).sum((1, 2))
    assert bool((expected <= both.limit * (1 + 1e-4)).all())
