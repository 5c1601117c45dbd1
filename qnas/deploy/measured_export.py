"""Exported files, timed on this machine."""

import hashlib
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from qnas.common import host
from qnas.common.errors import CheckpointError
from qnas.common.files import write_json
from qnas.deploy.export.formats import FORMATS, Exported
from qnas.deploy.export.product import Product
from qnas.deploy.measurement import time_calls, time_files
from qnas.deploy.runtimes import Shape, function_session, onnx_session, open_runtime, openvino_session
from qnas.deploy.timing import Call, Timing
from qnas.latency.onnx.networks import read_onnx
from qnas.runs.found_arch import find_arch
from qnas.runs.names import ARCH_FILE, EXPORT_FOLDER

MODEL = "model.onnx"


def measure_exported(folder: Path, *, runtime: str, threads: int, repeats: int) -> dict[str, Any]:
    """Time a run's exported file on this machine, and record it in the run's arch.json; return that.

    What was predicted is a latency at the space's resolution: a file of another one is refused.
    Raises CheckpointError where nothing is exported.
    """
    found = find_arch(folder)
    file = folder / EXPORT_FOLDER / MODEL
    px = found.space.input.resolution_px
    fix = f"qnas export {folder} --resolution {px}"
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
    """Time exported files on one image, in turns; return what is known of each by its name."""
    open_runtime("torch", threads=threads)  # checks the threads
    calls = {
        file.files[0]: partial(_call, file.format, folder / file.files[0], product.shape, threads)
        for file in files
    }
    timings = time_calls(calls)
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


def _call(name: str, path: Path, shape: Shape, threads: int) -> Call:
    """Return a call of an exported file; formats that torch loads run as functions of it."""
    sessions = {"onnx": onnx_session, "openvino": openvino_session}
    if name in sessions:
        return sessions[name](path, threads)
    return function_session(FORMATS[name].load(path), shape, threads)
