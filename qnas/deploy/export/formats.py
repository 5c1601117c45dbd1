"""The export formats of a trained network, behind one interface."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from qnas.common.errors import UsageError, nearest
from qnas.common.files import write_json
from qnas.deploy.export import onnx_format, openvino_format, standalone, torch_format
from qnas.deploy.export.parity import TOLERANCES, Parity, Tolerance, compare
from qnas.deploy.export.product import FilePrecision, Product, RealImages, Run
from qnas.deploy.export.tracing import told_as


@dataclass(frozen=True)
class Format:
    """The functions that write a format and read it back.

    `write` gets the path of the format's first file, whose suffix is the first of `suffixes`, and a name
    for messages. `runtime` returns the reader with its version, and raises UsageError if it is missing.
    """

    suffixes: tuple[str, ...]
    precisions: tuple[FilePrecision, ...]
    write: Callable[[Product, FilePrecision, Path, str], None]
    load: Callable[[Path], Run]
    runtime: Callable[[], str]


_ALL: tuple[FilePrecision, ...] = get_args(FilePrecision)
FORMATS: dict[str, Format] = {
    "onnx": Format((".onnx",), _ALL, onnx_format.write, onnx_format.load, onnx_format.runtime),
    "openvino": Format(
        (".xml", ".bin"), _ALL, openvino_format.write, openvino_format.load, openvino_format.version
    ),
    "torch": Format((".pt2",), ("fp32", "fp16"), torch_format.write, torch_format.load, torch_format.runtime),
    "standalone": Format(
        (".py", standalone.WEIGHTS), ("fp32", "fp16"), standalone.write, standalone.load, torch_format.runtime
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

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return asdict(self)


def check_request(formats: Sequence[str], precision: str) -> FilePrecision:
    """Return the precision, checked. Raises UsageError for what is unknown, missing or unsupported."""
    if precision not in _ALL:
        raise UsageError(f"`precision={precision!r}`: {nearest(precision, _ALL)}")
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"`formats={name!r}`: {nearest(name, FORMATS)}")
        if precision not in FORMATS[name].precisions:
            able = " or ".join(other for other in FORMATS if precision in FORMATS[other].precisions)
            own = " or ".join(FORMATS[name].precisions)
            raise UsageError(f"format {name} has no {precision}: take {own}, or the format {able}")
        FORMATS[name].runtime()
    return next(p for p in _ALL if p == precision)


def file_names(name: str, precision: FilePrecision) -> tuple[str, ...]:
    """Return the names of a format's files: `model.onnx`, `model_int8.onnx`."""
    stem = "model" if precision == "fp32" else f"model_{precision}"
    return tuple(f"{stem}{suffix}" for suffix in FORMATS[name].suffixes)


def export_files(
    product: Product,
    formats: Sequence[str],
    precision: FilePrecision,
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
    tolerance, shown = tolerance or TOLERANCES[precision], shown or folder
    exported = []
    for name in dict.fromkeys(formats):
        names, kind = file_names(name, precision), FORMATS[name]
        where, path = str(shown / names[0]), folder / names[0]
        kind.write(product, precision, path, where)
        with told_as(f"{where}: {kind.runtime()} cannot load the file"):
            run = kind.load(path)
        noise = precision == "fp32"
        parity = compare(
            product.network, run, images, tolerance, where=where, batch=product.batch, noise=noise
        )
        contents = [(folder / file).read_bytes() for file in names]
        written = Exported(
            name,
            precision,
            kind.runtime(),
            names,
            tuple(sha256(content).hexdigest() for content in contents),
            sum(map(len, contents)),
            product.resolution_px,
            product.batch,
            parity,
        )
        write_json(folder / f"{names[0]}{PARITY}", {"schema": "qnas.parity/1", **written.facts()})
        exported.append(written)
    return tuple(exported)
