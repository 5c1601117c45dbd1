"""The export of a trained network from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qnas.api.results import SearchResult, TrainedNetwork
from qnas.runs.names import ARCH_FILE, SUBNET_FOLDER

if TYPE_CHECKING:
    from qnas.data.loading import GivenData
    from qnas.deploy.export_run import ExportedFiles


def export(
    trained: TrainedNetwork | SearchResult | str | Path,
    formats: Sequence[str] = ("onnx",),
    *,
    precision: str = "fp32",
    resolution_px: int | None = None,
    batch: int | None = None,
    data: "GivenData | None" = None,
    images: int | None = None,
    max_drop: float | None = None,
    measure: bool = False,
    threads: int = 1,
    out: str | Path | None = None,
    force: bool = False,
) -> "ExportedFiles":
    """Write a trained network as files that run without qnas, each checked against the network.

    `formats` are of "onnx", "openvino", "torch" and "standalone"; `precision` is "fp32", "fp16" or "int8".
    Images are `resolution_px` high and wide (default: as in training), in batches of any size or of `batch`.
    Each file is compared with the network on up to `images` test images of `data` (default: 512 images of
    the training's data); its accuracy may be lower by at most `max_drop`. `measure` times the files on this
    machine. Writes `out`, by default `RUN/export`. Returns the paths of the files, with facts about each.

    Raises CheckpointError if there is no trained network or a file exists already, UsageError for an invalid
    request, ExportError if the outputs of a file differ from the network's; then nothing is written.
    """
    from qnas.deploy.export_run import IMAGES, ExportRequest, export_trained

    request = ExportRequest(
        formats=tuple(formats),
        precision=precision,
        resolution_px=resolution_px,
        batch=batch,
        data=data,
        images=images or IMAGES,
        max_drop=max_drop,
        threads=threads if measure else None,
        force=force,
    )
    folder = trained.folder if isinstance(trained, TrainedNetwork | SearchResult) else Path(trained)
    if folder.name == SUBNET_FOLDER and (folder.parent / ARCH_FILE).is_file():
        folder = folder.parent  # the run that the network was trained in
    return export_trained(folder, None if out is None else Path(out), request)
