"""One layer of a network as a value: its operator and shape, and what it costs in MACs and memory.

Maps are square. One multiply-add is one MAC, counted for convolutions and linear layers only (the
convention of the papers and of torch's own counter); elementwise operators count no MACs but have a
latency. Sizes are for one image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LayerSpec:
    """An operator at a place: `role` names it inside its block.

    `resolution_px` is the height and width of the input. A convolution with an odd kernel is padded so
    that the output has resolution / stride pixels, rounded up; a kernel as large as its stride (a patch)
    is not padded, and the output is rounded down.
    """

    role: str
    op: str
    resolution_px: int
    c_in: int
    c_out: int
    kernel: int = 1
    stride: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        assert self.op in OPS, self.op
        assert min(self.resolution_px, self.c_in, self.c_out, self.kernel, self.stride) >= 1, self
        assert self.kernel % 2 == 1 or self.kernel == self.stride, self
        assert OPS[self.op].changes_channels or self.c_in == self.c_out, self

    @property
    def padding(self) -> int:
        """Zeros added on each side."""
        return 0 if self.kernel == self.stride else self.kernel // 2

    @property
    def out_px(self) -> int:
        """Height and width of the output."""
        if self.op in ("gap", "linear"):
            return 1
        return (self.resolution_px + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return OPS[self.op].macs(self)

    @property
    def params(self) -> int:
        """Trained parameters, biases included."""
        return OPS[self.op].params(self)

    @property
    def elements_in(self) -> int:
        """Activations read for one image (both operands of a two-operand operator)."""
        return OPS[self.op].operands * self.resolution_px**2 * self.c_in

    @property
    def elements_out(self) -> int:
        """Activations written for one image."""
        return self.out_px**2 * self.c_out


class Op(NamedTuple):
    """What an operator costs, as functions of its layer."""

    macs: Callable[[LayerSpec], int]
    params: Callable[[LayerSpec], int]
    operands: int = 1
    changes_channels: bool = False


def _conv_macs(s: LayerSpec) -> int:
    return s.out_px**2 * s.kernel**2 * s.c_in * s.c_out


def _conv_params(s: LayerSpec) -> int:
    return s.kernel**2 * s.c_in * s.c_out + s.bias * s.c_out


def _dwconv_macs(s: LayerSpec) -> int:
    return s.out_px**2 * s.kernel**2 * s.c_out


def _dwconv_params(s: LayerSpec) -> int:
    return s.kernel**2 * s.c_out + s.bias * s.c_out


def _none(_: LayerSpec) -> int:
    return 0


def _scale_and_shift(s: LayerSpec) -> int:
    return 2 * s.c_out


OPS: dict[str, Op] = {
    "conv": Op(_conv_macs, _conv_params, changes_channels=True),
    "dwconv": Op(_dwconv_macs, _dwconv_params),
    "linear": Op(_conv_macs, _conv_params, changes_channels=True),
    "layernorm": Op(_none, _scale_and_shift),
    "batchnorm": Op(_none, _scale_and_shift),
    "gelu": Op(_none, _none),
    "relu": Op(_none, _none),
    "relu6": Op(_none, _none),
    "hswish": Op(_none, _none),
    "clip": Op(_none, _none),  # to blocks.CLIP_RANGE
    "mul": Op(_none, _none, operands=2),
    "square": Op(_none, _none),
    "add": Op(_none, _none, operands=2),
    "gap": Op(_none, _none),
}
