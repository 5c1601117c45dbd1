"""Timing in rounds, on a clock that only the calls move."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qnas.deploy.timing import (
    Call,
    Stopwatch,
    Timing,
    host_stopwatch,
    noisy,
    sample_rounds,
    spread,
    summarise,
)


class Clock:
    """A clock in nanoseconds that stands still unless a call lets time pass."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.log: list[str] = []

    def stopwatch(self) -> Stopwatch:
        return host_stopwatch(lambda: self.now_ns)

    def call(self, name: str, milliseconds: Callable[[], float]) -> Call:
        def run() -> None:
            self.log.append(name)
            self.now_ns += round(1e6 * milliseconds())

        return run


def timings_of(calls: dict[str, Call], repeats: int, clock: Clock, **options: Any) -> dict[str, Timing]:
    *_, samples = sample_rounds(calls, repeats, clock.stopwatch(), **options)
    return {name: summarise(values) for name, values in samples.items()}


def test_a_call_takes_what_its_clock_says() -> None:
    clock = Clock()
    calls = {"a": clock.call("a", lambda: 2.0), "b": clock.call("b", lambda: 0.5)}
    timings = timings_of(calls, 5, clock)
    assert {name: t.median_ms for name, t in timings.items()} == {"a": 2.0, "b": 0.5}
    assert all(t.p95_ms == t.median_ms and t.spread == 0 and t.repeats == 5 for t in timings.values())


def test_a_short_call_is_timed_in_loops_and_costs_a_share_of_them() -> None:
    clock = Clock()
    calls = {"short": clock.call("short", lambda: 0.001)}
    timings = timings_of(calls, 3, clock, warm_up=2, min_sample_ms=0.1)
    assert timings["short"].median_ms == pytest.approx(0.001)
    assert len(clock.log) == 2 + 3 * (1 + 100)  # warm-up, then a call without timing before each loop


def test_every_round_visits_all_calls_once_and_orders_differ() -> None:
    clock = Clock()
    names = "abcdef"
    calls = {name: clock.call(name, lambda: 1.0) for name in names}
    timings_of(calls, 6, clock, warm_up=1)
    visits = clock.log[len(names) :: 2]  # each visit is an untimed call and a timed one
    rounds = [visits[i : i + len(names)] for i in range(0, len(visits), len(names))]
    assert len(rounds) == 6
    assert all(sorted(one) == sorted(names) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_a_slow_spell_hits_all_calls_alike() -> None:
    clock = Clock()
    start = 30e6  # the machine is three times slower for some time

    def slowed(milliseconds: float) -> Callable[[], float]:
        return lambda: milliseconds * (3 if start < clock.now_ns < 10 * start else 1)

    calls = {"a": clock.call("a", slowed(1.0)), "b": clock.call("b", slowed(2.0))}
    timings = timings_of(calls, 40, clock)
    assert timings["b"].median_ms == pytest.approx(2 * timings["a"].median_ms)
    assert timings["a"].p95_ms == 3.0  # the spell was there


def test_the_first_call_of_a_visit_does_not_count() -> None:
    clock = Clock()
    last: list[str] = []

    def cold(name: str) -> Callable[[], float]:
        def cost() -> float:
            was_cold = last[-1:] != [name]
            last.append(name)
            return 5.0 if was_cold else 1.0

        return cost

    calls = {name: clock.call(name, cold(name)) for name in "ab"}
    timings = timings_of(calls, 4, clock)
    assert [timings[name].median_ms for name in "ab"] == [1.0, 1.0]


def test_noisy_calls_are_named_the_noisiest_first() -> None:
    timings = {name: Timing(1.0, 1.0, spread, 5) for name, spread in (("a", 0.02), ("b", 0.01), ("c", 0.03))}
    assert noisy(timings, 0.01) == ("c", "a")


def test_spread_is_the_standard_error_of_a_normal_median() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(10.0, 1.0, (2000, 100))
    found = np.mean([spread(row) for row in draws])
    assert found == pytest.approx(np.median(draws, axis=1).std() / 10.0, rel=0.05)


def test_spread_ignores_a_few_interruptions() -> None:
    values = list(np.linspace(0.99, 1.01, 50))
    assert spread([*values, 100.0, 200.0]) == pytest.approx(spread(values), rel=0.1)


def test_earlier_samples_count() -> None:
    clock = Clock()
    calls = {"a": clock.call("a", lambda: 1.0), "b": clock.call("b", lambda: 1.0)}
    earlier = {"a": [7.0, 7.0, 7.0], "b": [8.0] * 5}
    rounds = list(sample_rounds(calls, 5, clock.stopwatch(), earlier=earlier))
    assert [samples["a"] for samples in rounds] == [(7.0, 7.0, 7.0, 1.0), (7.0, 7.0, 7.0, 1.0, 1.0)]
    assert [samples["b"] for samples in rounds] == [(8.0,) * 5] * 2
    assert "b" not in clock.log
    assert earlier["a"] == [7.0, 7.0, 7.0]
    assert not list(sample_rounds(calls, 3, clock.stopwatch(), earlier=earlier))


def test_another_seed_is_another_order() -> None:
    logs = []
    for seed in (0, 0, 1):
        clock = Clock()
        calls = {name: clock.call(name, lambda: 1.0) for name in "abcdef"}
        timings_of(calls, 3, clock, seed=seed)
        logs.append(clock.log)
    assert logs[0] == logs[1] != logs[2]


def test_no_calls_take_nothing() -> None:
    assert not list(sample_rounds({}, 5, Clock().stopwatch()))
