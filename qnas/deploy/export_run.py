"""A trained network of a run as files to ship, checked on real images, with a card of what is known of it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qnas.common import host
from qnas.common.errors import CheckpointError, DataError, UsageError
from qnas.common.files import read_json, staged, write_json
from qnas.common.intervals import wilson
from qnas.data.image_data import ImageData, Split, sample_images
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.deploy.export.card import SCHEMA, kept_files, write_card
from qnas.deploy.export.formats import FORMATS, Exported, check_request, export_files, file_names
from qnas.deploy.export.parity import TOLERANCES
from qnas.deploy.export.product import Precision, Product, RealImages
from qnas.deploy.measurement import time_calls, time_files
from qnas.deploy.runtimes import Shape, function_session, onnx_session, open_runtime, openvino_session
from qnas.deploy.timing import Call
from qnas.latency.onnx.networks import read_onnx
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import FoundArch, find_arch
from qnas.runs.names import ARCH_FILE, EXPORT_FOLDER, RESULT_FILE, SAMPLE_FILE, SUBNET_FOLDER, WEIGHTS_FILE
from qnas.runs.run_folder import read_config
from qnas.runs.tensors import load_tensors
from qnas.spaces.lower import check_resolution, count_macs, lower
from qnas.training.supernet_weights import load_weights

MODEL = "model.onnx"
IMAGES = 512  # of the test images that files are checked with
CALIBRATION_IMAGES = 256  # of the training images, for int8


@dataclass(frozen=True)
class Deployed:
    """Exported files and what was searched for. Latencies are None for an arch without a search."""

    folder: Path
    files: tuple[Exported, ...]
    measured: Mapping[str, Mapping[str, Any]]  # by the name of the file; empty where nothing was timed
    channels: int
    deployed_px: int  # for which the latency was predicted
    device: str | None
    budget_ms: float | None
    latency_ms: float | None

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            "folder": str(self.folder),
            "files": [
                {
                    "path": str(self.folder / file.files[0]),
                    **file.facts(),
                    "measured": self.measured.get(file.files[0]),
                }
                for file in self.files
            ],
            "device": self.device,
            "budget_ms": self.budget_ms,
            "latency_ms": self.latency_ms,
            "latency_resolution_px": self.deployed_px,
        }


@dataclass(frozen=True)
class ExportRequest:
    """What to write, how it is checked, and whether it is timed."""

    formats: Sequence[str] = ("onnx",)
    precision: str = "fp32"
    resolution_px: int | None = None  # None: that of training
    batch: int | None = None  # None: a free one
    data: str | None = None  # None: what was trained on
    images: int = IMAGES
    max_drop: float | None = None  # of the accuracy; None: that of the precision
    threads: int | None = None  # to time the files with; None: they are not timed
    force: bool = False

    def __post_init__(self) -> None:
        if not self.formats:
            raise UsageError("--format: expected at least one format")
        if self.threads is not None and self.batch not in (None, 1):
            raise UsageError(f"--measure times one image: leave out --batch {self.batch}")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise UsageError(f"--max-drop {self.max_drop}: expected a share of the images, 0 to 1")


def export_trained(source: Path, out: Path | None, request: ExportRequest) -> Deployed:
    """Export the trained network of a run, or of a folder that train-subnet wrote, or its arch.json.

    All files and the card take their places together, once every file is checked. Raises CheckpointError
    where nothing is trained or a file exists already, UsageError for what cannot be asked, DataError
    where int8 has no images, ExportError where a file does not compute what the network computes.
    """
    precision = check_request(request.formats, request.precision)
    folder = source.parent if source.suffix == ".json" else source
    trained = folder / SUBNET_FOLDER if (folder / SUBNET_FOLDER / RESULT_FILE).is_file() else folder
    if not (trained / RESULT_FILE).is_file():
        raise CheckpointError(f"{source}: no trained network here: run qnas train-subnet {source} first")
    out = out or folder / EXPORT_FOLDER
    _check_free(out, request, precision)
    result = _read_result(trained / RESULT_FILE)
    found = find_arch(trained)
    px = request.resolution_px or result["resolution_px"]
    check_resolution(found.space, px)
    images, calibration = _images(trained, found, result, request, precision, px)
    product = _product(trained, found, result, request, px, calibration)
    tolerance = TOLERANCES[precision]
    if request.max_drop is not None:
        tolerance = replace(tolerance, drop=request.max_drop)
    with staged(out) as stage:
        files = export_files(
            product, request.formats, precision, stage, images, tolerance=tolerance, shown=out
        )
        measured = {} if request.threads is None else _measure(files, stage, product, request.threads)
        write_card(stage, _card(trained, found, result, product, files, measured, out))
    return Deployed(
        out,
        files,
        measured,
        product.channels,
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
        "p50_ms": timing.median_ms,
        "p95_ms": timing.p95_ms,
        "runs": timing.repeats,
        "runtime": opened.version,
        "threads": threads,
        "machine": host.cpu_name(),
        "date": date.today().isoformat(),
        "file": f"{EXPORT_FOLDER}/{MODEL}",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    document = {**found.document, "measured": measured}
    write_json(folder / ARCH_FILE, document)
    return document


def _check_free(out: Path, request: ExportRequest, precision: Precision) -> None:
    if out.suffix in {suffix for known in FORMATS.values() for suffix in known.suffixes}:
        raise UsageError(f"--out {out}: expected a folder, the files in it have names of their own")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: expected a folder, found a file")
    for name in request.formats:
        for file in file_names(name, precision):
            if (out / file).exists() and not request.force:
                raise CheckpointError(
                    f"{out / file}: exists already: give --force to replace it, or another --out"
                )


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path, CheckpointError)
    needed = ("resolution_px", "classes", "mean", "std", "test_accuracy", "test_images", "data")
    missing = [key for key in needed if key not in result]
    if missing:
        raise CheckpointError(f"{path}: missing: {', '.join(missing)}")
    return result


def _images(
    trained: Path,
    found: FoundArch,
    result: Mapping[str, Any],
    request: ExportRequest,
    precision: Precision,
    px: int,
) -> tuple[RealImages, RealImages | None]:
    """Return the images to check files with, and for int8 those that it is calibrated with.

    Where the data that were trained on are not at hand, a check has the few test images that the
    training kept.
    """
    try:
        data = _load(request.data or result["data"], found, result, px)
    except DataError as error:
        if precision == "int8" or request.data is not None:
            fix = "" if request.data else ": --data says where its calibration images are"
            raise DataError(f"{error}{fix}") from error
        return _kept_images(trained, result).at(px), None

    def some(split: Split, n: int, what: str) -> RealImages:
        pixels, labels = sample_images(split, n)
        which = f"all {len(split)}" if len(labels) == len(split) else f"{len(labels)} of the {len(split)}"
        source = f"{which} {what} images of {data.name}"
        return RealImages(pixels, labels, tuple(result["mean"]), tuple(result["std"]), source)

    calibration = None
    if precision == "int8":
        calibration = some(data.train_and_heldout, CALIBRATION_IMAGES, "training")
    return some(data.test, request.images, "test"), calibration


def _load(spec: str, found: FoundArch, result: Mapping[str, Any], px: int) -> ImageData:
    data = load_data(
        parse_data_spec(spec),
        resolution_px=px,
        channels=found.space.input.channels,
        memory_limit_bytes=0,  # so that only the images that are used are decoded
        max_broken=None,  # those among them are left out
        quiet=True,
    )
    if list(data.classes) != list(result["classes"]):
        of_data, of_network = (
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"
            for names in (list(data.classes), list(result["classes"]))
        )
        raise DataError(f"data {spec}: the classes are {of_data}, the network's {of_network}")
    return data


def _kept_images(trained: Path, result: Mapping[str, Any]) -> RealImages:
    kept = load_tensors(trained / SAMPLE_FILE)
    images, labels = kept.get("images"), kept.get("labels")
    if images is None or labels is None or images.dtype != torch.uint8 or images.ndim != 4:
        raise CheckpointError(f"{trained / SAMPLE_FILE}: expected uint8 images (n, C, H, W) with labels")
    source = f"the {len(labels)} test images that the training kept"
    return RealImages(images, labels, tuple(result["mean"]), tuple(result["std"]), source)


def _product(
    trained: Path,
    found: FoundArch,
    result: Mapping[str, Any],
    request: ExportRequest,
    px: int,
    calibration: RealImages | None,
) -> Product:
    classes = tuple(result["classes"])
    network = build_subnet(found.space, found.arch, len(classes)).eval()
    load_weights(network, load_tensors(trained / WEIGHTS_FILE), trained / WEIGHTS_FILE)
    return Product(
        "qnas_" + re.sub(r"\W", "_", found.space.name),
        network,
        lower(found.space, found.arch, resolution_px=px, classes=len(classes)),
        classes,
        tuple(result["mean"]),
        tuple(result["std"]),
        found.space.input.channels,
        px,
        _metadata(found, result, px),
        request.batch,
        calibration,
    )


def _input(found: FoundArch, px: int) -> str:
    colours = {1: "grey", 3: "RGB"}.get(found.space.input.channels, f"{found.space.input.channels} channels")
    return f"{colours} in 0 to 1, minus mean, over std; the central square, resized to {px} x {px} px"


def _metadata(found: FoundArch, result: Mapping[str, Any], px: int) -> dict[str, str]:
    """Return what a user of the file needs: metadata are strings, lists are written as JSON."""
    known = {
        "classes": result["classes"],
        "mean": result["mean"],
        "std": result["std"],
        "input": _input(found, px),
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


def _measure(
    files: Sequence[Exported], folder: Path, product: Product, threads: int
) -> dict[str, dict[str, Any]]:
    """Time exported files on one image, in turns; return what is known of each by its name."""
    open_runtime("torch", threads=threads)  # checks the threads
    timings = time_calls(
        {
            file.files[0]: partial(_call, file.format, folder / file.files[0], product.shape, threads)
            for file in files
        }
    )
    return {
        file.files[0]: {
            "p50_ms": timings[file.files[0]].median_ms,
            "p95_ms": timings[file.files[0]].p95_ms,
            "runs": timings[file.files[0]].repeats,
            "runtime": file.runtime,
            "threads": threads,
            "machine": host.cpu_name(),
            "date": date.today().isoformat(),
        }
        for file in files
    }


def _call(name: str, path: Path, shape: Shape, threads: int) -> Call:
    """Return a call of an exported file; formats that torch loads run as functions of it."""
    sessions = {"onnx": onnx_session, "openvino": openvino_session}
    if name in sessions:
        return sessions[name](path, threads)
    return function_session(FORMATS[name].load(path), shape, threads)


def _card(
    trained: Path,
    found: FoundArch,
    result: Mapping[str, Any],
    product: Product,
    files: Sequence[Exported],
    measured: Mapping[str, Mapping[str, Any]],
    out: Path,
) -> dict[str, Any]:
    config, document = read_config(trained), found.document
    weights = hashlib.sha256((trained / WEIGHTS_FILE).read_bytes()).hexdigest()
    entries = {file.files[0]: {**file.facts(), "measured": measured.get(file.files[0])} for file in files}
    accuracy, n = result["test_accuracy"], result["test_images"]
    return {
        "schema": SCHEMA,
        "name": product.name,
        "task": {
            "kind": "image classification",
            "classes": list(product.classes),
            "input": _input(found, product.resolution_px),
            "mean": list(product.mean),
            "std": list(product.std),
        },
        # where the data lie here is nobody's business
        "data": {"kind": result["data"].partition(":")[0], "digest": config.get("data_digest")},
        "recipe": config.get("train", {}).get("recipe", {}),
        "from_supernet": config.get("from_supernet", False),
        "accuracy": {"top1": accuracy, "images": n, "interval95": list(wilson(accuracy, n))},
        "network": {
            "space": found.space.name,
            "space_digest": found.space.digest,
            "choices": list(found.arch.choices),
            "resolution_px": product.resolution_px,
            "macs": count_macs(product.blocks),
            "params": result.get("params"),
        },
        "limits": document.get("limits", []),
        "predicted_px": found.space.input.resolution_px,
        "certificate": document.get("certificate"),
        "weights_sha256": weights,
        "versions": config.get("versions", {}),
        "files": {**kept_files(out, weights), **entries},
    }
