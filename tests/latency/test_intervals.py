"""Intervals cover what they say, and are wider where less is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnas.common.errors import UsageError
from qnas.latency.device import Device, load_device
from qnas.latency.intervals import (
    LEVELS,
    Errors,
    Uncertainty,
    of_sample,
    pooled,
    relative_errors,
)

RNG = np.random.default_rng(0)


def uncertainty(weight: float = 2.0) -> Uncertainty:
    errors = tuple(Errors(level=level, low=-0.1 * level, high=0.2 * level) for level in LEVELS)
    return Uncertainty(source="test", networks=100, families=5, weight=weight, errors=errors)


@given(st.floats(1e-3, 1e6), st.floats(0, 1), st.sampled_from(LEVELS))
def test_an_interval_contains_its_prediction(latency_ms: float, share: float, level: float) -> None:
    interval = uncertainty().interval(latency_ms, share * latency_ms, level)
    assert 0 <= interval.low_ms <= latency_ms <= interval.high_ms
    assert interval.level == level


@given(st.floats(1e-3, 1e6), st.floats(0, 1))
def test_a_higher_level_is_wider(latency_ms: float, share: float) -> None:
    found = [uncertainty().interval(latency_ms, share * latency_ms, level) for level in LEVELS]
    for inner, outer in pairwise(found):
        assert outer.low_ms < inner.low_ms
        assert outer.high_ms > inner.high_ms


@given(st.floats(1e-3, 1e6), st.floats(0, 0.9), st.floats(0.01, 0.1))
def test_an_estimated_share_widens(latency_ms: float, share: float, more: float) -> None:
    less, wider = (uncertainty().interval(latency_ms, s * latency_ms) for s in (share, share + more))
    assert wider.low_ms < less.low_ms
    assert wider.high_ms > less.high_ms


def test_the_upper_end_is_a_sum_over_blocks() -> None:
    blocks = RNG.uniform(0, 5, (20, 2))
    blocks[:, 1] *= blocks[:, 0] / 5  # estimated: a part
    model, high = uncertainty(), uncertainty().at(0.9).high
    whole = model.interval(*blocks.sum(axis=0).tolist()).high_ms
    assert math.fsum(
        model.end_ms(ms, estimated_ms, high) for ms, estimated_ms in blocks.tolist()
    ) == pytest.approx(whole)


def test_a_level_between_those_of_the_device_gets_the_next_one() -> None:
    assert uncertainty().interval(1.0, 0.0, 0.6).level == 0.8
    assert uncertainty().widest(1.0, 0.0, 0.99).level == 0.95
    with pytest.raises(UsageError, match=r"`confidence=0.99`.* at most 0.95"):
        uncertainty().interval(1.0, 0.0, 0.99)


def test_every_family_has_the_same_weight() -> None:
    # a family of 10,000 networks that are right, and one of 10 that take twice as long
    by_family = {"many": np.zeros(10_000), "few": np.full(10, 1.0)}
    assert pooled(by_family, weight=1, source="").at(0.9).high == 1.0
    alone = pooled({"many": np.zeros(10_000)}, weight=1, source="")
    assert alone.at(0.95).high == 0.0


def test_pooled_errors_are_the_quantiles_of_equal_families() -> None:
    families = {str(i): RNG.normal(0.02 * i, 0.1, 500) for i in range(6)}
    everything = np.concatenate(list(families.values()))
    found = pooled(families, weight=1, source="")
    for each in found.errors:
        inside = np.mean((everything >= each.low) & (everything <= each.high))
        assert inside == pytest.approx(each.level, abs=0.01)


@pytest.mark.parametrize(("n", "levels"), [(2, ()), (3, (0.5,)), (19, (0.5, 0.8, 0.9)), (39, LEVELS)])
def test_a_sample_has_the_levels_that_its_size_allows(n: int, levels: tuple[float, ...]) -> None:
    found = of_sample(RNG.normal(0, 0.1, n), source="")
    assert (tuple(each.level for each in found.errors) if found else ()) == levels


def test_a_new_network_is_within_the_interval_of_a_sample_as_often_as_said() -> None:
    hits = dict.fromkeys(LEVELS, 0)
    times = 2000
    for _ in range(times):
        errors = RNG.exponential(0.1, 60) - 0.05
        found = of_sample(errors[:59], source="")
        assert found is not None
        for each in found.errors:
            hits[each.level] += each.low <= errors[59] <= each.high
    for level, hit in hits.items():
        assert hit / times >= level - 4 * math.sqrt(level * (1 - level) / times)


def test_errors_count_estimated_milliseconds_by_their_weight() -> None:
    measured, latency, estimated = np.array([12.0]), np.array([10.0]), np.array([5.0])
    assert relative_errors(measured, latency, estimated, 3.0)[0] == pytest.approx(2.0 / 20.0)


def test_a_calibration_without_intervals_has_its_margin_as_the_upper_end() -> None:
    content = load_device("cpu").model_dump(mode="json", by_alias=True)
    content.pop("uncertainty")
    assert Device.model_validate(content).known_uncertainty is None
    content["calibration"] = {
        **{"scale": 1.0, "offset_ms": 0.0, "margin": 0.25, "level": 0.8, "n": 20},
        **{"date": "2026-01-01", "source": "test"},
    }
    known = Device.model_validate(content).known_uncertainty
    assert known is not None
    interval = known.interval(8.0, 2.0, 0.8)
    assert (interval.low_ms, interval.high_ms, interval.level) == (0.0, 10.0, 0.8)


def test_narrower_errors_at_a_higher_level_are_refused() -> None:
    errors = (Errors(level=0.5, low=-0.2, high=0.2), Errors(level=0.9, low=-0.1, high=0.3))
    with pytest.raises(ValueError, match="rising levels"):
        Uncertainty(source="", networks=10, errors=errors)
