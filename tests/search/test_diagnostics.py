import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from qnas.common.errors import TrainingError
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import compute_table, load_table
from qnas.search.diagnostics import Sight, Undecided, Watch, make_watch, undecided
from qnas.solver.limits import Limit, count_limit, latency_limit
from qnas.spaces.space import SearchSpace, load_space
from qnas.training.loop import check_finite

SOUND = Sight(
    progress=0.2,
    settling=False,
    ratio=1.0,
    multiplier=0.1,
    entropy=1.2,
    identity_share=0.4,
    shares={"identity": 0.4, "quadra_k3_e2": 0.3, "quadra_k3_e4": 0.3},
)


FIGURES = ("ratio", "multiplier", "entropy", "identity_share", "shares")


def fresh() -> Watch:
    return Watch(
        arch_window=20,
        bound_window=60,
        weight_window=10,
        weight_windows=10,
        guess=math.log(10),
        multiplier_bound=3.0,
        expects=Undecided(identity_share=0.4, entropy=1.5),
    )


def look(watch: Watch, sight: Sight, steps: int = 1) -> list[str]:
    return [warning for _ in range(steps) for warning in watch.after_arch_step(sight)]


def train(watch: Watch, loss: float, steps: int) -> list[str]:
    return [warning for _ in range(steps) for warning in watch.after_weight_step(loss)]


# what provokes a condition, after how many steps, and what is said
CONDITIONS: dict[str, tuple[Sight, int, str]] = {
    "stall": (replace(SOUND, ratio=1.4), 20, "has stood at 140% of the limit for 20 architecture steps"),
    "stall below": (replace(SOUND, ratio=0.6), 20, "has stood at 60% of the limit"),
    "unsettled": (
        replace(SOUND, progress=0.9, settling=True, ratio=1.05),
        20,
        "has stood at 105% of the limit",
    ),
    "bound": (replace(SOUND, multiplier=-3.0), 60, "at its bound, -3, for 60 architecture steps"),
    "identities": (
        replace(SOUND, identity_share=0.8),
        1,
        "identity has 80% of the probability, where the limit asks for 40%",
    ),
    "one candidate": (
        replace(SOUND, shares={"identity": 0.02, "quadra_k3_e2": 0.98}),
        1,
        "quadra_k3_e2 has 98% of the probability everywhere at 20% of the search",
    ),
    "decided": (replace(SOUND, entropy=0.01), 1, "decided at 20% of the search"),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_is_said_once_until_it_has_cleared(condition: str) -> None:
    sight, steps, message = CONDITIONS[condition]
    watch = fresh()
    assert look(watch, SOUND, 50) == []
    assert look(watch, sight, steps - 1) == []
    (said,) = look(watch, sight)
    assert message in said
    assert look(watch, sight, 100) == []
    sound = replace(sight, **{f: getattr(SOUND, f) for f in FIGURES})
    assert look(watch, sound, 30) == []
    assert len(look(watch, sight, steps)) == 1


def test_what_moves_is_no_stall_however_far_it_is() -> None:
    watch = fresh()
    for step in range(200):
        assert look(watch, replace(SOUND, ratio=3.0 * 0.993**step + 0.2)) == []
    # nor what is near, before the search settles
    assert look(fresh(), replace(SOUND, ratio=1.2), 200) == []


def test_late_in_a_search_the_probabilities_may_be_decided() -> None:
    late = replace(SOUND, progress=0.6, entropy=0.001, shares={"identity": 0.0, "quadra_k3_e4": 1.0})
    assert look(fresh(), late, 100) == []


def test_without_a_binding_limit_only_the_loss_is_watched() -> None:
    watch = replace(fresh(), expects=None)
    for sight, _, _ in CONDITIONS.values():
        assert look(watch, sight, 100) == []
    assert len(train(watch, 2.4, 100)) == 1


def test_a_loss_that_stays_at_guessing_is_said_by_half_of_the_training() -> None:
    watch = fresh()
    assert train(watch, math.log(10), 49) == []
    (said,) = train(watch, math.log(10), 1)
    assert "still that of guessing, 2.30 nats" in said
    assert train(watch, math.log(10), 50) == []
    # and one that falls slowly is not
    watch = fresh()
    for step in range(100):
        assert train(watch, 2.4 - 0.01 * step, 1) == []


def test_a_loss_that_rises_is_said() -> None:
    watch = fresh()
    assert train(watch, 2.0, 10) + train(watch, 0.8, 20) + train(watch, 1.15, 10) == []
    (said,) = train(watch, 1.3, 10)
    assert "risen to 1.30 nats from 0.80" in said
    assert train(watch, 1.3, 10) + train(watch, 0.9, 10) == []
    assert len(train(watch, 1.3, 10)) == 1


def test_a_watch_goes_on_from_what_it_saved() -> None:
    def play(watch: Watch, steps: range) -> list[tuple[int, str]]:
        said = []
        for step in steps:
            bad = (step // 70) % 2 == 1
            sight = CONDITIONS["stall"][0] if bad else SOUND
            said += [(step, text) for text in look(watch, replace(sight, multiplier=3.0))]
            said += [(step, text) for text in train(watch, 2.0 if bad else 1.0, 1)]
        return said

    whole = play(fresh(), range(300))
    assert len(whole) >= 4
    for cut in (5, 75, 95, 142, 233):
        first, second = fresh(), fresh()
        before = play(first, range(cut))
        saved: dict[str, Any] = first.to_dict()
        second.load(saved)
        assert before + play(second, range(cut, 300)) == whole
        assert first.to_dict() == {**saved, **first.to_dict()}


def spread(p: np.ndarray[Any, Any]) -> float:
    """The entropy of rows, in nats, mean over them."""
    return float(-(p * np.log(p)).sum() / len(p))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_undecided_probabilities_keep_the_limit_with_the_most_entropy(share: float) -> None:
    # two positions of a made-up device, against a general solver
    space = load_space("quadranet-small")
    count = len(space.positions)
    candidates = [len(position.names) for position in space.positions]
    rng = np.random.default_rng(0)
    cells = tuple(tuple(rng.random(n) + 0.1) for n in candidates)
    limit = Limit("params", 0.0, 0.0, 1.0, cells)
    budget = limit.least + share * (limit.most - limit.least)
    limit = replace(limit, budget=budget, limit=budget)
    found = undecided(space, limit)
    sizes = np.cumsum([0, *candidates])
    flat = np.concatenate([np.array(row) for row in cells])

    def by_position(p: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        return [p[a:b] for a, b in pairwise(sizes)]

    solved = minimize(
        lambda p: float((p * np.log(p)).sum()),
        np.concatenate([np.full(n, 1 / n) for n in candidates]),
        jac=lambda p: np.log(p) + 1,
        bounds=[(1e-9, 1.0)] * len(flat),
        constraints=[
            {"type": "eq", "fun": lambda p: np.array([row.sum() - 1 for row in by_position(p)])},
            {"type": "eq", "fun": lambda p: 1.0 + float(p @ flat) - budget},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    assert solved.success
    assert found.entropy == pytest.approx(-solved.fun / count, abs=1e-4)
    shares = [
        row[position.names.index("identity")]
        for row, position in zip(by_position(solved.x), space.positions, strict=True)
        if "identity" in position.names
    ]
    assert found.identity_share == pytest.approx(float(np.mean(shares)), abs=1e-3)


@pytest.mark.parametrize("device", list(device_names()))
def test_a_tighter_budget_asks_for_more_identities(device: str) -> None:
    space = load_space("quadranet-mobile")
    table = load_table(load_device(device), space)
    span = table.slowest_ms - table.fastest_ms
    shares = [
        undecided(space, latency_limit(table, table.fastest_ms + s * span)).identity_share
        for s in (0.0, 0.15, 0.5, 0.9)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(1, abs=1e-3)


def test_of_several_limits_the_tightest_is_expected_to_be_met(tiny_space: SearchSpace) -> None:
    table = compute_table(load_device("vpu"), tiny_space)
    slow = latency_limit(table, 2 * table.slowest_ms)
    params = count_limit(tiny_space, "params", 1.0)
    tight = replace(params, limit=params.least + 0.2 * (params.most - params.least))
    loose = replace(params, limit=params.least + 0.8 * (params.most - params.least))

    def expects(*limits: Limit) -> Undecided | None:
        return make_watch(
            tiny_space, limits, weight_steps=100, arch_steps=40, guess=math.log(10), multiplier_bound=3.0
        ).expects

    assert expects(slow) is None
    assert expects(slow, loose, tight) == expects(tight) == undecided(tiny_space, tight)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_refused_with_its_step(loss: float) -> None:
    with pytest.raises(TrainingError, match=r"step 7: the loss is .* last checkpoint .* `batch_size`"):
        check_finite(loss, 7)
    check_finite(0.0, 7)
