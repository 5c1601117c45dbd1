"""Convolutions padded as TensorFlow's SAME, for networks whose weights were trained so.

With a stride, SAME puts the larger half of the zeros to the right and to the bottom, so the kernel's centre
stands on the odd pixels of a map of even size; half the kernel on each side puts it on the even ones. Weights
of the one compute something else with the other. The zeros depend on the map's size, as
`qnas.spaces.layer.same_pads` states. The stand-alone export copies this class.
"""

from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: (B, C, H, W) -> (B, C_out, ceil(H / s), ceil(W / s))."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pad x by as much as its size needs, and convolve."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):  # int: under torch.jit.trace a size is a tensor
            total = max((-(-int(size) // stride) - 1) * stride + kernel - int(size), 0)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, pads) if any(pads) else x)
