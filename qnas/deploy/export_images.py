"""The images that exported files are checked and calibrated with."""

import torch

from qnas.common.errors import CheckpointError, DataError
from qnas.data.given import reopen
from qnas.data.image_data import ImageData, Split, sample_images
from qnas.data.loading import load_data
from qnas.deploy.export.product import RealImages
from qnas.deploy.export_request import ExportJob
from qnas.runs.names import SAMPLE_FILE
from qnas.runs.tensors import load_tensors

CALIBRATION_IMAGES = 256  # of the training images, for int8


def checking_images(job: ExportJob) -> tuple[RealImages, RealImages | None]:
    """Return the test images to check files with, and for int8 the training images to calibrate it with.

    Where the data of the training are missing, the check uses the few test images that the training kept.
    """
    request, result = job.request, job.result
    try:
        data = _load(job)
    except DataError as error:
        if job.precision == "int8" or request.data is not None:
            fix = "" if request.data else ": `data` says where its calibration images are"
            raise DataError(f"{error}{fix}") from error
        return _kept_images(job).at(job.resolution_px), None

    def some(split: Split, n: int, what: str) -> RealImages:
        pixels, labels = sample_images(split, n)
        which = f"all {len(split)}" if len(labels) == len(split) else f"{len(labels)} of the {len(split)}"
        source = f"{which} {what} images of {data.name}"
        return RealImages(pixels, labels, tuple(result["mean"]), tuple(result["std"]), source)

    calibration = None
    if job.precision == "int8":
        calibration = some(data.train_and_heldout, CALIBRATION_IMAGES, "training")
    return some(data.test, request.images, "test"), calibration


def _load(job: ExportJob) -> ImageData:
    data = load_data(
        reopen(job.request.data, job.result),
        resolution_px=job.resolution_px,
        channels=job.found.space.input.channels,
        memory_limit_bytes=0,  # so that only the images that are used are decoded
        max_broken=None,  # those among them are left out
        quiet=True,
    )
    if list(data.classes) != list(job.result["classes"]):
        of_data, of_network = (
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"
            for names in (list(data.classes), list(job.result["classes"]))
        )
        raise DataError(f"data {data.name}: the classes are {of_data}, the network's {of_network}")
    return data


def _kept_images(job: ExportJob) -> RealImages:
    path = job.trained / SAMPLE_FILE
    kept = load_tensors(path)
    images, labels = kept.get("images"), kept.get("labels")
    if images is None or labels is None or images.dtype != torch.uint8 or images.ndim != 4:
        raise CheckpointError(f"{path}: expected uint8 images (n, C, H, W) with labels")
    source = f"the {len(labels)} test images that the training kept"
    return RealImages(images, labels, tuple(job.result["mean"]), tuple(job.result["std"]), source)
