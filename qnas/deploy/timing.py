"""Timing calls in rounds, so that a slow spell of a shared machine hits all of them alike.

A round visits every call once, in a new random order; a call's latency is the median of its visits,
which an interruption now and then does not move. A visit starts with a call that is not timed, which
brings back what the others have put out of the caches. Calls too short for a clock are timed in loops.

The clock is a parameter: a host's, or events on an accelerator's stream (`qnas.deploy.runtimes`).
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]
Maker = Callable[[], Call]  # of an instance of what is timed
Stopwatch = Callable[[Call, int], float]  # runs a call so many times; milliseconds of all together

WARM_UP = 10
TOLERANCE = 0.01  # what is above this spread is noisy
MIN_SAMPLE_MS = 0.2  # a thousand times what reading the clock takes

# A normal distribution's median of n has a standard error of sqrt(pi / 2n) sigma, and its
# interquartile range is 1.349 sigma.
_ERROR_PER_IQR = math.sqrt(math.pi / 2) / 1.349


@dataclass(frozen=True)
class Timing:
    """The latency of a call, over several visits."""

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


def sample_rounds(
    calls: Mapping[str, Call],
    repeats: int,
    stopwatch: Stopwatch,
    *,
    warm_up: int = WARM_UP,
    min_sample_ms: float = MIN_SAMPLE_MS,
    seed: int = 0,
    earlier: Mapping[str, Sequence[float]] | None = None,
) -> Iterator[dict[str, tuple[float, ...]]]:
    """Visit calls in rounds until each has `repeats` samples; yield, after each round, all so far.

    A sample is the milliseconds of one call. `earlier` are samples of an earlier process, which
    count. Nothing is yielded where they are enough.
    """
    assert repeats > 0, repeats
    assert warm_up > 0, "the first call of anything is no measurement of it"
    samples = {name: list((earlier or {}).get(name, ())) for name in calls}
    rng = random.Random(f"{seed} {sum(map(len, samples.values()))}")
    order = [name for name, values in samples.items() if len(values) < repeats]
    loops = {name: _warm_up(calls[name], warm_up, min_sample_ms, stopwatch) for name in order}
    while order := [name for name in order if len(samples[name]) < repeats]:
        rng.shuffle(order)
        for name in order:
            calls[name]()
            samples[name].append(stopwatch(calls[name], loops[name]) / loops[name])
        yield {name: tuple(values) for name, values in samples.items()}


def _warm_up(call: Call, visits: int, min_sample_ms: float, stopwatch: Stopwatch) -> int:
    """Return how many calls make a sample long enough, having made some."""
    shortest = min(stopwatch(call, 1) for _ in range(visits))
    return max(1, math.ceil(min_sample_ms / max(shortest, 1e-4)))


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
