"""Blocks of a stand-alone model: modules of torch alone, with the submodules that `qnas.nn.blocks` has.

But that the convolutions of a QuadraBlock's mixer stand in a module of their own, `mixer`, which is what
its neuron is.

`export.standalone` copies the sources of these classes into the file that it writes, those that the
network needs, so each says all that its reader needs.
"""

from torch import Tensor, nn

from qnas.nn.blocks import ChannelLayerNorm


class Residual(nn.Sequential):
    """Layers one after another, with the input added at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return x + y


class QuadraNetNeuron(nn.Module):
    """A quadratic depthwise convolution: (W_a * x) . (W_b * x) + W_c * x (arXiv 2311.17956)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_a = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_b = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_c = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_a(x) * self.conv_b(x) + self.conv_c(x)
        return y


class LinearNeuron(nn.Module):
    """A depthwise convolution: W_c * x, with a constant where no batch norm follows."""

    def __init__(self, channels: int, kernel: int, constant: bool) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_c = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=constant)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_c(x)
        return y


class Type2Neuron(nn.Module):
    """A depthwise convolution of the square: W_s * x^2."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_s = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_s(x * x)
        return y


class Type3Neuron(nn.Module):
    """The square of a depthwise convolution: (W_a * x)^2."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_a = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_a(x)
        return y * y


class Type4Neuron(nn.Module):
    """The product of two depthwise convolutions: (W_a * x) . (W_b * x)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_a = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)
        self.conv_b = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_a(x) * self.conv_b(x)
        return y


class FanNeuron(nn.Module):
    """Fan's neuron: (W_a * x + b_a) . (W_b * x + b_b) + W_s * x^2 + c (arXiv 1704.08362).

    Without the constant c where a batch norm follows.
    """

    def __init__(self, channels: int, kernel: int, constant: bool) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_a = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels)
        self.conv_b = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels)
        self.conv_s = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=constant)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_a(x) * self.conv_b(x) + self.conv_s(x * x)
        return y


class CompactNeuron(nn.Module):
    """The compact quadratic neuron: W_c * x + W_s * x^2 + b (arXiv 2110.06081).

    Without the constant b where a batch norm follows.
    """

    def __init__(self, channels: int, kernel: int, constant: bool) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv_c = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=constant)
        self.conv_s = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.conv_c(x) + self.conv_s(x * x)
        return y


class QuadraBlock(nn.Module):
    """A depthwise mixer, then a pointwise expansion (QuadraNet, arXiv 2311.17956)."""

    def __init__(self, channels: int, expansion: int, mixer: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels, eps=1e-6)
        self.mixer = mixer
        self.norm2 = ChannelLayerNorm(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.act = act
        self.project = nn.Conv2d(expansion * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.mixer(self.norm1(x))
        y: Tensor = x + self.project(self.act(self.expand(self.norm2(x))))
        return y


class QuadraBlockBN(nn.Module):
    """A QuadraBlock with batch norms; a clip bounds what a mixer that multiplies may add."""

    def __init__(
        self, channels: int, expansion: int, mixer: nn.Module, clip: nn.Module, act: nn.Module
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.BatchNorm2d(channels)
        self.clip = clip
        self.expand = nn.Conv2d(channels, expansion * channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(expansion * channels)
        self.act = act
        self.project = nn.Conv2d(expansion * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.clip(self.norm1(self.mixer(x)))
        y: Tensor = x + self.project(self.act(self.norm2(self.expand(x))))
        return y
