"""ONNX files timed on this machine, and the times of a sample's networks written into its CSV."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from qnas.common import host
from qnas.common.errors import CheckpointError, UsageError, nearest
from qnas.deploy.runtimes import onnx_session, open_runtime, openvino_session
from qnas.deploy.timing import TOLERANCE, Call, Maker, Timing, host_stopwatch, noisy
from qnas.deploy.timing_session import time_all
from qnas.latency.fitting.measurements import read_measured, write_measured
from qnas.spaces.space import SearchSpace

SESSIONS: dict[str, Callable[[Path, int], Call]] = {
    "onnxruntime": onnx_session,
    "openvino": openvino_session,
}
LOADS = 5  # of a network
REPEATS = 50  # in all loads together


@dataclass(frozen=True)
class Measurement:
    """The timings of this measurement, and the networks that stayed noisy."""

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

    The times are written into the CSV once all are there. When interrupted, it saves its samples and
    raises Interrupted; the next call continues from them. With `force` all networks are timed again. Raises
    UsageError for an unknown runtime or a missing ONNX file, TableError for a broken CSV,
    CheckpointError where other times or samples come from another runtime.
    """
    session = _session(runtime)
    networks = read_measured(file, space)
    words = f"{open_runtime(runtime, threads=threads).version}, {threads} thread" + "s" * (threads > 1)
    words += f", {host.cpu_name()}"
    wanted = [network for network in networks if force or network.latency_ms is None]
    others = {n.runtime for n in networks if n not in wanted} - {words}
    if others:
        raise CheckpointError(
            f"{file}: has times of {others.pop()!r}, this is {words!r}: times of one CSV are compared, "
            "so measure all again with `force=True`, or another sample"
        )
    files = {network.name: file.parent / f"{network.name}.onnx" for network in wanted}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise UsageError(
            f"{missing[0]}: no such file, and {len(missing) - 1} others: write them with qnas sample "
            "--format onnx"
        )
    state_file = file.with_suffix(".samples.json")
    timings = time_all(
        {name: partial(session, path, threads) for name, path in files.items()},
        loads=LOADS,
        repeats=repeats,
        tolerance=tolerance,
        stopwatch=host_stopwatch(),
        state_file=state_file,
        request={
            "runtime": words,
            "networks": sha256(repr([(n.name, n.arch) for n in networks]).encode()).hexdigest()[:12],
        },
        resume=state_file.exists() and not force,
        go_on="the same command",
        quiet=quiet,
    )
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
    return Measurement(timings, noisy(timings, tolerance), len(networks) - len(wanted), words)


def time_files(
    files: Mapping[str, Path], *, runtime: str = "onnxruntime", threads: int = 1, repeats: int = REPEATS
) -> dict[str, Timing]:
    """Return the latencies of ONNX files on a runtime of this machine, timed like a sample.

    Raises UsageError for an unknown runtime, and for a file that it cannot load.
    """
    session = _session(runtime)
    return time_calls(
        {name: partial(session, path, threads) for name, path in files.items()}, repeats=repeats
    )


def time_calls(makers: Mapping[str, Maker], *, repeats: int = REPEATS) -> dict[str, Timing]:
    """Return the latencies of calls on this machine, timed like a sample."""
    return time_all(
        makers, loads=LOADS, repeats=repeats, tolerance=TOLERANCE, stopwatch=host_stopwatch(), quiet=True
    )


def _session(runtime: str) -> Callable[[Path, int], Call]:
    if runtime not in SESSIONS:
        raise UsageError(f"unknown runtime {runtime!r}: {nearest(runtime, SESSIONS)}")
    return SESSIONS[runtime]
