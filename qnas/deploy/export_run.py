"""The export of a run's trained network as files to ship, checked on real images, with a model card."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from qnas.common.errors import CheckpointError, DataError, UsageError, abbreviate, nearest
from qnas.common.staging import one_writer, staged
from qnas.common.text import shown
from qnas.data.image_data import ImageData, Split, sample_images
from qnas.data.loading import GivenData, load_data, reopen
from qnas.data.pil_pixels import FULL_BITS
from qnas.deploy.card import JSON, MARKDOWN, card_document, file_entries, file_metadata, write_card
from qnas.deploy.export.formats import (
    FORMATS,
    Exported,
    check_request,
    export_files,
    file_names,
    optional_names,
)
from qnas.deploy.export.opset import check_opset
from qnas.deploy.export.parity import tolerance_of
from qnas.deploy.export.product import Product, Ranges, RealImages, Variant
from qnas.deploy.export.resizing import Resizing, compare_sizes
from qnas.deploy.file_latency import FileLatency, predict_exported
from qnas.deploy.former_export import FormerExport, read_former
from qnas.deploy.measurement import time_exported
from qnas.deploy.targets import (
    DEFAULT,
    Choice,
    DeviceFiles,
    choose_formats,
    device_files,
    is_for_phone_gpus,
    precisions_of,
    targets_of,
)
from qnas.runs.finished_run import verify_certificate
from qnas.runs.found_arch import FoundArch, find_arch, read_result, trained_folder
from qnas.runs.names import EXPORT_FOLDER, SAMPLE_FILE
from qnas.runs.tensors import load_tensors
from qnas.spaces.lower import check_resolution, lower
from qnas.training.supernet_weights import build_trained, weights_digest

IMAGES = 512  # test images to check a file with
CALIBRATION_IMAGES = 256  # training images to calibrate int8 with


@dataclass(frozen=True)
class ExportRequest:
    """The formats to write, the images to check them with, and the threads to time them with."""

    formats: Sequence[str] | None = None  # None: what the devices of the search run
    aot: bool = False  # also an AOTInductor package
    precision: str | None = None  # None: what the devices' latencies are of, fp32 where `formats` are given
    opset: int | None = None  # of ONNX; None: each format's own
    ranges: str = "minmax"  # int8: how the range of a map is found
    symmetric: bool | None = None  # int8: maps with a zero point of zero; None: where a device needs it
    resolution_px: int | None = None  # None: as in training
    batch: int | None = None  # None: any batch size
    data: GivenData | None = None  # None: the data of the training
    images: int = IMAGES
    max_drop: float | None = None  # of the accuracy; None: the precision's default
    allow_drop: bool = False  # at another resolution than that of the training
    threads: int | None = None  # to time the files with; None: they are not timed
    force: bool = False

    def __post_init__(self) -> None:
        if self.formats is not None and not self.formats:
            raise UsageError("`formats`: expected at least one")
        if self.threads is not None and self.batch not in (None, 1):
            raise UsageError(f"`measure=True` times one image: leave out `batch={self.batch}`")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise UsageError(f"`max_drop={self.max_drop}`: expected a share of the images, 0 to 1")

    def variant(self, precision: str) -> Variant:
        """Return how the files are written. Raises UsageError for what is unknown or does not fit."""
        given = (*(self.formats or ()), *(["aot"] if self.aot else []))
        precision = check_request(given, precision, self.batch)
        if self.opset is not None:
            check_opset(self.opset)
        if self.ranges not in get_args(Ranges):
            raise UsageError(f"`ranges={self.ranges!r}`: {nearest(self.ranges, get_args(Ranges))}")
        return Variant(precision, self.opset, cast(Ranges, self.ranges), bool(self.symmetric), self.max_drop)

    def precisions(self, found: FoundArch) -> tuple[str, ...]:
        """Return the precisions to write an architecture in."""
        if self.precision is not None:
            return (self.precision,)
        return precisions_of(targets_of(found)) if self.formats is None else ("fp32",)

    def choice(self, found: FoundArch, precision: str) -> Choice:
        """Return the formats to write of an architecture. Raises UsageError if none can be written."""
        if self.formats is not None:
            choice = Choice(tuple(self.formats), {})
        elif self.opset is not None:  # of ONNX alone
            choice = Choice((DEFAULT,), {})
        else:
            targets = targets_of(found)
            if self.precision is None:
                targets = tuple(target for target in targets if target.precision == precision)
            choice = choose_formats(targets, precision, self.batch)
        return replace(choice, formats=(*choice.formats, "aot")) if self.aot else choice

    def command(self, source: Path, out: Path | None) -> str:
        """Return the command that exports a network to the same folder, without a format."""
        parts = [f"qnas export {source}"]
        parts += [f"--resolution {self.resolution_px}"] if self.resolution_px is not None else []
        return " ".join([*parts, f"--out {out}"] if out is not None else parts)


@dataclass(frozen=True)
class ExportedFiles(Sequence[Path]):
    """The paths of exported files; `files` has the facts about each and its check.

    `predicted` has the latency of the files on each device of the search, and `devices` the files that run
    there, those of former exports too; both are empty for an architecture without a search.
    """

    folder: Path
    files: tuple[Exported, ...]
    measured: Mapping[str, Mapping[str, Any]]  # by file name; empty if nothing was timed
    channels: int
    predicted: tuple[FileLatency, ...]
    devices: tuple[DeviceFiles, ...]
    resizing: Resizing | None = None  # None: the resolution is that of the training

    @property
    def latency_ms(self) -> float | None:
        """The latency of the files on the first device of the search, None if it is not known."""
        return self.predicted[0].latency_ms if self.predicted else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: Any) -> Any:
        return [self.folder / file.files[0] for file in self.files][number]

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        first = self.predicted[0] if self.predicted else None
        return {
            "folder": str(self.folder),
            "files": [
                {"path": str(path), **file.facts(), "measured": self.measured.get(path.name)}
                for path, file in zip(self, self.files, strict=True)
            ],
            "device": first and first.device,
            "budget_ms": first and first.budget_ms,
            "latency_ms": first and first.latency_ms,
            "latency_resolution_px": first and first.resolution_px,
            "predicted": [each.facts() for each in self.predicted],
            "resizing": self.resizing and self.resizing.facts(),
            "devices": [each.facts() for each in self.devices],
        }


def export_trained(source: Path, out: Path | None, request: ExportRequest) -> ExportedFiles:
    """Export a trained network; `source` is its run, the folder of train-subnet, or the arch.json in it.

    The files and the card come into place together, once every file is checked. Files of former exports of
    the same weights stay, and those of other weights are removed with them. Raises CheckpointError if there
    is no trained network, another export is at work, or a file exists already, UsageError for an invalid
    request, DataError if int8 has no images, ExportError if the outputs of a file differ from the network's,
    or the accuracy is lower at another resolution than that of the training.
    """
    request.variant(request.precision or "fp32")
    folder = source.parent if source.suffix == ".json" else source
    trained = trained_folder(folder)
    if trained is None:
        raise CheckpointError(f"{source}: no trained network here: run qnas train-subnet {source} first")
    found = find_arch(trained)
    plans = [(request.variant(p), request.choice(found, p)) for p in request.precisions(found)]
    command = request.command(source, out)
    out = out or folder / EXPORT_FOLDER
    _check_folder(out)
    names = [
        file
        for variant, choice in plans
        for name in choice.formats
        for file in (*file_names(name, variant), *optional_names(name, variant))
    ]
    with one_writer(out, lambda process: CheckpointError(f"{out}: process {process} is exporting to it")):
        _check_free(out, names, request.force)
        result = read_result(trained, found)
        verify_certificate(found)
        weights_sha256 = weights_digest(trained)
        former = read_former(out, weights_sha256)
        _check_stale(out, former, request.force)
        return _export(found, result, plans, request, out, weights_sha256, former, command)


def _export(
    found: FoundArch,
    result: Mapping[str, Any],
    plans: Sequence[tuple[Variant, Choice]],
    request: ExportRequest,
    out: Path,
    weights_sha256: str,
    former: FormerExport,
    command: str,
) -> ExportedFiles:
    """Write the files of a trained network and their card into a folder."""
    trained_px = result["resolution_px"]
    px = request.resolution_px or trained_px
    check_resolution(found.space, px)
    is_int8 = any(variant.precision.startswith("int8") for variant, _ in plans)
    images, calibration = _checking_images(request, found, result, px, is_int8=is_int8)
    predicted = predict_exported(found, px, len(result["classes"]))
    metadata = file_metadata(found, result, px, predicted)
    product = _product(found, result, px, metadata, request.batch, calibration, weights_sha256)
    if request.symmetric is None and any(variant.precision == "int8" for variant, _ in plans):
        symmetric = needs_symmetric(found)
        plans = [(replace(v, symmetric=symmetric and v.precision == "int8"), choice) for v, choice in plans]
    resizing = None
    if px != trained_px:
        as_trained, _ = _checking_images(request, found, result, trained_px, is_int8=False)
        resizing = compare_sizes(product.network, images, as_trained)
        if not request.allow_drop:
            resizing.check(min(tolerance_of(variant).drop for variant, _ in plans))
    # where a tool is not at hand any more, what it wrote of another file does not stay
    optional = (file for v, choice in plans for name in choice.formats for file in optional_names(name, v))
    with staged(out, without=(*former.replaced, *optional), last=(JSON, MARKDOWN)) as stage:
        files = tuple(
            file
            for variant, choice in plans
            for file in export_files(product, choice.formats, variant, stage, images, shown=out)
        )
        unable = {name: why for _, choice in plans for name, why in choice.unable.items()}
        measured = {} if request.threads is None else time_exported(files, stage, product, request.threads)
        entries = {**former.entries, **file_entries(files, measured, predicted, resizing)}
        targets = targets_of(found)
        devices = device_files(targets, entries, unable, command)
        # the card goes to other machines: without what is missing here, and where the run lies
        on_card = device_files(targets, entries, {}, "qnas export RUN")
        write_card(stage, card_document(found, result, product, weights_sha256, entries, on_card))
    return ExportedFiles(out, files, measured, product.channels, predicted, devices, resizing)


def needs_symmetric(found: FoundArch) -> bool:
    """Return whether a device of the search runs int8 with zero points of 0 alone: a GPU, by TensorRT.

    A device whose file is gone says nothing.
    """
    return any("CUDA" in target.runtime or "TensorRT" in target.runtime for target in targets_of(found))


def _check_folder(out: Path) -> None:
    endings = tuple(ending for known in FORMATS.values() for ending in known.endings)
    if out.name.endswith(endings):
        raise UsageError(f"`out={out}`: expected a folder, in which qnas names the files")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: expected a folder, found a file")


def _check_free(out: Path, files: Sequence[str], force: bool) -> None:
    there = [out / file for file in files if os.path.lexists(out / file)]
    if there and not force:
        raise CheckpointError(f"{there[0]}: exists already: `force=True` replaces it, or another `out`")
    if folders := [path for path in there if path.is_dir() and not path.is_symlink()]:
        raise CheckpointError(
            f"{folders[0]}: expected a file, found a folder: move it away, or another `out`"
        )


def _check_stale(out: Path, former: FormerExport, force: bool) -> None:
    if former.stale and not force:
        raise CheckpointError(
            f"{out / former.stale[0]}: of other weights than those of the network: `force=True` removes it, "
            "or another `out`"
        )


def _product(
    found: FoundArch,
    result: Mapping[str, Any],
    px: int,
    metadata: Mapping[str, str],
    batch: int | None,
    calibration: RealImages | None,
    weights_sha256: str,
) -> Product:
    classes = tuple(result["classes"])
    return Product(
        "qnas_" + re.sub(r"\W", "_", found.space.name),
        build_trained(found, len(classes), weights_sha256),
        lower(found.space, found.arch, resolution_px=px, classes=len(classes)),
        classes,
        tuple(result["mean"]),
        tuple(result["std"]),
        found.space.input.channels,
        px,
        metadata,
        batch,
        result.get("significant_bits") or FULL_BITS,
        result.get("pads") is True,
        calibration,
        on_gpu=is_for_phone_gpus(targets_of(found)),
    )


def _checking_images(
    request: ExportRequest, found: FoundArch, result: Mapping[str, Any], px: int, *, is_int8: bool
) -> tuple[RealImages, RealImages | None]:
    """Return the test images to check files with, and for int8 the training images to calibrate with.

    If the data of the training are missing, the check uses the few test images that the training kept.
    """

    def real(pixels: torch.Tensor, labels: torch.Tensor, source: str) -> RealImages:
        return RealImages(pixels, labels, tuple(result["mean"]), tuple(result["std"]), source)

    try:
        data = _load_data(request.data, found, result, px)
    except DataError as error:
        if is_int8 or request.data is not None:
            said = request.data is not None or "`data`" in str(error)
            fix = "" if said else ": `data` says where its calibration images are"
            raise DataError(f"{error}{fix}") from error
        path = found.folder / SAMPLE_FILE
        kept = load_tensors(path)
        pixels, labels = kept.get("images"), kept.get("labels")
        if pixels is None or labels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise CheckpointError(f"{path}: expected uint8 images (n, C, H, W) with labels") from error
        return real(pixels, labels, f"the {len(labels)} test images that the training kept").at(px), None

    def some(split: Split, n: int, what: str) -> RealImages:
        pixels, labels = sample_images(split, n)
        which = f"all {len(split)}" if len(labels) == len(split) else f"{len(labels)} of the {len(split)}"
        return real(pixels, labels, f"{which} {what} images of {data.name}")

    calibration = some(data.train_and_heldout, CALIBRATION_IMAGES, "training") if is_int8 else None
    return some(data.test, request.images, "test"), calibration


def _load_data(given: GivenData | None, found: FoundArch, result: Mapping[str, Any], px: int) -> ImageData:
    data = load_data(
        reopen(given, result),
        resolution_px=px,
        channels=found.space.input.channels,
        memory_limit_bytes=0,  # so that only the images that are used are decoded
        max_broken=None,  # broken images among them are left out
        bits=result.get("significant_bits") or FULL_BITS,
        normalisation=(tuple(result["mean"]), tuple(result["std"])),
        quiet=True,
    )
    if list(data.classes) != list(result["classes"]):
        of_data, of_network = (
            f"{abbreviate([shown(name, 20) for name in names])} ({len(names)})"
            for names in (data.classes, result["classes"])
        )
        raise DataError(f"data {shown(data.name)}: the classes are {of_data}, the network's {of_network}")
    return data
