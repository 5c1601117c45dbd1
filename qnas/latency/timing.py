"""Timing calls in rounds, so that a slow spell of a shared machine hits all of them alike.

A round visits every call once, in a new random order; a call's latency is the median of its visits,
which an interruption now and then does not move. A visit starts with a call that is not timed, which
brings back what the others have put out of the caches. Calls too short for a clock are timed in loops.
What is still noisy after all rounds is visited more often, up to a bound, and reported if it stays so.

What a clock is, is not known here: a host's, or events on an accelerator's stream (`qnas.runtimes`).
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]
Stopwatch = Callable[[Call, int], float]  # runs a call so many times; milliseconds of all together

REPEATS = 50
WARM_UP = 10
TOLERANCE = 0.01  # what is above this spread is noisy
MIN_SAMPLE_MS = 0.2  # a thousand times what reading the clock takes
MOST_REPEATS = 4  # times `repeats`: the bound for noisy calls

# A normal distribution's median of n has a standard error of sqrt(pi / 2n) sigma, and its
# interquartile range is 1.349 sigma.
_ERROR_PER_IQR = math.sqrt(math.pi / 2) / 1.349


@dataclass(frozen=True)
class Timing:
    """What a call takes, from so many visits."""

    median_ms: float
    p95_ms: float
    spread: float  # standard error of the median, from the interquartile range, relative to the median
    repeats: int

    def __post_init__(self) -> None:
        assert self.repeats > 0, self
        assert 0 <= self.median_ms <= self.p95_ms < math.inf, self


def host_stopwatch(clock_ns: Callable[[], int] = time.perf_counter_ns) -> Stopwatch:
    """Return a stopwatch that reads the host's clock: for calls that return when they are done."""

    def run(call: Call, loops: int) -> float:
        start = clock_ns()
        for _ in range(loops):
            call()
        return (clock_ns() - start) / 1e6

    return run


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    repeats: int = REPEATS,
    warm_up: int = WARM_UP,
    tolerance: float = TOLERANCE,
    min_sample_ms: float = MIN_SAMPLE_MS,
    stopwatch: Stopwatch | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Return what each of these calls takes, in milliseconds a call.

    Calls whose spread is above the tolerance after `repeats` rounds are visited up to
    `MOST_REPEATS * repeats` times; `noisy(timings, tolerance)` says which stay so. `on_progress` is
    told, after every round, how many visits are made and how many there will be as far as is known.
    """
    samples: Mapping[str, Sequence[float]] = {}  # stays so where there are no calls
    for samples, left in sample_rounds(
        calls,
        repeats=repeats,
        warm_up=warm_up,
        tolerance=tolerance,
        min_sample_ms=min_sample_ms,
        stopwatch=stopwatch,
        seed=seed,
    ):
        if on_progress is not None:
            done = sum(map(len, samples.values()))
            on_progress(done, done + left)
    return {name: summarise(samples[name]) for name in calls}


def sample_rounds(
    calls: Mapping[str, Call],
    *,
    repeats: int = REPEATS,
    warm_up: int = WARM_UP,
    tolerance: float = TOLERANCE,
    min_sample_ms: float = MIN_SAMPLE_MS,
    stopwatch: Stopwatch | None = None,
    seed: int = 0,
    earlier: Mapping[str, Sequence[float]] | None = None,
) -> Iterator[tuple[Mapping[str, Sequence[float]], int]]:
    """Visit calls in rounds; yield, after each, all samples so far and the visits that are left.

    A sample is the milliseconds of one call. `earlier` are samples of an earlier process, which
    count. Nothing is yielded where they are enough. The parameters are those of `time_interleaved`.
    """
    assert repeats > 0, repeats
    assert warm_up > 0, "the first call of anything is no measurement of it"
    stopwatch = stopwatch or host_stopwatch()
    samples = {name: list((earlier or {}).get(name, ())) for name in calls}
    rng = random.Random(f"{seed} {sum(map(len, samples.values()))}")
    loops: dict[str, int] = {}
    while left := _visits_left(samples, repeats, tolerance):
        for name in left.keys() - loops.keys():
            loops[name] = _warm_up(calls[name], warm_up, min_sample_ms, stopwatch)
        order = list(left)
        rng.shuffle(order)
        for name in order:
            calls[name]()
            samples[name].append(stopwatch(calls[name], loops[name]) / loops[name])
        left = _visits_left(samples, repeats, tolerance)
        yield {name: tuple(values) for name, values in samples.items()}, sum(left.values())


def _warm_up(call: Call, visits: int, min_sample_ms: float, stopwatch: Stopwatch) -> int:
    """Return how many calls make a sample long enough, having made some."""
    shortest = min(stopwatch(call, 1) for _ in range(visits))
    return max(1, math.ceil(min_sample_ms / max(shortest, 1e-4)))


def _visits_left(samples: Mapping[str, Sequence[float]], repeats: int, tolerance: float) -> dict[str, int]:
    """Return the calls to visit again, each with how often: as far as is known, and at least once."""
    left = {}
    for name, values in samples.items():
        n = len(values)
        if n < repeats:
            left[name] = repeats - n
        elif n < MOST_REPEATS * repeats and (error := spread(values)) > tolerance:
            # the error falls with the root of the number
            wanted = min(math.ceil(n * (error / tolerance) ** 2), MOST_REPEATS * repeats)
            left[name] = max(1, wanted - n)
    return left


def spread(samples: Sequence[float]) -> float:
    """Return the standard error of the median, as far as outliers do not matter, relative to it."""
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    if median <= 0:
        return 0.0
    return float(_ERROR_PER_IQR * (high - low) / math.sqrt(len(samples)) / median)


def summarise(samples: Sequence[float]) -> Timing:
    """Return median, 95th percentile and spread of some samples in milliseconds."""
    median, p95 = np.quantile(samples, (0.5, 0.95))
    return Timing(float(median), float(p95), spread(samples), len(samples))


def noisy(timings: Mapping[str, Timing], tolerance: float = TOLERANCE) -> tuple[str, ...]:
    """Return the names of the calls whose spread is above the tolerance, the noisiest first."""
    names = [name for name, timing in timings.items() if timing.spread > tolerance]
    return tuple(sorted(names, key=lambda name: -timings[name].spread))
