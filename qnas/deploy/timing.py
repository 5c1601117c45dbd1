"""Timing of many calls in interleaved rounds, so that slow phases of a shared machine affect all calls alike.

A round visits every call once, in a new random order; a call's latency is the median of its visits,
which an occasional interruption does not move. A visit starts with an untimed call, which brings data
back into the caches that other calls displaced. Calls too short for a clock are timed in loops.

Each call is instantiated several times. An instance is one or two percent faster or slower for its whole
life, depending on its place in memory, and repeated visits do not show this. In each load, one instance of
each call is made, visited and dropped before the next load starts; a latency is the median of the samples
of all loads. Calls that are noisy after that get further loads, since more visits of the same instances
would not help if instances disagree. Samples are saved, so that a session can be resumed after Ctrl-C.

The clock is a parameter: the host's, or events on an accelerator's stream (`qnas.deploy.runtimes`). Runs of a
program that reports its own time (`qnas.deploy.elsewhere`) come in the same rounds. Each is a load of one
sample: the program warms up and repeats by itself.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qnas.common.changes import describe_changes
from qnas.common.errors import CheckpointError, Interrupted, MeasurementError, one_line
from qnas.common.files import write_json
from qnas.common.progress import Progress
from qnas.common.reading import read_json
from qnas.runs.run_folder import interruptible

Call = Callable[[], object]
Maker = Callable[[], Call]  # makes an instance of a timed call
Stopwatch = Callable[[Call, int], float]  # runs a call n times; returns the total milliseconds
Samples = dict[str, list[Sequence[float]]]  # name -> load -> milliseconds of each call
TimedRun = Callable[[], float]  # runs a program; returns the milliseconds that it reports

WARM_UP = 10
TOLERANCE = 0.01  # a call with a larger spread is noisy
MIN_SAMPLE_MS = 0.2  # a thousand times the time to read the clock
MOST_REPEATS = 4  # times `repeats`: the bound for calls that stay noisy
SCHEMA = "qnas.samples/1"
_SAVE_SECONDS = 10.0  # between two saves

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

    A sample is the milliseconds of one call. Samples of an `earlier` process count; if they are enough,
    nothing is yielded.
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
    """Warm a call up, and return how many calls make a sample long enough."""
    shortest = min(stopwatch(call, 1) for _ in range(visits))
    return max(1, math.ceil(min_sample_ms / max(shortest, 1e-4)))


def spread(samples: Sequence[float]) -> float:
    """Return the standard error of the median, robust to outliers, relative to the median."""
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


def time_all(
    makers: Mapping[str, Maker],
    *,
    loads: int,
    repeats: int,
    tolerance: float,
    stopwatch: Stopwatch,
    state_file: Path | None = None,
    request: Mapping[str, Any] | None = None,
    resume: bool = False,
    go_on: str = "`resume=True`",
    quiet: bool = False,
) -> dict[str, Timing]:
    """Return the latency of each call, summarised by `pool`.

    Each is visited `repeats` times, in equal shares (rounded up) over `loads` loads; noisy calls get up to
    MOST_REPEATS times as many loads. `request` holds everything that samples depend on; with `resume`, the
    samples in `state_file` count too. The file is removed at the end. Raises Interrupted after Ctrl-C or
    SIGTERM, once the samples are saved; CheckpointError if the samples to resume are missing, damaged, or
    of another request.
    """
    visits = math.ceil(repeats / loads)
    return _sampled(
        makers,
        lambda samples: _visit_all(makers, samples, loads, visits, tolerance, stopwatch, quiet),
        state_file,
        {**(request or {}), "loads": loads},
        resume,
        go_on,
    )


def time_runs(
    runs: Mapping[str, TimedRun],
    *,
    repeats: int,
    tolerance: float,
    state_file: Path | None = None,
    request: Mapping[str, Any] | None = None,
    resume: bool = False,
    go_on: str = "`resume=True`",
    quiet: bool = False,
) -> dict[str, Timing]:
    """Return the latency of each program, from `repeats` runs, of noisy ones up to MOST_REPEATS as many.

    State and interruption are as in `time_all`. A MeasurementError of a run is raised once the samples
    so far are saved, too, and says so.
    """
    return _sampled(
        runs,
        lambda samples: _run_all(runs, samples, repeats, tolerance, quiet),
        state_file,
        {**(request or {}), "loads": "runs"},
        resume,
        go_on,
    )


def _sampled(
    names: Mapping[str, object],
    visiting: Callable[[Samples], Iterator[None]],
    state_file: Path | None,
    request: Mapping[str, Any],
    resume: bool,
    go_on: str,
) -> dict[str, Timing]:
    """Collect samples until `visiting` ends, which adds to them between its steps; save them as it goes."""
    samples: Samples = {name: [] for name in names}
    if resume:
        assert state_file is not None
        samples |= _read(state_file, request)

    def save() -> str:
        if state_file is None:
            return "nothing is saved"
        write_json(state_file, {"schema": SCHEMA, "request": request, "samples": samples})
        return f"the samples are saved in {state_file}: {go_on} goes on from them"

    saved = time.monotonic()
    with interruptible() as signals:
        try:
            for _ in visiting(samples):
                if signals:
                    break
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        except MeasurementError as error:
            if not signals:
                raise MeasurementError(
                    f"{error}; {save()}" if any(samples.values()) else str(error)
                ) from error
        if signals:
            raise Interrupted(save())
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return _timings(samples, names)


def pool(loads: Sequence[Sequence[float]]) -> Timing:
    """Summarise the samples of several loads.

    The spread combines that of the samples and that of the loads' medians. Each of the two ignores a slow
    phase of the machine. Loads of one sample each have no spread of their own.
    """
    together = summarise([value for values in loads for value in values])
    if all(len(values) == 1 for values in loads):
        return together
    between = spread([statistics.median(values) for values in loads])
    return replace(together, spread=math.hypot(together.spread, between))


def _visit_all(
    makers: Mapping[str, Maker],
    samples: Samples,
    loads: int,
    visits: int,
    tolerance: float,
    stopwatch: Stopwatch,
    quiet: bool,
) -> Iterator[None]:
    """Bring the samples up to `visits` in each load; yield after each instance and round."""
    prepared = False  # only the first load shows its preparation: it may compile, which takes long
    for load in range(MOST_REPEATS * loads):
        names = makers if load < loads else noisy(_timings(samples, makers), tolerance)
        earlier = {name: samples[name][load] if load < len(samples[name]) else () for name in names}
        due = [name for name in names if len(earlier[name]) < visits]
        if not due:
            continue
        phase = f"load {load + 1} of {loads}" if load < loads else f"repeat {len(due)} noisy"
        calls = {}
        # in a new order each time, or all instances would get their old places in memory
        with Progress(len(due), "prepare", quiet=quiet or prepared) as progress:
            for name in random.Random(load).sample(due, len(due)):
                calls[name] = makers[name]()
                progress.step(name)
                yield
        prepared = True
        with Progress(visits, phase, quiet=quiet) as progress:
            progress.skip(min(len(earlier[name]) for name in due))
            for newer in sample_rounds(calls, visits, stopwatch, seed=load, earlier=earlier):
                for name, values in newer.items():
                    samples[name][load : load + 1] = [values]
                progress.step()
                yield


def _run_all(
    runs: Mapping[str, TimedRun], samples: Samples, repeats: int, tolerance: float, quiet: bool
) -> Iterator[None]:
    """Bring each program to `repeats` runs, in rounds of a new random order; yield after each run."""
    for number in range(MOST_REPEATS * repeats):
        names = runs if number < repeats else noisy(_timings(samples, runs), tolerance)
        due = [name for name in names if len(samples[name]) <= number]
        if not due:
            continue
        phase = f"run {number + 1} of {repeats}" if number < repeats else f"repeat {len(due)} noisy"
        with Progress(len(due), phase, quiet=quiet) as progress:
            for name in random.Random(number).sample(due, len(due)):
                samples[name].append([runs[name]()])
                progress.step(name)
                yield


def _timings(samples: Samples, names: Mapping[str, object]) -> dict[str, Timing]:
    return {name: pool(samples[name]) for name in names}


def _read(path: Path, request: Mapping[str, Any]) -> Samples:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, nothing to resume")
    state = read_json(path, CheckpointError)
    samples = state.get("samples")
    if (
        state.get("schema") != SCHEMA
        or not isinstance(state.get("request"), dict)
        or not isinstance(samples, dict)
        or not all(isinstance(one, list) and all(map(_are_latencies, one)) for one in samples.values())
    ):
        raise CheckpointError(f"{path}: damaged: expected samples of {SCHEMA}: `force=True` starts anew")
    changed = describe_changes(state["request"], request)
    if changed:
        words = one_line("; ".join(changed))
        raise CheckpointError(
            f"{path}: cannot resume, changed since it started: {words}: `force=True` starts anew"
        )
    return samples


def _are_latencies(values: object) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, int | float) and 0 <= value < math.inf for value in values)
    )
