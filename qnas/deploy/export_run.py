"""A trained network of a run as files to ship, checked on real images, with a card of what is known of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnas.common.errors import CheckpointError, UsageError
from qnas.common.files import read_json, staged
from qnas.deploy.export.card import write_card
from qnas.deploy.export.formats import FORMATS, Exported, check_request, export_files, file_names
from qnas.deploy.export.parity import TOLERANCES
from qnas.deploy.export.product import FilePrecision, Product, RealImages
from qnas.deploy.export_facts import card_document, file_metadata
from qnas.deploy.export_images import checking_images
from qnas.deploy.export_request import ExportJob, ExportRequest
from qnas.deploy.measured_export import time_exported
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import find_arch
from qnas.runs.names import EXPORT_FOLDER, RESULT_FILE, SUBNET_FOLDER, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors
from qnas.spaces.lower import check_resolution, lower
from qnas.training.supernet_weights import load_weights


@dataclass(frozen=True)
class ExportedFiles(Sequence[Path]):
    """The paths of exported files, with what is known of each; `files` has their checks.

    Device, budget and latency are those that were searched for, None for an architecture without a search.
    """

    folder: Path
    files: tuple[Exported, ...]
    measured: Mapping[str, Mapping[str, Any]]  # by the name of the file; empty where nothing was timed
    channels: int
    deployed_px: int  # for which the latency was predicted
    device: str | None
    budget_ms: float | None
    latency_ms: float | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: Any) -> Any:
        return [self.folder / file.files[0] for file in self.files][number]

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            "folder": str(self.folder),
            "files": [
                {"path": str(path), **file.facts(), "measured": self.measured.get(path.name)}
                for path, file in zip(self, self.files, strict=True)
            ],
            "device": self.device,
            "budget_ms": self.budget_ms,
            "latency_ms": self.latency_ms,
            "latency_resolution_px": self.deployed_px,
        }


def export_trained(source: Path, out: Path | None, request: ExportRequest) -> ExportedFiles:
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
    job = ExportJob(request, precision, trained, found, result, px, out)
    images, calibration = checking_images(job)
    product = _product(job, calibration)
    tolerance = TOLERANCES[precision]
    if request.max_drop is not None:
        tolerance = replace(tolerance, drop=request.max_drop)
    with staged(out) as stage:
        files = export_files(
            product, request.formats, precision, stage, images, tolerance=tolerance, shown=out
        )
        measured = {} if request.threads is None else time_exported(files, stage, product, request.threads)
        write_card(stage, card_document(job, product, files, measured))
    return ExportedFiles(
        out,
        files,
        measured,
        product.channels,
        found.space.input.resolution_px,
        found.document.get("device"),
        found.document.get("budget_ms"),
        found.document.get("latency_ms"),
    )


def _check_free(out: Path, request: ExportRequest, precision: FilePrecision) -> None:
    if out.suffix in {suffix for known in FORMATS.values() for suffix in known.suffixes}:
        raise UsageError(f"`out={out}`: expected a folder, in which qnas names the files")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: expected a folder, found a file")
    for name in request.formats:
        for file in file_names(name, precision):
            if (out / file).exists() and not request.force:
                raise CheckpointError(
                    f"{out / file}: exists already: `force=True` replaces it, or another `out`"
                )


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path, CheckpointError)
    needed = ("resolution_px", "classes", "mean", "std", "test_accuracy", "test_images", "data")
    missing = [key for key in needed if key not in result]
    if missing:
        raise CheckpointError(f"{path}: missing: {', '.join(missing)}")
    return result


def _product(job: ExportJob, calibration: RealImages | None) -> Product:
    found, result, px = job.found, job.result, job.resolution_px
    classes = tuple(result["classes"])
    network = build_subnet(found.space, found.arch, len(classes)).eval()
    weights = job.trained / WEIGHTS_FILE
    load_weights(network, load_tensors(weights), weights)
    return Product(
        "qnas_" + re.sub(r"\W", "_", found.space.name),
        network,
        lower(found.space, found.arch, resolution_px=px, classes=len(classes)),
        classes,
        tuple(result["mean"]),
        tuple(result["std"]),
        found.space.input.channels,
        px,
        file_metadata(job),
        job.request.batch,
        calibration,
    )
