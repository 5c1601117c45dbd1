"""The cost of layer normalisation on a Cortex-A76, from measured blocks: no measured network has one.

nn-Meter's branch for hybrid transformers published blocks timed on the same phone with a newer
TFLite: `transffn` (layer normalisation, 1x1 convolution, hard swish, 1x1 convolution, residual) and
`conv` (an inverted residual). One fit separates the normalisation from the rest. The 1x1 convolutions,
which the device's model knows too, give the scale from the newer runtime to that of the model.
"""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fitting.fit import fit_robust, scaled
from qnas.common.errors import TableError
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel

_NORM_FEATURES = ("launch", "kelements_in", "kpixels")
_POINTWISE = ("mmacs", "mmacs_r4_c8", "kweights")


@dataclass(frozen=True)
class Block:
    """A timed block: its convolutions, the elements of its hard swishes and sums, its normalisation."""

    convolutions: tuple[Kernel, ...]
    kactivated: float
    kadded: float
    norm: Kernel | None
    latency_ms: float


def read_blocks(path: Path) -> list[Block]:
    """Read pixel4_blocks.json.gz: its transffn blocks, and conv blocks of stride 1 without SE.

    Raises TableError if the file is missing or broken.
    """
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        blocks = [_parse(key.split("_"), float(ms)) for key, ms in content.items()]
    except FileNotFoundError:
        raise TableError(f"{path}: no such file, expected the measured blocks") from None
    except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise TableError(f"{path}: not a file of measured blocks: {error}") from error
    return [block for block in blocks if block is not None]


def _parse(key: list[str], latency_ms: float) -> Block | None:
    match key:
        case ["transffn", px, channels, expansion, "hard", "swish", "ln"]:
            h, c, e = int(px), int(channels), int(expansion)
            pair = (Kernel("conv1x1", h, c, c * e), Kernel("conv1x1", h, c * e, c))
            norm = Kernel("layernorm", h, c, c)
            return Block(pair, h * h * c * e / 1e3, h * h * c / 1e3, norm, latency_ms)
        case ["conv", px, c_in, c_out, expansion, "1", "hard", "swish", kernel, "nose"]:
            h, a, b, e, k = int(px), int(c_in), int(c_out), int(expansion), int(kernel)
            hidden = a * e
            convolutions = [Kernel("dwconv", h, hidden, hidden, k), Kernel("conv1x1", h, hidden, b)]
            if e > 1:
                convolutions.insert(0, Kernel("conv1x1", h, a, hidden))
            if a != b:  # the shortcut
                convolutions.append(Kernel("conv1x1", h, a, b))
            activated = h * h * hidden * (2 if e > 1 else 1) / 1e3
            return Block(tuple(convolutions), activated, h * h * b / 1e3, None, latency_ms)
    return None


def fit_layernorm(
    blocks: Sequence[Block], kernel_ms: Callable[[Kernel], float], least: Mapping[str, float]
) -> dict[str, float]:
    """Return the terms of layer normalisation, at the runtime of the model behind `kernel_ms`.

    `least` has the lower bounds of terms. Raises TableError unless there are blocks with and without it.
    """
    if not any(block.norm for block in blocks) or all(block.norm for block in blocks):
        raise TableError("expected blocks with layer normalisation (transffn) and without (conv)")
    matrix = np.array([_columns(block) for block in blocks])
    latency = np.array([block.latency_ms for block in blocks])
    lowest = [least.get(name, 0.0) for name in _NORM_FEATURES]
    weights = fit_robust(matrix, latency, np.array([0.0] * (matrix.shape[1] - len(lowest)) + lowest))
    newer = matrix[:, : len(_POINTWISE)] @ weights[: len(_POINTWISE)]
    older = np.array([sum(kernel_ms(k) for k in b.convolutions if k.kind == "conv1x1") for b in blocks])
    scale = float(np.median(older[newer > 0] / newer[newer > 0]))
    terms = dict(zip(_NORM_FEATURES, weights[-len(_NORM_FEATURES) :].tolist(), strict=True))
    return scaled(terms, scale)


def _columns(block: Block) -> list[float]:
    """Return the features of a block's latency, those of the normalisation last."""
    pointwise = [k for k in block.convolutions if k.kind == "conv1x1"]
    depthwise = [k for k in block.convolutions if k.kind == "dwconv"]
    columns = [sum(FEATURES[name](k) for k in pointwise) for name in _POINTWISE]
    columns += [sum(FEATURES["mmacs"](k) for k in depthwise if k.kernel == size) for size in (3, 5)]
    columns += [sum(FEATURES["kelements_out"](k) for k in depthwise), block.kactivated, block.kadded]
    return columns + [FEATURES[name](block.norm) if block.norm else 0.0 for name in _NORM_FEATURES]
