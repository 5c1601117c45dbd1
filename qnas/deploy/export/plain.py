"""Blocks of a stand-alone model: plain torch modules with the submodules of those in `qnas.nn.blocks`.

Only the convolutions of a QuadraBlock's mixer are in a module of their own, `mixer`.

`export.standalone` copies the sources of the classes that a network needs into the file that it writes,
so each class must be clear without the others.
"""

from torch import Tensor, nn

from qnas.nn.blocks import ChannelLayerNorm, LayerScale


class Residual(nn.Sequential):
    """Layers one after another, with the input added at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return x + y


class Mixer(nn.Module):
    """The depthwise convolutions of a neuron, by name with whether they have a bias, and its formula."""

    def __init__(self, formula, channels: int, kernel: int, **biases: bool) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.formula = formula
        for name, bias in biases.items():
            pad = kernel // 2
            conv = nn.Conv2d(channels, channels, kernel, padding=pad, groups=channels, bias=bias)
            self.add_module(name, conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.formula(x, *self.children())
        return y


class QuadraBlock(nn.Module):
    """A depthwise mixer, then a pointwise expansion (QuadraNet, arXiv 2311.17956)."""

    def __init__(
        self, channels: int, expansion: int, mixer: nn.Module, act: nn.Module, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels, eps=eps)
        self.mixer = mixer
        self.norm2 = ChannelLayerNorm(channels, eps=eps)
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
        self,
        channels: int,
        expansion: int,
        mixer: nn.Module,
        clip: nn.Module,
        act: nn.Module,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.BatchNorm2d(channels, eps=eps)
        self.clip = clip
        self.expand = nn.Conv2d(channels, expansion * channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(expansion * channels, eps=eps)
        self.act = act
        self.project = nn.Conv2d(expansion * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.clip(self.norm1(self.mixer(x)))
        y: Tensor = x + self.project(self.act(self.norm2(self.expand(x))))
        return y


class QuadraBlockScaled(nn.Module):
    """A QuadraBlock without norms: each half ends with a learned scale, and a clip bounds what multiplies."""

    def __init__(
        self, channels: int, expansion: int, mixer: nn.Module, clip: nn.Module, act: nn.Module
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.scale1 = LayerScale(channels)
        self.clip = clip
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.act = act
        self.project = nn.Conv2d(expansion * channels, channels, 1)
        self.scale2 = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.clip(self.scale1(self.mixer(x)))
        y: Tensor = x + self.scale2(self.project(self.act(self.expand(x))))
        return y
