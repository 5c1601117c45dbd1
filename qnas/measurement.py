"""Networks of a sample timed on this machine, and their times written into its CSV.

All networks are visited in rounds, so that a slow spell of the machine hits all alike, and each visit
starts with a run that is not timed: with a hundred networks in memory the weights of each are in no
cache when its turn comes, as they are in a program that runs one network again and again. A network is
loaded several times, a share of its visits each, since it is one or two percent faster or slower for
as long as it is loaded, by where in memory it came to lie.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qnas import host
from qnas.errors import CheckpointError, Interrupted, UsageError, nearest
from qnas.files import read_json, write_json
from qnas.latency.measured import read_measured, write_measured
from qnas.latency.timing import (
    MOST_REPEATS,
    REPEATS,
    TOLERANCE,
    Call,
    Stopwatch,
    Timing,
    host_stopwatch,
    noisy,
    sample_rounds,
    summarise,
)
from qnas.progress import Progress
from qnas.run import interruptible
from qnas.runtimes import onnx_session, open_runtime, openvino_session
from qnas.space import SearchSpace

SCHEMA = "qnas.samples/1"
SESSIONS: dict[str, Callable[[Path, int], Call]] = {
    "onnxruntime": onnx_session,
    "openvino": openvino_session,
}
LOADS = 5  # of a network
_SAVE_SECONDS = 10.0

Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measurement:
    """What was measured now, and what of it stayed noisy."""

    timings: dict[str, Timing]
    noisy: tuple[str, ...]
    kept: int  # networks that were measured before
    runtime: str


def measure_sample(
    file: Path,
    space: SearchSpace,
    *,
    runtime: str,
    threads: int,
    repeats: int = REPEATS,
    tolerance: float = TOLERANCE,
    force: bool = False,
    quiet: bool = False,
) -> Measurement:
    """Time the networks of a sample's CSV that have no latency yet, from the ONNX files beside it.

    The times are written into the CSV once all are there. Interrupted, it saves its samples and raises
    Interrupted; asked again, it goes on from them. With `force` everything is timed anew. Raises
    UsageError for an unknown runtime or a missing ONNX file, TableError for a broken CSV,
    CheckpointError where other times or samples come from another runtime.
    """
    if runtime not in SESSIONS:
        raise UsageError(f"unknown runtime {runtime!r}: {nearest(runtime, SESSIONS)}")
    networks = read_measured(file, space)
    words = f"{open_runtime(runtime, threads=threads).version}, {threads} thread" + "s" * (threads > 1)
    words += f", {host.cpu_name()}"
    wanted = [network for network in networks if force or network.latency_ms is None]
    others = {n.runtime for n in networks if n not in wanted} - {words}
    if others:
        raise CheckpointError(
            f"{file}: has times of {others.pop()!r}, this is {words!r}: times of one CSV are compared, "
            "so measure all anew with --force, or another sample"
        )
    files = {network.name: file.parent / f"{network.name}.onnx" for network in wanted}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise UsageError(
            f"{missing[0]}: no such file, and {len(missing) - 1} others: write them with qnas sample "
            "--format onnx"
        )
    state_file = file.with_suffix(".samples.json")
    earlier = {} if force else _read_samples(state_file, words)
    rounds = _Rounds(files, SESSIONS[runtime], threads, repeats, tolerance, quiet)

    def save(samples: Samples) -> None:
        write_json(state_file, {"schema": SCHEMA, "runtime": words, "samples": samples})

    samples: Samples = {name: earlier.get(name, ()) for name in files}
    with interruptible() as signals:
        saved = time.monotonic()
        for newer in rounds.run(samples):
            samples = newer
            if signals:
                save(samples)
                raise Interrupted(
                    f"the samples are saved in {state_file}: the same command goes on from them"
                )
            if time.monotonic() - saved > _SAVE_SECONDS:
                save(samples)
                saved = time.monotonic()
    timings = {name: summarise(values) for name, values in samples.items()}
    write_measured(
        file,
        [
            replace(
                network,
                latency_ms=timings[network.name].median_ms,
                p95_ms=timings[network.name].p95_ms,
                runtime=words,
            )
            if network.name in timings
            else network
            for network in networks
        ],
    )
    state_file.unlink(missing_ok=True)
    return Measurement(timings, noisy(timings, tolerance), len(networks) - len(wanted), words)


def warm(stopwatch: Stopwatch) -> Stopwatch:
    """Return a stopwatch that runs a call once before it times it."""

    def run(call: Call, loops: int) -> float:
        call()
        return stopwatch(call, loops)

    return run


def _read_samples(path: Path, words: str) -> dict[str, list[float]]:
    """Return the samples that an interrupted measurement saved; none where none was."""
    if not path.exists():
        return {}
    state = read_json(path, CheckpointError)
    if state.get("schema") != SCHEMA or not isinstance(state.get("samples"), dict):
        raise CheckpointError(f"{path}: not samples of qnas measure: delete the file, or give --force")
    if state.get("runtime") != words:
        raise CheckpointError(
            f"{path}: samples of {state.get('runtime')!r}, this is {words!r}: give --force to start anew"
        )
    samples: dict[str, list[float]] = state["samples"]
    return samples


@dataclass(frozen=True)
class _Rounds:
    """Files to visit, how often, and how they are loaded."""

    files: Mapping[str, Path]
    session: Callable[[Path, int], Call]
    threads: int
    repeats: int
    tolerance: float
    quiet: bool

    def run(self, samples: Samples) -> Iterator[Samples]:
        """Yield all samples, again after each file that is loaded and each round."""
        for load in range(1, LOADS + 1):
            target = math.ceil(self.repeats * load / LOADS)
            if any(len(values) < target for values in samples.values()):
                phase = f"load {load} of {LOADS}"
                for newer in self._visit(samples, self.files, target, math.inf, phase):
                    samples = newer
                    yield samples
        unsure = noisy({name: summarise(values) for name, values in samples.items()}, self.tolerance)
        if unsure:
            files = {name: self.files[name] for name in unsure}
            phase = f"repeat {len(unsure)} noisy, at most"
            for newer in self._visit(samples, files, self.repeats, self.tolerance, phase):
                yield newer

    def _visit(
        self, samples: Samples, files: Mapping[str, Path], repeats: int, tolerance: float, phase: str
    ) -> Iterator[Samples]:
        earlier = {name: samples[name] for name in files}
        left = repeats - min(map(len, earlier.values()))
        with Progress(left or (MOST_REPEATS - 1) * repeats, phase, quiet=self.quiet) as progress:
            calls = {}
            for name, path in files.items():
                calls[name] = self.session(path, self.threads)
                yield samples
            for newer, _ in sample_rounds(
                calls,
                repeats=repeats,
                tolerance=tolerance,
                stopwatch=warm(host_stopwatch()),
                earlier=earlier,
            ):
                progress.step()
                yield {**samples, **newer}


def time_files(
    files: Mapping[str, Path], *, runtime: str = "onnxruntime", threads: int = 1, repeats: int = REPEATS
) -> dict[str, Timing]:
    """Return what ONNX files take on a runtime of this machine, timed as those of a sample are.

    Raises UsageError for an unknown runtime, and for a file that it cannot load.
    """
    if runtime not in SESSIONS:
        raise UsageError(f"unknown runtime {runtime!r}: {nearest(runtime, SESSIONS)}")
    rounds = _Rounds(files, SESSIONS[runtime], threads, repeats, TOLERANCE, quiet=True)
    *_, samples = rounds.run(dict.fromkeys(files, ()))
    return {name: summarise(values) for name, values in samples.items()}
