"""Files for timing: networks of a space with random weights, in a format and precision.

They are what an export would write, but for weights: random and different everywhere, as `assembly` explains.
In int8 every layer is in int8, however much that changes the outputs; ranges are those of random images.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qnas.common.errors import UsageError, nearest
from qnas.common.files import write_bytes
from qnas.common.progress import Progress
from qnas.deploy.export.formats import FORMATS, check_request, file_names
from qnas.deploy.export.product import Product, RealImages, Variant
from qnas.deploy.export.quantisation import quantise
from qnas.latency.device import FilePrecision
from qnas.latency.fitting.measurements import Measured
from qnas.nn.subnet import build_network
from qnas.spaces.arch import Arch
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace

# those whose files another program runs
TIMED_FORMATS = ("onnx", "tflite", "openvino", "vpu", "torch", "executorch")
_JITTER = 0.1  # standard deviation of norms and biases around 1 and 0
_CALIBRATION = 2  # random images


@dataclass(frozen=True)
class FileKind:
    """A format and a precision. Raises UsageError for what is unknown, missing or unsupported."""

    format: str = "onnx"
    precision: FilePrecision = "fp32"

    def __post_init__(self) -> None:
        if self.format not in TIMED_FORMATS:
            raise UsageError(f"`format={self.format!r}`: {nearest(self.format, TIMED_FORMATS)}")
        check_request((self.format,), self.precision)

    def __str__(self) -> str:
        return f"{self.format} {self.precision}"

    @property
    def variant(self) -> Variant:
        """How its files are written."""
        return Variant(self.precision, every_layer=True)

    def files(self, folder: Path, name: str) -> tuple[Path, ...]:
        """Return the paths of a network's files; the first is the one to load."""
        endings = (file.removeprefix("model") for file in file_names(self.format, self.variant))
        return tuple(folder / f"{name}{ending}" for ending in endings)


PLAIN = FileKind()


def write_timed(
    space: SearchSpace, networks: Sequence[Measured], folder: Path, kind: FileKind, seed: int, quiet: bool
) -> None:
    """Write the files of networks of a space, each whole or not at all. Raises ExportError."""
    if kind.format == "onnx" and kind.precision in ("fp32", "int8"):
        _write_assembled(space, networks, folder, kind, seed, quiet)
        return
    with Progress(len(networks), "export", quiet=quiet) as progress:
        for i, network in enumerate(networks):
            product = random_product(space, network.arch, seed + i)
            files = kind.files(folder, network.name)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as stage:
                FORMATS[kind.format].write(product, kind.variant, Path(stage, files[0].name), str(files[0]))
                for file in reversed(files):  # the one to load last
                    Path(stage, file.name).replace(file)
            progress.step(network.name)


def _write_assembled(
    space: SearchSpace, networks: Sequence[Measured], folder: Path, kind: FileKind, seed: int, quiet: bool
) -> None:
    """Write ONNX files from blocks that are exported once each, which is many times faster."""
    from qnas.deploy.assembly import assemble, export_block

    lowered = [lower(space, network.arch) for network in networks]
    distinct = {block.unnamed: block for blocks in lowered for block in blocks if block.layers}
    with Progress(len(distinct) + len(networks), "export", quiet=quiet) as progress:
        graphs = {}
        for key, block in distinct.items():
            graphs[key] = export_block(block)
            progress.step(f"block {block.name}")
        for i, (network, blocks) in enumerate(zip(networks, lowered, strict=True)):
            (path,) = kind.files(folder, network.name)
            model = assemble(blocks, graphs, np.random.default_rng([seed, i]))
            if kind.precision == "int8":
                images = random_images((space.input.channels, *2 * (space.input.resolution_px,)), count=1)
                model = quantise(model, images, kind.variant, str(path)).model
            write_bytes(path, model.SerializeToString())
            progress.step(network.name)


def random_product(space: SearchSpace, arch: Arch, seed: int) -> Product:
    """Return a network with random weights as formats write it, for one image."""
    blocks = lower(space, arch)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = draw_norms(build_network(blocks)).eval()
    channels, px = space.input.channels, space.input.resolution_px
    images = random_images((channels, px, px), count=_CALIBRATION)
    classes = tuple(f"class {i}" for i in range(space.head.classes))
    return Product(
        "network",
        network,
        blocks,
        classes,
        images.mean,
        images.std,
        channels,
        px,
        metadata={},
        batch=1,
        calibration=images,
    )


def random_images(shape: tuple[int, int, int], *, count: int) -> RealImages:
    """Return random images (count, C, H, W) without meaning, to calibrate int8 with."""
    pixels = torch.randint(
        256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    channels = shape[0]
    uniform_std = 1 / math.sqrt(12)
    labels = torch.zeros(count, dtype=torch.long)
    return RealImages(pixels, labels, (0.5,) * channels, (uniform_std,) * channels, "random images")


def draw_norms(module: nn.Module) -> nn.Module:
    """Add noise to norms and biases, in place, so that none is exactly one or zero."""
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.ndim == 1):
            parameter.add_(_JITTER * torch.randn_like(parameter))
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            assert norm.running_mean is not None
            norm.running_mean.normal_(0.0, _JITTER)
    return module
