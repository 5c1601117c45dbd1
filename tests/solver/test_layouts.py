"""The solve over a family against every network at every layout."""

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers.networks import WITH_BLOCK_TRANSITIONS, all_networks, same_network
from helpers.tiny import TINY_SPACE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qnas.common.errors import InfeasibleBudgetError, TableError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import RUNTIME, Cell
from qnas.solver.layouts import FamilyScores, FamilySolutions, solve_family
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import Scores, solve
from qnas.spaces.family import Layout, SpaceFamily, make_family
from qnas.spaces.space import SearchSpace, load_space, parse_space

BLOCKS = WITH_BLOCK_TRANSITIONS.replace("positions: 3", "positions: 2")


def family_of(text: str, widths: tuple[tuple[int, ...], ...], resolutions_px: tuple[int, ...]) -> SpaceFamily:
    content = parse_space(text, "tiny").written()
    content["input"]["resolution_px"] = max(resolutions_px)
    for stage, row in zip(content["stages"], widths, strict=True):
        stage["channels"] = max(row)
    return SpaceFamily(SearchSpace.model_validate(content), resolutions_px, widths)


CONVOLUTIONS = family_of(TINY_SPACE, ((8, 12), (16, 24, 32)), (16, 24, 32))
# the first position of a stage may be identity only where the width stays the same
TRANSITIONS = family_of(BLOCKS, ((8, 12), (8, 12), (8,)), (16, 32))


def drawn(*key: object) -> float:
    """Return a number that follows from a key, about normal."""
    return float(np.random.default_rng(zlib.crc32(repr(key).encode())).normal())


def random_scores(seed: int, family: SpaceFamily, *, alike: bool) -> FamilyScores:
    """Draw scores: of a candidate wherever it stands (`alike`), or by resolution and widths too."""

    def candidates(space: SearchSpace) -> Scores:
        where = () if alike else (space.input.resolution_px,)
        return tuple(
            tuple(
                round(drawn(seed, p.name, name, *where, *(() if alike else (p.c_in, p.c_out))), 2)
                for name in p.names
            )
            for p in space.positions
        )

    return FamilyScores(
        candidates,
        {px: drawn(seed, "px", px) for px in family.resolutions_px[1:]},
        tuple({c: drawn(seed, s, c) for c in row} for s, row in enumerate(family.widths)),
    )


def spread(family: SpaceFamily, limits_of: Callable[[SearchSpace], Limits], at: int) -> tuple[float, float]:
    found = [limits_of(family.at(layout))[at] for layout in family.layouts()]
    return min(limit.least for limit in found), max(limit.most for limit in found)


def by_brute_force(
    family: SpaceFamily, scores: FamilyScores, limits_of: Callable[[SearchSpace], Limits], k: int
) -> list[tuple[float, Layout]]:
    """The k best different networks by looking at every one at every layout."""
    best: dict[object, tuple[float, Layout]] = {}
    for layout in family.layouts():
        space = family.at(layout)
        limits, rows = limits_of(space), scores.candidates(space)
        for network in all_networks(space):
            if all(limit.amount(network) <= limit.limit for limit in limits):
                score = scores.constant(layout) + sum(row[i] for row, i in zip(rows, network, strict=True))
                key = layout, same_network(space, network)
                best[key] = max(best.get(key, (-math.inf, layout)), (score, layout))
    return sorted(best.values(), reverse=True)[:k]


def check(found: FamilySolutions, family: SpaceFamily, best: list[tuple[float, Layout]]) -> None:
    assert [each.score for each in found.networks] == pytest.approx([score for score, _ in best], abs=1e-9)
    assert [each.rank for each in found.networks] == list(range(1, 1 + len(best)))
    networks = [(e.layout, same_network(family.at(e.layout), e.solution.indices)) for e in found.networks]
    assert len(set(networks)) == len(networks)
    assert found.layouts == len(family)
    assert found.bound == pytest.approx(best[0][0], abs=1e-6)
    assert found.rest_bound <= best[-1][0] + 1e-6
    for each in found.networks:
        assert all(limit.amount(each.solution.indices) <= limit.limit for limit in each.solution.limits)
        assert each.solution.limits[0].table is not None
        assert each.solution.limits[0].table.space == family.name_of(each.layout)
    for verdict in found.verdicts:
        own = [score for score, layout in best if layout == verdict.layout]
        assert verdict.bound >= max(own, default=-math.inf) - 1e-9
        assert verdict.best == (pytest.approx(max(own), abs=1e-9) if own else None)


# a failure is not made smaller, which would take minutes
@settings(
    max_examples=12, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
@given(
    seed=st.integers(0, 10_000),
    family=st.sampled_from([CONVOLUTIONS, TRANSITIONS]),
    share=st.floats(0.02, 1.1),
    params=st.one_of(st.none(), st.floats(0.1, 1.0)),
    k=st.sampled_from([1, 5, 40]),
    alike=st.booleans(),
)
def test_the_networks_found_are_the_best_of_all_layouts(
    seed: int, family: SpaceFamily, share: float, params: float | None, k: int, alike: bool
) -> None:
    device = load_device("cpu")

    def unlimited(space: SearchSpace) -> Limits:
        return latency_limit(compute_table(device, space), 1e6), count_limit(space, "params", 1e12)

    low_ms, high_ms = spread(family, unlimited, 0)
    low, high = spread(family, unlimited, 1)

    def limits_of(space: SearchSpace) -> Limits:
        budget_ms = low_ms + share * (high_ms - low_ms)
        limits: Limits = (latency_limit(compute_table(device, space), budget_ms),)
        return (
            limits if params is None else (*limits, count_limit(space, "params", low + params * (high - low)))
        )

    scores = random_scores(seed, family, alike=alike)
    best = by_brute_force(family, scores, limits_of, k)
    if best:
        check(solve_family(family, scores, limits_of, k), family, best)
    else:
        with pytest.raises(InfeasibleBudgetError):
            solve_family(family, scores, limits_of, k)


def test_a_layout_whose_bound_is_low_is_not_solved() -> None:
    family = make_family(parse_space(TINY_SPACE, "t"), [16, 24, 32])
    device = load_device("cpu")
    scores = FamilyScores(
        lambda space: tuple(tuple(0.1 * i for i in range(len(p.names))) for p in space.positions),
        {16: -50.0, 24: -50.0},
    )
    found = solve_family(family, scores, lambda s: (latency_limit(compute_table(device, s), 100.0),), 5)
    assert {each.layout.resolution_px for each in found.networks} == {32}
    assert found.solved == 1
    assert found.rest_bound < -40
    assert [verdict.solved for verdict in found.verdicts] == [False, False, True]
    assert found.verdicts[0].bound == pytest.approx(-50 + 0.4 * 2 + 0.1 * 2, abs=1e-6)


def test_layouts_over_a_limit_are_dropped_and_only_the_others_are_solved() -> None:
    family = make_family(parse_space(TINY_SPACE, "t"), [16, 24, 32])
    device = load_device("cpu")

    def limits_of(space: SearchSpace) -> Limits:
        return (latency_limit(compute_table(device, space), 1.02 * fastest_ms),)

    fastest_ms = compute_table(device, family.at(next(family.layouts()))).fastest_ms
    scores = random_scores(1, family, alike=True)
    found = solve_family(family, scores, limits_of, 5)
    assert {each.layout.resolution_px for each in found.networks} == {16}
    assert [verdict.bound > -math.inf for verdict in found.verdicts] == [True, False, False]


def test_a_budget_that_no_layout_meets_names_the_least() -> None:
    family = make_family(parse_space(TINY_SPACE, "t"), [16, 24, 32])
    device = load_device("cpu")
    with pytest.raises(InfeasibleBudgetError) as error:
        solve_family(
            family,
            random_scores(0, family, alike=True),
            lambda space: (latency_limit(compute_table(device, space), 1e-3),),
        )
    assert str(error.value).startswith(
        "no network of tiny-16px runs in 0.001000 ms on cortex-a76: the fastest takes "
    )
    assert str(error.value).endswith("the least of 3 layouts of tiny")


def test_amounts_that_are_no_sums_over_blocks_are_refused() -> None:
    device = load_device("cpu")

    def limits_of(space: SearchSpace) -> Limits:
        table = compute_table(device, space)
        runtime_ms = 0.01 * sum(stage.channels for stage in space.stages)
        fixed = tuple((name, Cell(runtime_ms) if name == RUNTIME else cell) for name, cell in table.fixed)
        return (latency_limit(replace(table, fixed=fixed), 100.0),)

    with pytest.raises(TableError, match="expected sums over blocks"):
        solve_family(CONVOLUTIONS, random_scores(0, CONVOLUTIONS, alike=True), limits_of, 100)


@pytest.mark.slow
def test_few_of_a_thousand_layouts_of_a_mobile_space_are_solved() -> None:
    content, device = load_space("union-mobile").written(), load_device("cpu")
    widths = ((16,), (16, 24, 32), (32, 40, 48), (64, 80, 96), (72, 96, 120), (144, 192, 240), (320,))
    for stage, row in zip(content["stages"], widths, strict=True):
        stage["channels"] = max(row)
    family = SpaceFamily(SearchSpace.model_validate(content), (128, 160, 192, 224), widths)
    assert len(family) == 972

    def candidates(space: SearchSpace) -> Scores:
        return tuple(
            tuple(0.0 if name == "identity" else 0.03 + 0.02 * drawn(p.name, name) for name in p.names)
            for p in space.positions
        )

    scores = FamilyScores(
        candidates,
        {128: -0.3, 160: -0.15, 192: -0.05},
        tuple({c: 0.02 * at for at, c in enumerate(row)} for row in widths),
    )
    best = []
    for budget_ms in (20.0, 40.0):

        def limits_of(space: SearchSpace, most_ms: float = budget_ms) -> Limits:
            return latency_limit(compute_table(device, space), most_ms), count_limit(space, "params", 6e6)

        found = solve_family(family, scores, limits_of, 20)
        assert len(found.networks) == 20
        assert found.solved < 20
        assert found.rest_bound <= found.networks[-1].score + 1e-6
        best.append(found.networks[0])
        # the best network of a layout is no better, whichever it is
        rng = np.random.default_rng(0)
        for _ in range(5):
            layout = Layout(
                int(rng.choice(family.resolutions_px)), tuple(int(rng.choice(row)) for row in widths)
            )
            space = family.at(layout)
            own = solve(scores.candidates(space), limits_of(space)).score + scores.constant(layout)
            assert own <= found.bound + 1e-6
    assert best[1].score > best[0].score
