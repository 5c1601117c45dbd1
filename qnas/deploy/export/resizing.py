"""The accuracy of a network at another resolution than the one that it was trained at.

The network itself serves every resolution, so a file of any can be written; whether it still classifies is
seen on images only. Of a network that was trained at 32 px, one image in ten may be right at 224 px.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qnas.common.errors import ExportError
from qnas.common.intervals import LEVEL, paired_drop
from qnas.data.decoding import chunked
from qnas.deploy.export.product import RealImages

_BATCH = 32  # images at once


@dataclass(frozen=True)
class Resizing:
    """The accuracy of a network at a resolution and at the trained one, on the same images, 0 to 1."""

    resolution_px: int
    trained_px: int
    images: int
    accuracy: float
    trained_accuracy: float
    least_drop: float  # the lower end of the drop's interval; below 0 for a gain
    most_drop: float

    def facts(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return asdict(self)

    def check(self, drop: float) -> None:
        """Raise ExportError where the accuracy surely drops by more than `drop`, a share of the images."""
        if self.least_drop > drop:
            raise ExportError(
                f"not written: at {self.resolution_px} px {self.accuracy:.1%} of {self.images} images are "
                f"right, at {self.trained_px} px, as trained, {self.trained_accuracy:.1%}; expected at most "
                f"{drop:.1%} fewer: train with `resolution_px={self.resolution_px}`, or `allow_drop=True` "
                "writes it nevertheless"
            )

    def describe(self) -> str:
        """Say in words how the accuracy at the resolution compares with that at the trained one."""
        least, most = (f"{100 * end:.1f}" for end in (self.least_drop, self.most_drop))
        return (
            f"trained at {self.trained_px} px: {self.trained_accuracy:.2%} there, {self.accuracy:.2%} at "
            f"{self.resolution_px} px on the same {self.images} images, a drop of {least} to "
            f"{most} points ({LEVEL:.0%} interval)"
        )


def compare_sizes(network: nn.Module, resized: RealImages, trained: RealImages) -> Resizing:
    """Classify the same images at another resolution and at the trained one."""
    assert len(resized) == len(trained) > 0, (len(resized), len(trained))
    at_other, at_trained = (_right(network, images) for images in (resized, trained))
    lost, won = int((at_trained & ~at_other).sum()), int((at_other & ~at_trained).sum())
    count = len(trained)
    return Resizing(
        resized.pixels.shape[-1],
        trained.pixels.shape[-1],
        count,
        int(at_other.sum()) / count,
        int(at_trained.sum()) / count,
        *paired_drop(lost, won, count),
    )


@torch.no_grad()
def _right(network: nn.Module, images: RealImages) -> Tensor:
    """Return whether each image is classified correctly, (n,) bool."""
    predicted = [network(images.take(part)).argmax(1) for part in chunked(len(images), _BATCH)]
    return torch.cat(predicted) == images.labels
