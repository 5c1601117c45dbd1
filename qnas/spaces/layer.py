"""One layer of a network as a value: its operator and shape, and its cost in MACs and parameters.

Maps are square, and sizes are for one image. One multiply-add is one MAC, counted for convolutions and linear
layers only, as the papers and torch's own counter do; elementwise operators have a latency but no MACs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LayerSpec:
    """An operator with its shape; `role` names it inside its block.

    `resolution_px` is the height and width of the input. With an odd kernel, padding gives the output
    resolution / stride pixels, rounded up. A kernel equal to its stride (a patch) has none: rounded down.
    """

    role: str
    op: str
    resolution_px: int
    c_in: int
    c_out: int
    kernel: int = 1
    stride: int = 1
    bias: bool = False
    same: bool = False  # a convolution padded as TensorFlow's SAME, not by half its kernel on each side
    eps: float | None = None  # of a norm; None: that of `qnas.nn.blocks`

    def __post_init__(self) -> None:
        assert self.op in OPS, self.op
        assert min(self.resolution_px, self.c_in, self.c_out, self.kernel, self.stride) >= 1, self
        assert self.kernel % 2 == 1 or self.kernel == self.stride, self
        assert self.padding or not self.same, self
        assert OPS[self.op].changes_channels or self.c_in == self.c_out, self

    @property
    def padding(self) -> int:
        """Zeros added on each side where that is the same, or half the kernel."""
        return 0 if self.kernel == self.stride else self.kernel // 2

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros added before (left, top) and after (right, bottom) the map."""
        if self.same:
            return same_pads(self.resolution_px, self.kernel, self.stride)
        return self.padding, self.padding

    @property
    def out_px(self) -> int:
        """Height and width of the output."""
        if self.op in ("gap", "linear"):
            return 1
        return (self.resolution_px + sum(self.pads) - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.out_px**2 * OPS[self.op].weights(self)

    @property
    def params(self) -> int:
        """Trained parameters, biases included."""
        op = OPS[self.op]
        weights = op.weights(self)
        return weights + self.c_out * (self.bias if weights else 2 * op.scales_and_shifts + op.scales)


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after a map by TensorFlow's SAME.

    The output has ceil(size / stride) pixels. The larger half comes after. At stride 1 with an odd kernel,
    both are half the kernel.

    >>> same_pads(224, 3, 2), same_pads(225, 3, 2), same_pads(112, 5, 2)
    ((0, 1), (1, 1), (1, 2))
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Op(NamedTuple):
    """The cost of an operator: each weight is used once per output pixel."""

    weights: Callable[[LayerSpec], int] = lambda s: 0
    changes_channels: bool = False
    scales_and_shifts: bool = False  # by two parameters per channel
    scales: bool = False  # by one parameter per channel


OPS: dict[str, Op] = {
    "conv": Op(lambda s: s.kernel**2 * s.c_in * s.c_out, changes_channels=True),
    "dwconv": Op(lambda s: s.kernel**2 * s.c_out),
    "linear": Op(lambda s: s.c_in * s.c_out, changes_channels=True),
    "layernorm": Op(scales_and_shifts=True),
    "batchnorm": Op(scales_and_shifts=True),
    "layerscale": Op(scales=True),  # of each channel of a map by a learned number
    "gelu": Op(),
    "relu": Op(),
    "relu6": Op(),
    "hswish": Op(),
    "hsigmoid": Op(),
    "clip": Op(),  # to nn.blocks.CLIP_RANGE
    "mul": Op(),
    "scale": Op(),  # of each channel of a map by a number, which the layers before it compute
    "square": Op(),
    "add": Op(),
    "gap": Op(),
}

NORMS = ("layernorm", "batchnorm")
LAYERSCALE = "layerscale"  # in place of a norm
ACTIVATIONS = ("gelu", "hswish", "relu", "relu6")
