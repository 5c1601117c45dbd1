"""Timing of a sample's networks, into its CSV, and of exported files: here, or elsewhere by a command."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qnas.common import host
from qnas.common.errors import CheckpointError, UsageError, nearest
from qnas.common.files import write_json
from qnas.common.reading import read_json
from qnas.deploy.elsewhere import REPEATS as RUNS_ELSEWHERE
from qnas.deploy.elsewhere import Elsewhere
from qnas.deploy.export.formats import FORMATS, PARITY, Exported
from qnas.deploy.export.product import Product
from qnas.deploy.runtimes import SESSIONS, function_session, open_runtime
from qnas.deploy.timed_files import PLAIN, FileKind, write_timed
from qnas.deploy.timing import TOLERANCE, Call, Maker, Timing, host_stopwatch, noisy, time_all, time_runs
from qnas.latency.fitting.measurements import Measured, read_measured, write_measured
from qnas.runs.found_arch import find_arch
from qnas.runs.names import ARCH_FILE, EXPORT_FOLDER
from qnas.spaces.space import SearchSpace

LOADS = 5  # per network
REPEATS = 50  # visits per network, over all loads

Files = Mapping[str, tuple[Path, ...]]  # of each network; the first is the one to load
# the formats that a runtime of this machine opens
_OPENED: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnx", "vpu"),
    "openvino": ("openvino", "onnx", "vpu"),
}


@dataclass(frozen=True)
class Here:
    """A runtime of this machine. Raises UsageError if it is unknown, not installed or has no such threads."""

    runtime: str = "onnxruntime"
    threads: int = 1

    def __post_init__(self) -> None:
        _session(self.runtime)
        _ = self.version

    @cached_property
    def version(self) -> str:
        """The runtime with its version; sets its threads."""
        return open_runtime(self.runtime, threads=self.threads).version

    def words(self, kind: FileKind) -> str:
        """Return everything that times depend on, as the CSV records it."""
        told = f"{self.version}, {self.threads} thread{'s' * (self.threads > 1)}, {host.cpu_name()}"
        return told if kind == PLAIN else f"{told}, {kind}"

    def check(self, kind: FileKind) -> None:
        """Raise UsageError if the runtime does not open such files."""
        if kind.format not in _OPENED[self.runtime]:
            able = " or ".join(_OPENED[self.runtime])
            raise UsageError(
                f"`format={kind.format}`: {self.runtime} opens {able}; `command` names another program"
            )

    def time(self, files: Files, repeats: int | None, tolerance: float, **session: Any) -> dict[str, Timing]:
        """Return the latencies of files; `session` holds the state of `time_all`."""
        session_of = _session(self.runtime)
        makers = {name: partial(session_of, paths[0], self.threads) for name, paths in files.items()}
        return time_all(
            makers,
            loads=LOADS,
            repeats=repeats or REPEATS,
            tolerance=tolerance,
            stopwatch=host_stopwatch(),
            **session,
        )

    def facts(self) -> dict[str, Any]:
        """Return what a run records beside a time."""
        return {"runtime": self.version, "threads": self.threads, "machine": host.cpu_name()}


@dataclass(frozen=True)
class There:
    """A command that runs files elsewhere."""

    command: Elsewhere

    def words(self, kind: FileKind) -> str:
        """Return the command and the kind of its files, as the CSV records them."""
        return f"{kind}: {self.command.words}"

    def check(self, kind: FileKind) -> None:
        """Any file may be given to a command."""

    def time(self, files: Files, repeats: int | None, tolerance: float, **session: Any) -> dict[str, Timing]:
        """Return the latencies of files; `session` holds the state of `time_runs`."""
        asked = {"pattern": self.command.pattern, "unit": self.command.unit or "as printed"}
        session["request"] = {**session.get("request", {}), **asked}
        runs = {name: partial(self.command.time_ms, paths) for name, paths in files.items()}
        return time_runs(runs, repeats=repeats or RUNS_ELSEWHERE, tolerance=tolerance, **session)

    def facts(self) -> dict[str, Any]:
        """Return what a run records beside a time."""
        return {"runtime": self.command.words, "machine": "elsewhere, by this command"}


@dataclass(frozen=True)
class Measurement:
    """The timings of this measurement, and the networks that stayed noisy."""

    timings: dict[str, Timing]  # by the name of a network, or of an exported file
    noisy: tuple[str, ...]
    kept: int  # networks that were measured before
    runtime: str
    document: Mapping[str, Any] = field(default_factory=dict)  # of a run: its arch.json


def measure_sample(
    file: Path,
    space: SearchSpace,
    by: Here | There,
    kind: FileKind = PLAIN,
    *,
    repeats: int | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
    quiet: bool = False,
) -> Measurement:
    """Time the networks of a sample's CSV that have no latency yet, from the files beside it.

    Files that are not there are written first. The times are written into the CSV once all networks are
    timed. When interrupted, it saves its samples and raises Interrupted; the next call continues from them,
    also after a MeasurementError of a command. With `force`, all networks are timed again. Raises UsageError
    for files that the runtime does not open, TableError for a broken CSV, CheckpointError if existing times
    or samples come from another runtime.
    """
    by.check(kind)
    networks = read_measured(file, space)
    words = by.words(kind)
    wanted = [network for network in networks if force or network.latency_ms is None]
    others = {n.runtime for n in networks if n not in wanted} - {words}
    if others:
        raise CheckpointError(
            f"{file}: has times of {others.pop()!r}, this is {words!r}: times of one CSV are compared, "
            "so measure all again with `force=True`, or another sample"
        )
    files = _present(space, wanted, file.parent, kind, quiet)
    state_file = file.with_suffix(".samples.json")
    timings = by.time(
        files,
        repeats,
        tolerance,
        state_file=state_file,
        request={
            "runtime": words,
            "networks": hashlib.sha256(repr([(n.name, n.arch) for n in networks]).encode()).hexdigest()[:12],
        },
        resume=state_file.exists() and not force,
        go_on="the same command",
        quiet=quiet,
    )
    told = {"runtime": words, "format": kind.format, "precision": kind.precision}
    new: dict[str, dict[str, Any]] = {
        name: {"latency_ms": t.median_ms, "p95_ms": t.p95_ms, **told} for name, t in timings.items()
    }
    write_measured(file, [replace(network, **new.get(network.name, {})) for network in networks])
    return Measurement(timings, noisy(timings, tolerance), len(networks) - len(wanted), words)


def _present(
    space: SearchSpace, networks: Sequence[Measured], folder: Path, kind: FileKind, quiet: bool
) -> Files:
    """Return the files of networks, once those that are missing are written."""
    files = {network.name: kind.files(folder, network.name) for network in networks}
    missing = [n for n in networks if not all(path.is_file() for path in files[n.name])]
    if missing:
        write_timed(space, missing, folder, kind, 0, quiet)
    return files


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


def measure_exported(
    folder: Path, by: Here | There, kind: FileKind = PLAIN, *, repeats: int | None = None, quiet: bool = True
) -> Measurement:
    """Time a run's exported file, and add the time to the run's arch.json, which the result holds.

    The prediction is for the space's resolution, so a file of another resolution is refused.
    Raises CheckpointError if nothing is exported, MeasurementError if a command fails.
    """
    by.check(kind)
    found = find_arch(folder)
    file, *others = kind.files(folder / EXPORT_FOLDER, "model")
    px = found.space.input.resolution_px
    precision = "" if kind.precision == "fp32" else f" --precision {kind.precision}"
    fix = f"qnas export {folder} --format {kind.format}{precision} --resolution {px}"
    if missing := [path for path in (file, *others) if not path.is_file()]:
        raise CheckpointError(f"{missing[0]}: no such file: run {fix} first")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    about = read_json(file.with_name(f"{file.name}{PARITY}"), CheckpointError)
    if sha256 not in (about.get("digests") or ()):
        raise CheckpointError(f"{file}: changed since its export: run {fix} --force")
    if about.get("resolution_px") != px:
        raise CheckpointError(
            f"{file}: its input has {about.get('resolution_px')} px, the prediction is for {px} px: "
            f"run {fix} --force"
        )
    timings = by.time({file.name: (file, *others)}, repeats, TOLERANCE, quiet=quiet)
    measured = {
        **_timing_facts(timings[file.name]),
        **by.facts(),
        "date": date.today().isoformat(),
        "file": f"{EXPORT_FOLDER}/{file.name}",
        "sha256": sha256,
    }
    document = {**found.document, "measured": measured}
    write_json(folder / ARCH_FILE, document)
    return Measurement(timings, noisy(timings), 0, by.words(kind), document)


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
    return {
        file.files[0]: {
            **_timing_facts(timings[file.files[0]]),
            "runtime": file.runtime,
            "threads": threads,
            "machine": host.cpu_name(),
            "date": date.today().isoformat(),
        }
        for file in files
    }


def _timing_facts(timing: Timing) -> dict[str, Any]:
    return {"p50_ms": timing.median_ms, "p95_ms": timing.p95_ms, "runs": timing.repeats}
