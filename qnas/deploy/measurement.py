"""Timing on this machine: of the networks of a sample, written into its CSV, and of exported files."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from qnas.common import host
from qnas.common.errors import CheckpointError, UsageError, nearest
from qnas.common.files import write_json
from qnas.deploy.export.formats import FORMATS, Exported
from qnas.deploy.export.product import Product
from qnas.deploy.runtimes import SESSIONS, function_session, open_runtime
from qnas.deploy.timing import TOLERANCE, Call, Maker, Timing, host_stopwatch, noisy, time_all
from qnas.latency.fitting.measurements import read_measured, write_measured
from qnas.latency.onnx.networks import read_onnx
from qnas.runs.found_arch import find_arch
from qnas.runs.names import ARCH_FILE, EXPORT_FOLDER
from qnas.spaces.space import SearchSpace

LOADS = 5  # per network
REPEATS = 50  # visits per network, over all loads
MODEL = "model.onnx"


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

    The times are written into the CSV once all networks are timed. When interrupted, it saves its samples
    and raises Interrupted; the next call continues from them. With `force`, all networks are timed again.
    Raises UsageError for an unknown runtime or a missing ONNX file, TableError for a broken CSV,
    CheckpointError if existing times or samples come from another runtime.
    """
    session = _session(runtime)
    networks = read_measured(file, space)
    version = open_runtime(runtime, threads=threads).version
    words = f"{version}, {threads} thread{'s' * (threads > 1)}, {host.cpu_name()}"
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
            "networks": hashlib.sha256(repr([(n.name, n.arch) for n in networks]).encode()).hexdigest()[:12],
        },
        resume=state_file.exists() and not force,
        go_on="the same command",
        quiet=quiet,
    )
    new: dict[str, dict[str, Any]] = {
        name: {"latency_ms": t.median_ms, "p95_ms": t.p95_ms, "runtime": words} for name, t in timings.items()
    }
    write_measured(file, [replace(network, **new.get(network.name, {})) for network in networks])
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


def measure_exported(folder: Path, *, runtime: str, threads: int, repeats: int) -> dict[str, Any]:
    """Time a run's exported file on this machine, add the time to the run's arch.json, and return the latter.

    The prediction is for the space's resolution, so a file of another resolution is refused.
    Raises CheckpointError if nothing is exported.
    """
    found = find_arch(folder)
    file = folder / EXPORT_FOLDER / MODEL
    px = found.space.input.resolution_px
    fix = f"qnas export {folder} --format onnx --resolution {px}"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file: run {fix} first")
    network = read_onnx(file)
    if (network.height_px, network.width_px) != (px, px):
        raise CheckpointError(
            f"{file}: its input has {network.height_px} px, the prediction is for {px} px: run {fix} --force"
        )
    opened = open_runtime(runtime, threads=threads)
    (timing,) = time_files({MODEL: file}, runtime=runtime, threads=threads, repeats=repeats).values()
    measured = {
        **_timing_facts(timing, opened.version, threads),
        "file": f"{EXPORT_FOLDER}/{MODEL}",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    document = {**found.document, "measured": measured}
    write_json(folder / ARCH_FILE, document)
    return document


def time_exported(
    files: Sequence[Exported], folder: Path, product: Product, threads: int
) -> dict[str, dict[str, Any]]:
    """Time exported files on one image, in interleaved rounds; return the facts by file name."""
    open_runtime("torch", threads=threads)  # checks the threads
    graphs = dict.fromkeys(("onnx", "vpu"), SESSIONS["onnxruntime"])
    sessions = {**graphs, "openvino": SESSIONS["openvino"]}

    def open_file(file: Exported) -> Call:
        path = folder / file.files[0]
        if file.format in sessions:
            return sessions[file.format](path, threads)
        return function_session(FORMATS[file.format].load(path), product.shape, threads)

    timings = time_calls({file.files[0]: partial(open_file, file) for file in files})
    return {file.files[0]: _timing_facts(timings[file.files[0]], file.runtime, threads) for file in files}


def _timing_facts(timing: Timing, runtime: str, threads: int) -> dict[str, Any]:
    return {
        "p50_ms": timing.median_ms,
        "p95_ms": timing.p95_ms,
        "runs": timing.repeats,
        "runtime": runtime,
        "threads": threads,
        "machine": host.cpu_name(),
        "date": date.today().isoformat(),
    }
