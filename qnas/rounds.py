"""Timing many things in one sitting: with progress, saved samples, and Ctrl-C.

Everything is visited in rounds (`qnas.latency.timing`). A thing may come in several instances of
equal work: where an instance lies in memory can cost it several percent for as long as it lives,
which no repeating shows. Its latency is the median of the samples of all of them.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnas.errors import CheckpointError, Interrupted
from qnas.files import read_json, write_json
from qnas.latency.timing import MOST_REPEATS, Call, Stopwatch, Timing, noisy, sample_rounds, summarise
from qnas.progress import Progress
from qnas.run import changed_keys, interruptible

SCHEMA = "qnas.samples/1"
_SAVE_SECONDS = 10.0  # between two savings

Samples = dict[str, list[Sequence[float]]]  # name -> instance -> milliseconds of each call


def time_all(
    makers: Mapping[str, Callable[[], Sequence[Call]]],
    *,
    stopwatch: Stopwatch,
    repeats: int,
    tolerance: float,
    state_file: Path,
    request: Mapping[str, Any],
    resume: bool,
    quiet: bool,
) -> dict[str, Timing]:
    """Return what each of these takes; a maker makes the instances that are timed.

    Each is visited `repeats` times, the noisy ones up to MOST_REPEATS times as often. `request` is all
    that the samples depend on; with `resume` those in `state_file` count too, and the file is removed
    at the end. Raises Interrupted, having saved the samples, after Ctrl-C or SIGTERM; CheckpointError
    where the samples to be resumed are missing, damaged, or of another request.
    """
    samples = _read(state_file, request) if resume else {}

    def stop_if_asked() -> None:
        if signals:
            _write(state_file, request, samples)
            raise Interrupted(f"the samples are saved in {state_file}: --resume goes on from them")

    def visit(names: Sequence[str], wanted: int, phase: str) -> None:
        """Visit these until each has so many samples."""
        saved = time.monotonic()
        each = math.ceil(wanted / max(len(instances[name]) for name in names))
        calls = {f"{name} {i}": call for name in names for i, call in enumerate(instances[name])}
        earlier = {f"{name} {i}": values for name in names for i, values in enumerate(samples[name])}
        with Progress(each, phase, quiet=quiet) as progress:
            progress.skip(min(each, *map(len, earlier.values())))
            for newer, _ in sample_rounds(
                calls, repeats=each, tolerance=math.inf, stopwatch=stopwatch, earlier=earlier
            ):
                for name in names:
                    samples[name] = [newer[f"{name} {i}"] for i in range(len(instances[name]))]
                progress.step()
                stop_if_asked()
                if time.monotonic() - saved > _SAVE_SECONDS:
                    _write(state_file, request, samples)
                    saved = time.monotonic()

    instances: dict[str, Sequence[Call]] = {}
    with interruptible() as signals:
        with Progress(len(makers), "prepare", quiet=quiet) as progress:
            for name, make in makers.items():
                instances[name] = make()
                progress.step(name)
                stop_if_asked()
        for name, calls in instances.items():
            known = samples.get(name, [])
            samples[name] = [known[i] if i < len(known) else () for i in range(len(calls))]
        visit(list(makers), repeats, "measure")
        for times in range(2, MOST_REPEATS + 1):
            unsure = noisy(_timings(samples, makers), tolerance)
            if unsure:
                visit(unsure, times * repeats, f"repeat {len(unsure)} noisy")
    state_file.unlink(missing_ok=True)
    return _timings(samples, makers)


def pool(instances: Sequence[Sequence[float]]) -> Timing:
    """Summarise the samples of several instances.

    The spread has both parts: that of the samples, and the standard error of the instances' mean.
    """
    together = summarise([value for values in instances for value in values])
    medians = [statistics.median(values) for values in instances]
    if len(medians) < 2 or together.median_ms <= 0:
        return together
    between = statistics.stdev(medians) / math.sqrt(len(medians)) / together.median_ms
    return replace(together, spread=math.hypot(together.spread, between))


def _timings(samples: Samples, names: Mapping[str, object]) -> dict[str, Timing]:
    return {name: pool(samples[name]) for name in names}


def _write(path: Path, request: Mapping[str, Any], samples: Samples) -> None:
    write_json(path, {"schema": SCHEMA, "request": dict(request), "samples": samples})


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
        raise CheckpointError(f"{path}: damaged: expected samples of the schema {SCHEMA}: give --force")
    changed = changed_keys(state["request"], request)
    if changed:
        raise CheckpointError(f"{path}: cannot resume, changed since it started: {'; '.join(changed)}")
    return samples


def _are_latencies(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and 0 <= value < math.inf for value in values
    )
