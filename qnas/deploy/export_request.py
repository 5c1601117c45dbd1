"""The request of an export, and the trained network that it is for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnas.common.errors import UsageError
from qnas.data.given import GivenData
from qnas.deploy.export.product import FilePrecision
from qnas.runs.found_arch import FoundArch

IMAGES = 512  # of the test images that files are checked with


@dataclass(frozen=True)
class ExportRequest:
    """The formats to write, the images to check them with, and the threads to time them with."""

    formats: Sequence[str] = ("onnx",)
    precision: str = "fp32"
    resolution_px: int | None = None  # None: that of training
    batch: int | None = None  # None: a free one
    data: GivenData | None = None  # None: what was trained on
    images: int = IMAGES
    max_drop: float | None = None  # of the accuracy; None: that of the precision
    threads: int | None = None  # to time the files with; None: they are not timed
    force: bool = False

    def __post_init__(self) -> None:
        if not self.formats:
            raise UsageError("`formats`: expected at least one")
        if self.threads is not None and self.batch not in (None, 1):
            raise UsageError(f"`measure=True` times one image: leave out `batch={self.batch}`")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise UsageError(f"`max_drop={self.max_drop}`: expected a share of the images, 0 to 1")


@dataclass(frozen=True)
class ExportJob:
    """A checked request with the trained network that it is for."""

    request: ExportRequest
    precision: FilePrecision
    trained: Path  # the folder that train-subnet wrote
    found: FoundArch
    result: Mapping[str, Any]  # its result.json
    resolution_px: int
    out: Path
