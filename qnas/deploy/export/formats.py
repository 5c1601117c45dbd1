"""The export formats of a trained network, behind one interface."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from torch import nn

from qnas.common.errors import UsageError, nearest
from qnas.common.files import write_json
from qnas.deploy.export import (
    aot_format,
    executorch_format,
    onnx_format,
    onnx_runtime,
    openvino_format,
    standalone,
    tflite_format,
    torch_format,
    vpu_format,
)
from qnas.deploy.export.halves import check_halves
from qnas.deploy.export.lowering import MYRIAD, lowered
from qnas.deploy.export.opset import TRACED_OPSET, readers
from qnas.deploy.export.parity import TOLERANCES, Parity, Tolerance, compare, tolerance_of
from qnas.deploy.export.product import FilePrecision, Product, RealImages, Run, Variant
from qnas.deploy.export.tracing import told_as


def _nothing(*_: object) -> tuple[str, ...]:
    return ()


def _deployed(product: Product, variant: Variant) -> nn.Module:
    return product.deployed()


def _deployed_onnx(product: Product, variant: Variant) -> nn.Module:
    return product.deployed(forms=onnx_format.forms_in(variant))


@dataclass(frozen=True)
class Format:
    """The functions that write a format and read it back.

    `write` gets the path of the format's first file, whose ending is the first of `endings`, and a name
    for messages. `runtime` returns the reader with its version, and raises UsageError if it is missing.
    `check`, of the product, its variant, that path, real images and that name, checks what outputs on a CPU
    do not show; it returns what it saw, a sentence each, and raises ExportError.
    """

    endings: tuple[str, ...]  # of its files' names, after the stem
    precisions: tuple[FilePrecision, ...]
    write: Callable[[Product, Variant, Path, str], None]
    load: Callable[[Path], Run]
    runtime: Callable[[], str]
    runs_on: str | Callable[[Variant], str]  # devices, runtimes and versions
    check: Callable[[Product, Variant, Path, RealImages, str], tuple[str, ...]] = _nothing
    batch: int | None = None  # the only batch size of its files
    channels_last: bool = False  # images as (B, H, W, C)
    optional: tuple[str, ...] = ()  # endings of files that are written where their tool is at hand
    # the network as the files state it, in float32: what is emulated in halves
    computed: Callable[[Product, Variant], nn.Module] = _deployed
    in_halves: bool = False  # whether the device computes in halves, whatever the precision of the file


def _onnx_runs_on(variant: Variant) -> str:
    opset = variant.opset or TRACED_OPSET
    if variant.precision == "int8" and not variant.symmetric:
        return f"{readers(opset, without=('TensorRT',))}; not TensorRT, which reads symmetric int8 alone"
    return readers(opset)


_ALL: tuple[FilePrecision, ...] = get_args(FilePrecision)
_STATIC: tuple[FilePrecision, ...] = ("fp32", "fp16", "int8")
FORMATS: dict[str, Format] = {
    "onnx": Format(
        (".onnx",),
        _STATIC,
        onnx_format.write,
        onnx_format.load,
        onnx_runtime.runtime,
        _onnx_runs_on,
        onnx_format.check,
        computed=_deployed_onnx,
    ),
    "openvino": Format(
        (".xml", ".bin"),
        _STATIC,
        openvino_format.write,
        openvino_format.load,
        openvino_format.version,
        "Intel CPUs, GPUs and NPUs by OpenVINO 2023.0 or newer",
        openvino_format.check,
        computed=_deployed_onnx,
    ),
    "tflite": Format(
        (".tflite",),
        _ALL,
        tflite_format.write,
        tflite_format.load,
        tflite_format.runtime,
        "Arm and x86 CPUs, and GPUs of phones, by LiteRT or TFLite 2.9 or newer; without GELU 2.0 or newer",
        tflite_format.check,
        batch=1,
        computed=lambda product, _: product.deployed(forms=tflite_format.forms_of(product)),
        channels_last=True,
    ),
    "torch": Format(
        (".pt2",),
        ("fp32", "fp16"),
        torch_format.write,
        torch_format.load,
        torch_format.runtime,
        "CPUs and GPUs by torch, of the version that wrote it or newer",
    ),
    "aot": Format(
        ("_aot.pt2",),
        ("fp32", "fp16"),
        aot_format.write,
        aot_format.load,
        aot_format.runtime,
        aot_format.runs_on,
    ),
    "executorch": Format(
        (".pte",),
        ("fp32",),
        executorch_format.write,
        executorch_format.load,
        executorch_format.runtime,
        "CPUs of phones (Android, iOS) and boards, by ExecuTorch of the version that wrote it or newer, with "
        "its XNNPACK backend",
        batch=1,
    ),
    "standalone": Format(
        (".py", standalone.WEIGHTS),
        ("fp32", "fp16"),
        standalone.write,
        standalone.load,
        torch_format.runtime,
        "CPUs and GPUs by torch and safetensors",
        computed=lambda product, _: lowered(product.network, fold=False),
    ),
    "vpu": Format(
        vpu_format.FILES,
        ("fp32",),
        vpu_format.write,
        onnx_format.load,
        vpu_format.runtime,
        "Myriad X (Neural Compute Stick 2) by OpenVINO 2021.3 or 2021.4",
        vpu_format.check,
        batch=vpu_format.BATCH,
        optional=vpu_format.OPTIONAL,
        computed=lambda product, _: product.deployed(forms=MYRIAD),
        in_halves=True,
    ),
}

PARITY = ".parity.json"  # appended to a file's name


@dataclass(frozen=True)
class Exported:
    """The files of one format, and how far their outputs are from the network's."""

    format: str
    precision: FilePrecision
    runtime: str  # used for the check
    files: tuple[str, ...]  # names; the first is the one to load
    digests: tuple[str, ...]  # SHA-256 of each
    size_bytes: int  # of all files
    resolution_px: int
    batch: int | None
    parity: Parity
    runs_on: str  # devices, runtimes and versions
    checks: tuple[str, ...]  # what else was seen, a sentence each

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return asdict(self)


def check_request(formats: Sequence[str], precision: str, batch: int | None = None) -> FilePrecision:
    """Return the precision, checked. Raises UsageError for what is unknown, missing or unsupported."""
    if precision not in _ALL:
        raise UsageError(f"`precision={precision!r}`: {nearest(precision, _ALL)}")
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"`formats={name!r}`: {nearest(name, FORMATS)}")
        known = FORMATS[name]
        if precision not in known.precisions:
            able = " or ".join(other for other in FORMATS if precision in FORMATS[other].precisions)
            own = " or ".join(known.precisions)
            raise UsageError(f"format {name} has no {precision}: take {own}, or the format {able}")
        if known.batch is not None and batch not in (None, known.batch):
            raise UsageError(f"`batch={batch}`: files of the format {name} take a batch of {known.batch}")
        known.runtime()
    return next(p for p in _ALL if p == precision)


def file_names(name: str, variant: Variant) -> tuple[str, ...]:
    """Return the names of a format's files: `model.onnx`, `model_int8.onnx`."""
    return tuple(f"{variant.stem}{ending}" for ending in FORMATS[name].endings)


def optional_names(name: str, variant: Variant) -> tuple[str, ...]:
    """Return the names of the files that a format writes where their tool is at hand."""
    return tuple(f"{variant.stem}{ending}" for ending in FORMATS[name].optional)


def export_files(
    product: Product,
    formats: Sequence[str],
    variant: Variant,
    folder: Path,
    images: RealImages,
    *,
    tolerance: Tolerance | None = None,
    shown: Path | None = None,
) -> tuple[Exported, ...]:
    """Write a product into a folder in these formats, read each file back and compare on real images.

    The result is written beside each file as FILE.parity.json. `tolerance` defaults to that of the
    precision; messages name `shown` instead of the folder if the files are moved there later. Raises
    ExportError if a file cannot be written or its outputs differ; the caller then discards the folder.
    """
    tolerance, shown = tolerance or tolerance_of(variant), shown or folder
    exported = []
    for name in dict.fromkeys(formats):
        kind = FORMATS[name]
        first = file_names(name, variant)[0]
        where, path = str(shown / first), folder / first
        batch = kind.batch or product.batch
        kind.write(product, variant, path, where)
        with told_as(f"{where}: {kind.runtime()} cannot load the file"):
            run = kind.load(path)
        noise = variant.precision == "fp32"
        parity = compare(product.network, run, images, tolerance, where=where, batch=batch, noise=noise)
        checks: tuple[str, ...] = ()
        if kind.in_halves or variant.precision == "fp16":
            halves = replace(TOLERANCES["fp16"], drop=tolerance.drop)
            checks = (check_halves(kind.computed(product, variant), product.network, images, where, halves),)
        checks += kind.check(product, variant, path, images, where)
        optional = (file for file in optional_names(name, variant) if (folder / file).is_file())
        names = (*file_names(name, variant), *optional)
        contents = [(folder / file).read_bytes() for file in names]
        written = Exported(
            name,
            variant.precision,
            kind.runtime(),
            names,
            tuple(sha256(content).hexdigest() for content in contents),
            sum(map(len, contents)),
            product.resolution_px,
            batch,
            parity,
            kind.runs_on if isinstance(kind.runs_on, str) else kind.runs_on(variant),
            checks,
        )
        write_json(folder / f"{first}{PARITY}", {"schema": "qnas.parity/1", **written.facts()})
        exported.append(written)
    return tuple(exported)
