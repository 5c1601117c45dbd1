"""Blocks whose layers do not run one after another: products of two branches, and channels that are scaled.

Each is a Sequential of its layers, named after their roles, with a forward of its own. The stand-alone export
copies the sources of the classes, so each must be clear without the rest of qnas.
"""

from collections import OrderedDict

from torch import Tensor, nn


class StarBlock(nn.Sequential):
    """The block of StarNet (Rewrite the Stars, arXiv 2403.19967): a product of two pointwise convolutions."""

    is_residual = True
    depthwise1: nn.Module
    norm1: nn.Module
    factor1: nn.Module
    act: nn.Module
    factor2: nn.Module
    project: nn.Module
    norm2: nn.Module
    clip: nn.Module  # where no ReLU6 bounds a factor
    depthwise2: nn.Module  # absent with a single mixer

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.norm1(self.depthwise1(x))
        y = self.act(self.factor1(y)) * self.factor2(y)  # (B, expansion * C, H, W)
        y = self.norm2(self.project(y))
        if "clip" in self._modules:
            y = self.clip(y)
        if "depthwise2" in self._modules:
            y = self.depthwise2(y)
        out: Tensor = x + y
        return out


class MBConvBlock(nn.Sequential):
    """An inverted residual with a product of two depthwise convolutions, squeeze-and-excitation, or both."""

    expand: nn.Module  # these three with an expansion above 1
    norm1: nn.Module
    act1: nn.Module
    depthwise: nn.Module  # these two with a linear neuron
    norm2: nn.Module
    conv_a: nn.Module  # these four with a factored one
    norm_a: nn.Module
    conv_b: nn.Module
    norm_b: nn.Module
    act2: nn.Module
    pool: nn.Module  # these five with squeeze-and-excitation
    squeeze: nn.Module
    squeeze_act: nn.Module
    excite: nn.Module
    gate: nn.Module
    project: nn.Module
    norm3: nn.Module
    clip: nn.Module  # of a factored neuron without ReLU6

    def __init__(self, layers: OrderedDict[str, nn.Module], is_residual: bool) -> None:
        super().__init__(layers)
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""
        y = x
        if "expand" in self._modules:
            y = self.act1(self.norm1(self.expand(y)))
        if "depthwise" in self._modules:
            y = self.norm2(self.depthwise(y))
        else:
            y = self.norm_a(self.conv_a(y)) * self.norm_b(self.conv_b(y))
        y = self.act2(y)
        if "squeeze" in self._modules:
            pooled = self.pool(y)[:, :, None, None]  # (B, hidden, 1, 1)
            y = y * self.gate(self.excite(self.squeeze_act(self.squeeze(pooled))))
        y = self.norm3(self.project(y))
        if "clip" in self._modules:
            y = self.clip(y)
        out: Tensor = x + y if self.is_residual else y
        return out
