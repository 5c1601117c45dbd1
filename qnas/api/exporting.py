"""The export of a trained network from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qnas.common.arguments import check_arguments
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import ARCH_FILE, SUBNET_FOLDER

if TYPE_CHECKING:
    from qnas.data.loading import GivenData
    from qnas.deploy.export_run import ExportedFiles


def export(
    trained: FoundArch | str | Path,
    formats: str | Sequence[str] | None = None,
    *,
    aot: bool = False,
    precision: str | None = None,
    opset: int | None = None,
    ranges: str = "minmax",
    symmetric: bool | None = None,
    resolution_px: int | None = None,
    batch: int | None = None,
    data: "GivenData | None" = None,
    images: int | None = None,
    max_drop: float | None = None,
    allow_drop: bool = False,
    measure: bool = False,
    threads: int = 1,
    out: str | Path | None = None,
    force: bool = False,
) -> "ExportedFiles":
    """Write a trained network as files that run without qnas, each checked against the network.

    `formats` are of "vpu", "tflite", "onnx", "openvino", "torch", "aot", "executorch" and "standalone"; the
    default is what the devices of the search run, with "onnx" for what cannot be written here or is not
    known. `aot` adds an AOTInductor package for this processor. `precision` is "fp32", "fp16", "int8" or
    "int8-dynamic" (weights in int8, the ranges of maps found for each image); the default is "fp32", or
    without `formats` that of the files which the latencies of the search's devices are of. `opset` is of
    ONNX, 13 to 20, for runtimes that read no newer one; "onnx" is the default with it. In int8, `ranges` of
    maps are found by "minmax", "percentile" or "entropy", and `symmetric` maps have zero points of 0, as
    TensorRT needs (default: if a device of the search is a GPU). Images are `resolution_px` high and wide
    (default: as in training), in batches of any size or of `batch`.

    Each file is compared with the network on up to `images` test images of `data` (default: 512 images of
    the training's data). It is refused if the 95% interval of the drop of its accuracy lies above `max_drop`
    (default: 0.01, int8 0.02). The same holds for the network at another resolution than in training, unless
    `allow_drop`. `measure` times the files on this machine. Writes `out`, by default `RUN/export`. Returns
    the paths of the files, with facts about each, and in `devices` which file runs on which device of the
    search.

    Raises CheckpointError if there is no trained network or a file exists already, UsageError for an invalid
    request, ExportError if the outputs of a file differ from the network's; then nothing is written.
    """
    from qnas.deploy.export_run import IMAGES, ExportRequest, export_trained

    check_arguments(
        aot=aot,
        opset=opset,
        symmetric=symmetric,
        resolution_px=resolution_px,
        batch=batch,
        images=images,
        max_drop=max_drop,
        threads=threads,
    )
    request = ExportRequest(
        formats=formats if formats is None else (formats,) if isinstance(formats, str) else tuple(formats),
        aot=aot,
        precision=precision,
        opset=opset,
        ranges=ranges,
        symmetric=symmetric,
        resolution_px=resolution_px,
        batch=batch,
        data=data,
        images=IMAGES if images is None else images,
        max_drop=max_drop,
        allow_drop=allow_drop,
        threads=threads if measure else None,
        force=force,
    )
    if not isinstance(trained, FoundArch):
        check_arguments(trained=trained)
    folder = trained.folder if isinstance(trained, FoundArch) else Path(trained)
    if folder.name == SUBNET_FOLDER and (folder.parent / ARCH_FILE).is_file():
        folder = folder.parent  # the run that the network was trained in
    return export_trained(folder, None if out is None else Path(out), request)
