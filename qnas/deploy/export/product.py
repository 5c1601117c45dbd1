"""A trained network for export, with its classes, preprocessing and metadata."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from qnas.data.normalisation import normalise
from qnas.data.pil_pixels import FULL_BITS
from qnas.deploy.export.lowering import OPERATORS, Forms, lowered
from qnas.latency.device import FilePrecision as FilePrecision  # of files, thus offered here too
from qnas.spaces.lower import BlockSpec

Ranges = Literal["minmax", "percentile", "entropy"]
Run = Callable[[Tensor], Tensor]  # images (B, C, H, W), normalised float32 -> logits (B, classes), float32


@dataclass(frozen=True)
class Variant:
    """How a file is written, where its format leaves a choice."""

    precision: FilePrecision = "fp32"
    opset: int | None = None  # of ONNX; None: the format's own
    ranges: Ranges = "minmax"  # int8: which values of a map the range covers
    symmetric: bool = False  # int8: maps with a zero point of zero, as TensorRT needs
    max_drop: float | None = None  # of the accuracy; None: the precision's default
    every_layer: bool = False  # int8: all layers, whatever the outputs become, in files that are only timed

    @property
    def stem(self) -> str:
        """The name of its files, without suffix: `model`, `model_int8_dynamic`."""
        suffix = "" if self.precision == "fp32" else f"_{self.precision.replace('-', '_')}"
        return f"model{suffix}"


@dataclass(frozen=True, eq=False)
class RealImages:
    """Images of a data set with their labels, at the resolution of a file.

    pixels: (n, C, H, W), uint8; labels: (n,), int64. `source` describes them.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        assert self.pixels.dtype == torch.uint8, self.pixels.dtype
        assert len(self.pixels) == len(self.labels) > 0, self.source

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Sequence[int]) -> Tensor:
        """Return the images at these indices, normalised for a network: (B, C, H, W), float32."""
        return normalise(self.pixels[list(places)], self.mean, self.std).contiguous()

    def at(self, resolution_px: int) -> "RealImages":
        """Return the same images at another resolution."""
        if self.pixels.shape[-1] == resolution_px:
            return self
        pixels = tv.resize(self.pixels, [resolution_px, resolution_px], antialias=True)
        return replace(self, pixels=pixels)


@dataclass(frozen=True, eq=False)
class Product:
    """A trained network as formats write it.

    `network` is on the CPU, in eval mode and float32, its norms as trained; it was built from `blocks`.
    `batch` is None for a free batch size. `metadata` are strings, with lists as JSON; `calibration` are
    the images to calibrate int8 with. `on_gpu` tells whether the phones of its search run it on their GPUs.
    """

    name: str  # of a Python function: quadranet_mobile
    network: nn.Module
    blocks: tuple[BlockSpec, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    resolution_px: int
    metadata: Mapping[str, str]
    batch: int | None = None
    bits: int = FULL_BITS  # significant bits of images of more than 8
    pads: bool = False  # whether slightly smaller images get a black border
    calibration: RealImages | None = None
    on_gpu: bool = False

    def __post_init__(self) -> None:
        assert self.name.isidentifier(), self.name
        assert not self.network.training, "in eval mode"
        assert self.batch is None or self.batch >= 1, self.batch

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.resolution_px, self.resolution_px

    def deployed(self, precision: FilePrecision = "fp32", forms: Forms = OPERATORS) -> nn.Module:
        """Return a copy with folded norms in a target's forms; fp16 computes in half on float32 images.

        Norms are folded in float32: half precision has no room for the products of scales and weights.
        """
        network = lowered(self.network, forms)
        return _Half(network) if precision == "fp16" else network


class _Half(nn.Module):
    """A network in half precision with float32 inputs and outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        logits: Tensor = self.network(images.half())
        return logits.float()
