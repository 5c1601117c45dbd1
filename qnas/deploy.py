"""A trained network of a run as a file to ship, with what is known of it in the file's metadata."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnas import host, run
from qnas.arch import FoundArch, find_arch
from qnas.data import normalise
from qnas.errors import CheckpointError
from qnas.export import ExportReport, export_onnx
from qnas.files import read_json, write_json
from qnas.latency.onnx_graph import read_onnx
from qnas.lower import check_resolution
from qnas.measurement import time_files
from qnas.runtimes import open_runtime
from qnas.subnet import build_subnet
from qnas.train_subnet import load_weights

MODEL = "model.onnx"


@dataclass(frozen=True)
class Deployed:
    """An exported file and what was searched for. Latencies are None for an arch without a search."""

    file: ExportReport
    channels: int
    resolution_px: int  # of the file's input
    deployed_px: int  # for which the latency was predicted
    device: str | None
    budget_ms: float | None
    latency_ms: float | None

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            "path": str(self.file.path),
            "bytes": self.file.size_bytes,
            "opset": self.file.opset,
            "resolution_px": self.resolution_px,
            "max_difference": self.file.max_difference,
            "scale": self.file.scale,
            "inputs_checked": self.file.inputs,
            "device": self.device,
            "budget_ms": self.budget_ms,
            "latency_ms": self.latency_ms,
            "latency_resolution_px": self.deployed_px,
        }


def export_trained(
    folder: Path, out: Path | None, *, resolution_px: int | None = None, force: bool = False
) -> Deployed:
    """Export the trained network of a run, or of a folder that train-subnet wrote.

    Raises CheckpointError where nothing is trained or the file exists already, ExportError where
    the file does not compute what the network computes.
    """
    trained = folder / run.SUBNET if (folder / run.SUBNET / run.RESULT).is_file() else folder
    if not (trained / run.RESULT).is_file():
        raise CheckpointError(f"{folder}: no trained network here: run qnas train-subnet {folder} first")
    result = _read_result(trained / run.RESULT)
    out = out or folder / run.EXPORT / MODEL
    if out.exists() and not force:
        raise CheckpointError(f"{out}: exists already: give --force to replace it, or another --out")
    found = find_arch(trained)
    px = resolution_px or result["resolution_px"]
    check_resolution(found.space, px)
    network = build_subnet(found.space, found.arch, len(result["classes"]))
    load_weights(network, run.load_tensors(trained / run.WEIGHTS), trained / run.WEIGHTS)
    report = export_onnx(
        network,
        out,
        channels=found.space.input.channels,
        resolution_px=px,
        images=_check_images(trained, result, px),
        metadata=_metadata(found, result, px),
    )
    return Deployed(
        report,
        found.space.input.channels,
        px,
        found.space.input.resolution_px,
        found.document.get("device"),
        found.document.get("budget_ms"),
        found.document.get("latency_ms"),
    )


def measure_exported(folder: Path, *, runtime: str, threads: int, repeats: int) -> dict[str, Any]:
    """Time a run's exported file on this machine, and record it in the run's arch.json; return that.

    What was predicted is a latency at the space's resolution: a file of another one is refused.
    Raises CheckpointError where nothing is exported.
    """
    found = find_arch(folder)
    file = folder / run.EXPORT / MODEL
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
        "p50_ms": timing.median_ms,
        "p95_ms": timing.p95_ms,
        "runs": timing.repeats,
        "runtime": opened.version,
        "threads": threads,
        "machine": host.cpu_name(),
        "date": date.today().isoformat(),
        "file": f"{run.EXPORT}/{MODEL}",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    document = {**found.document, "measured": measured}
    write_json(folder / run.ARCH, document)
    return document


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path, CheckpointError)
    missing = [k for k in ("resolution_px", "classes", "mean", "std", "test_accuracy") if k not in result]
    if missing:
        raise CheckpointError(f"{path}: missing: {', '.join(missing)}")
    return result


def _check_images(trained: Path, result: Mapping[str, Any], px: int) -> Tensor:
    """Return the run's sample of test images, normalised and at this resolution."""
    images = run.load_tensors(trained / run.SAMPLE).get("images")
    if images is None or images.dtype != torch.uint8 or images.ndim != 4:
        raise CheckpointError(f"{trained / run.SAMPLE}: expected uint8 images (n, C, H, W)")
    normal = normalise(images, result["mean"], result["std"])
    if px == normal.shape[-1]:
        return normal
    return F.interpolate(normal, (px, px), mode="bilinear", antialias=True)


def _metadata(found: FoundArch, result: Mapping[str, Any], px: int) -> dict[str, str]:
    """Return what a user of the file needs: ONNX metadata are strings, lists are written as JSON."""
    known = {
        "classes": result["classes"],
        "mean": result["mean"],
        "std": result["std"],
        "input": f"RGB in 0 to 1, minus mean, over std; {px} x {px} px",
        "test_accuracy": result["test_accuracy"],
        "trained_resolution_px": result["resolution_px"],
        "space": found.space.name,
        "choices": list(found.arch.choices),
        "latency_device": found.document.get("device"),
        "latency_budget_ms": found.document.get("budget_ms"),
        "latency_predicted_ms": found.document.get("latency_ms"),
        "latency_resolution_px": found.space.input.resolution_px,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items() if v is not None}
