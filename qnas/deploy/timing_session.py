"""A session that times many things: it shows progress, saves samples, and can be resumed after Ctrl-C.

Everything is visited in rounds (`qnas.deploy.timing`), and made several times: an instance is one or
two percent faster or slower for as long as it lives, by where in memory it came to lie, which no
repeating shows. So instances of all things are made, visited and dropped, one load after another, no
more than one of each at a time; a latency is the median of the samples of all loads. What is noisy
after that gets further loads: where instances disagree, visits of the same ones would not help.
"""

import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnas.common.changes import describe_changes
from qnas.common.errors import CheckpointError, Interrupted
from qnas.common.files import read_json, write_json
from qnas.common.progress import Progress
from qnas.deploy.timing import Maker, Stopwatch, Timing, noisy, sample_rounds, spread, summarise
from qnas.runs.run_folder import interruptible

SCHEMA = "qnas.samples/1"
MOST_REPEATS = 4  # times `repeats`: the bound for what stays noisy
_SAVE_SECONDS = 10.0  # between two savings

Samples = dict[str, list[Sequence[float]]]  # name -> load -> milliseconds of each call


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
    """Return the latency of each of these, summarised by `pool`.

    Each is visited `repeats` times, in equal shares rounded up, in so many loads; what is noisy then in
    up to MOST_REPEATS times as many. `request` is all that samples depend on; with `resume` those in
    `state_file` count too, and the file is removed at the end. Raises Interrupted after Ctrl-C or
    SIGTERM, having saved the samples; CheckpointError where the samples to be resumed are missing,
    damaged, or of another request.
    """
    request = {**(request or {}), "loads": loads}
    samples: Samples = {name: [] for name in makers}
    if resume:
        assert state_file is not None
        samples |= _read(state_file, request)
    saved = time.monotonic()
    with interruptible() as signals:
        for _ in _visit_all(makers, samples, loads, math.ceil(repeats / loads), tolerance, stopwatch, quiet):
            if state_file is not None and (signals or time.monotonic() - saved > _SAVE_SECONDS):
                write_json(state_file, {"schema": SCHEMA, "request": request, "samples": samples})
                saved = time.monotonic()
            if signals:
                where = f"the samples are saved in {state_file}: {go_on} goes on from them"
                raise Interrupted(where if state_file else "nothing is saved")
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return _timings(samples, makers)


def pool(loads: Sequence[Sequence[float]]) -> Timing:
    """Summarise the samples of several loads.

    The spread has both parts: that of the samples, and that of the loads' medians, of which each alike
    ignores a slow spell of the machine.
    """
    together = summarise([value for values in loads for value in values])
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
    """Bring the samples up to so many visits in each load; yield after each instance and round."""
    prepared = False  # in the first load things may have to be compiled: only that takes long
    for load in range(MOST_REPEATS * loads):
        names = makers if load < loads else noisy(_timings(samples, makers), tolerance)
        earlier = {name: samples[name][load] if load < len(samples[name]) else () for name in names}
        due = [name for name in names if len(earlier[name]) < visits]
        if not due:
            continue
        phase = f"load {load + 1} of {loads}" if load < loads else f"repeat {len(due)} noisy"
        calls = {}
        # in another order each time, or all would come to lie where they lay before
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
        raise CheckpointError(
            f"{path}: cannot resume, changed since it started: {'; '.join(changed)}: `force=True` starts anew"
        )
    return samples


def _are_latencies(values: object) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, int | float) and 0 <= value < math.inf for value in values)
    )
