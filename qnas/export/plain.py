"""Blocks of a stand-alone model: modules of torch alone, with the submodules that `qnas.blocks` has.

`qnas.export.standalone` copies the sources of these classes into the file that it writes, those that the
network needs, so each says all that its reader needs.
"""

from torch import Tensor, nn

from qnas.blocks import ChannelLayerNorm


class Residual(nn.Sequential):
    """Layers one after another, with the input added at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return x + y


class QuadraBlock(nn.Module):
    """A quadratic depthwise convolution, then a pointwise expansion (QuadraNet, arXiv 2311.17956)."""

    def __init__(self, channels: int, kernel: int, expansion: int, act: nn.Module) -> None:
        super().__init__()
        pad, hidden = kernel // 2, expansion * channels
        self.norm1 = ChannelLayerNorm(channels, eps=1e-6)
        self.conv_a = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_b = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_c = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.norm2 = ChannelLayerNorm(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.act = act
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        n = self.norm1(x)
        x = x + (self.conv_a(n) * self.conv_b(n) + self.conv_c(n))
        y: Tensor = x + self.project(self.act(self.expand(self.norm2(x))))
        return y


class QuadraBlockBN(nn.Module):
    """A QuadraBlock with norms that fold into convolutions; the clip bounds what a mixer may add."""

    def __init__(self, channels: int, kernel: int, expansion: int, act: nn.Module) -> None:
        super().__init__()
        pad, hidden = kernel // 2, expansion * channels
        self.conv_a = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_b = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_c = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.clip = nn.Hardtanh(-6.0, 6.0)
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = act
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.clip(self.norm1(self.conv_a(x) * self.conv_b(x) + self.conv_c(x)))
        y: Tensor = x + self.project(self.act(self.norm2(self.expand(x))))
        return y
