"""A trained network lowered for a target: one description, and the form that each target runs.

The same network is written differently for different runtimes: a layer norm as one operator between two
changes of layout, or as arithmetic on the channels of a map; a GELU as one operator, or by erf. A target's
`Forms` say which. The lowered network computes the same, and consists of torch's own modules and operators.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnas.deploy.export import plain
from qnas.deploy.export.folding import fold_affine, fold_norms
from qnas.nn.blocks import ChannelLayerNorm, GlobalAveragePool, QuadraBlock
from qnas.spaces.neurons import NEURONS

NormForm = Literal["operator", "arithmetic", "convolution", "convolutions"]
BatchNormForm = Literal["operator", "scale"]
ActivationForm = Literal["operator", "arithmetic"]
PoolForm = Literal["first", "last"]
DepthwiseForm = Literal["whole", "split"]

LARGEST_DEPTHWISE = 5  # kernel that XNNPACK, the runtime of TFLite files on processors, has code for


@dataclass(frozen=True)
class Forms:
    """How a target has the operators that not every runtime runs.

    layer_norm: `operator` is LayerNormalization over the last axis, between two transpositions; `arithmetic`
    is over the channel axis of a map as it lies, with its scale and shift folded into the convolution behind
    it where that is exact. `convolution` is the same with the mean of the squares as a convolution to one
    channel, `convolutions` with both means so. gelu, hard_swish (and a hard sigmoid): `operator`, or sums and
    products with erf or a clip. pool: the mean of a map with its channels first, or last. batch_norm (where
    it does not fold): `operator`, or one product and one sum (a `scale`). depthwise: convolutions of 7x7 and
    9x9 as one operator (`whole`), or as a sum of four smaller ones (`split`).
    """

    layer_norm: NormForm = "operator"
    gelu: ActivationForm = "operator"
    hard_swish: ActivationForm = "operator"
    pool: PoolForm = "first"
    batch_norm: BatchNormForm = "operator"
    depthwise: DepthwiseForm = "whole"


OPERATORS = Forms()
ARITHMETIC = Forms("arithmetic", "arithmetic", "arithmetic")
CHANNELS_LAST = Forms("convolution", pool="last", batch_norm="scale", depthwise="split")  # of TFLite
MYRIAD = Forms("convolutions", "arithmetic", "arithmetic")


def lowered(network: nn.Module, forms: Forms = OPERATORS, *, fold: bool = True) -> nn.Module:
    """Return a copy in contiguous memory, with folded norms, in a target's forms; in evaluation mode.

    The given network is not changed. Norms are folded in the precision of its weights, with `fold`.
    """
    # contiguous weights: an exporter would write a transposition for each channels_last one
    lower = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    if fold:
        fold_norms(lower)
    if fold and forms.layer_norm != "operator":
        fold_affine(lower)
    return _replace(lower, lambda module: _form(module, forms))


def _replace(module: nn.Module, form: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a module in another form, with the modules in it."""
    for name, child in module.named_children():
        setattr(module, name, _replace(child, form))
    return form(module)


def _form(module: nn.Module, forms: Forms) -> nn.Module:
    if isinstance(module, QuadraBlock):
        return _plain_block(module)
    if isinstance(module, ChannelLayerNorm) and forms.layer_norm != "operator":
        return _NORMS[forms.layer_norm](module)
    if isinstance(module, nn.BatchNorm2d) and forms.batch_norm == "scale":
        return module if module.running_mean is None else ScaleNorm(module)
    if isinstance(module, GlobalAveragePool) and forms.pool == "last":
        return LastAxisPool()
    if isinstance(module, nn.Conv2d) and forms.depthwise == "split":
        return SplitDepthwise(module) if SplitDepthwise.can_split(module) else module
    if isinstance(module, nn.GELU) and module.approximate == "none" and forms.gelu == "arithmetic":
        return ErfGelu()
    if isinstance(module, nn.Hardswish) and forms.hard_swish == "arithmetic":
        return ClipHardSwish()
    if isinstance(module, nn.Hardsigmoid) and forms.hard_swish == "arithmetic":
        return ClipHardSigmoid()
    return module


class _Mixer(nn.Module):
    """The formula of a neuron over the convolutions of a block, under their own names."""

    def __init__(self, block: QuadraBlock) -> None:
        super().__init__()
        self.formula = NEURONS[block.neuron].formula
        for role, convolution in zip(block.roles, block.convolutions, strict=True):
            self.add_module(role, convolution)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.formula(x, *self.children())
        return y


def _plain_block(block: QuadraBlock) -> nn.Module:
    """Return a block without qnas's own operators, around the same modules."""
    channels, expansion = block.project.out_channels, block.expand.out_channels // block.expand.in_channels
    written: nn.Module
    with torch.device("meta"):  # its own layers give way to the block's
        clip = block.clip if block.has_clip else nn.Identity()
        if block.is_pre_norm:
            written = plain.QuadraBlock(channels, expansion, _Mixer(block), block.act)
        elif block.is_scaled:
            written = plain.QuadraBlockScaled(channels, expansion, _Mixer(block), clip, block.act)
        else:
            written = plain.QuadraBlockBN(channels, expansion, _Mixer(block), clip, block.act)
    before = ("scale1", "scale2") if block.is_scaled else ("norm1", "norm2")
    for name in (*before, "expand", "project"):
        setattr(written, name, getattr(block, name))
    return written.train(block.training)


class ArithmeticLayerNorm(nn.Module):
    """Layer normalisation over the channel axis, in operators that every runtime has.

    `(mean(d * d) + eps) ^ -0.5`: with a square, a root and a division instead, OpenVINO recognises the norm
    and writes an operator that the Myriad plugin refuses.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C), of the same shape."""
        d = x - self.mean(x)
        y = d * self.inverse(d * d)
        if self.weight is None:
            return y
        channels = (1, -1, *(1,) * (x.ndim - 2))
        return y * self.weight.view(channels) + self.bias.view(channels)

    def mean(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, 1, ...)."""
        return x.mean(1, keepdim=True)

    def inverse(self, squares: Tensor) -> Tensor:
        """(B, C, ...) -> (B, 1, ...): one over the standard deviation, from the squared deviations."""
        return (self.mean(squares) + self.eps).pow(-0.5)


class ConvolutionLayerNorm(ArithmeticLayerNorm):
    """The same, with the mean of the squares as a convolution to one channel, whose bias is epsilon.

    Six operators in TFLite instead of eight: its converter gives a mean with a sum behind it no channel axis
    (so that a RESHAPE has to follow), and every runtime fuses a bias.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm)
        channels = norm.normalized_shape[0]
        self.share = nn.Parameter(torch.full((1, channels, 1, 1), 1 / channels))
        self.shift = nn.Parameter(torch.full((1,), norm.eps))

    def inverse(self, squares: Tensor) -> Tensor:
        """(B, C, ...) -> (B, 1, ...): one over the standard deviation, from the squared deviations."""
        if squares.ndim == 2:  # of pooled features
            return torch.rsqrt(squares.mean(1, keepdim=True) + self.eps)
        return torch.rsqrt(F.conv2d(squares, self.share, self.shift))


class MyriadLayerNorm(ArithmeticLayerNorm):
    """The same, with both means over the channels of a map as a convolution with equal weights.

    The compiler for the Myriad X turns a mean over channels into a pooling of a map of one channel: it runs
    in software, and for maps of 56 px it is not compiled ("unable to satisfy requirements for stage ... with
    type AvgPool"). A convolution runs in hardware at all sizes.
    """

    share: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm)
        (channels,) = norm.normalized_shape
        self.register_buffer("share", torch.full((1, channels, 1, 1), 1 / channels), persistent=False)

    def mean(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C) -> (B, 1, ...)."""
        return F.conv2d(x, self.share) if x.ndim == 4 else super().mean(x)


_NORMS: dict[str, Callable[[nn.LayerNorm], nn.Module]] = {
    "arithmetic": ArithmeticLayerNorm,
    "convolution": ConvolutionLayerNorm,
    "convolutions": MyriadLayerNorm,
}


class ScaleNorm(nn.Module):
    """A batch normalisation by its running statistics, as one product and one sum for each channel.

    TFLite has no operator for it: its converter writes the formula's four steps, each a pass over the map.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + norm.eps)
        shift = -mean * scale
        if norm.affine:
            scale, shift = norm.weight.detach() * scale, norm.weight.detach() * shift + norm.bias.detach()
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", shift.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), of the same shape."""
        return x * self.scale + self.shift


class SplitDepthwise(nn.Module):
    """A depthwise convolution of 7x7 or 9x9 as the sum of four, of at most 5x5 each, with gaps (dilation 2).

    The four have the taps of even and of odd rows and columns. As the kernel's size is odd, each of them is
    centred where the whole kernel is, so that no map has to be shifted or padded by an operator of its own.

    XNNPACK has code for at most 25 taps. Larger kernels go to TFLite's own loops, with which blocks take 4 to
    6 times as long as with these four (benchmarks/depthwise_forms.py).
    """

    def __init__(self, whole: nn.Conv2d) -> None:
        super().__init__()
        for row in (0, 1):
            for column in (0, 1):
                self.add_module(f"taps_{row}{column}", self._part(whole, row, column))

    @staticmethod
    def can_split(module: nn.Conv2d) -> bool:
        """Whether a convolution is depthwise, too large for XNNPACK, and not when it is split."""
        height, width = module.kernel_size
        return (
            module.groups == module.in_channels == module.out_channels
            and height == width
            and height % 2 == 1
            and LARGEST_DEPTHWISE < height <= 2 * LARGEST_DEPTHWISE
            and module.padding == (height // 2, height // 2)
            and module.dilation == (1, 1)
        )

    @staticmethod
    def _part(whole: nn.Conv2d, row: int, column: int) -> nn.Conv2d:
        taps = whole.weight.detach()[:, :, row::2, column::2].contiguous()
        is_first = row == column == 0
        height, width = taps.shape[2:]
        part = nn.Conv2d(
            whole.in_channels,
            whole.out_channels,
            (height, width),
            stride=cast(tuple[int, int], whole.stride),
            padding=(height - 1, width - 1),
            dilation=2,
            groups=whole.groups,
            bias=is_first and whole.bias is not None,
            device="meta",
        )
        part.weight = nn.Parameter(taps)
        if part.bias is not None:
            assert whole.bias is not None
            part.bias = nn.Parameter(whole.bias.detach().clone())
        return part

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/stride, W/stride)."""
        first, *rest = self.children()
        y: Tensor = first(x)
        for part in rest:
            y = y + part(x)
        return y


class LastAxisPool(nn.Module):
    """The mean over the positions of a map, as runtimes with the channels last have it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return x.permute(0, 2, 3, 1).mean((1, 2))


class ErfGelu(nn.Module):
    """The exact GELU by the error function."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return x * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))


class ClipHardSwish(nn.Module):
    """The hard swish by a clip: x * clip(x + 3, 0, 6) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return x * (torch.clamp(x + 3, 0, 6) * (1 / 6))


class ClipHardSigmoid(nn.Module):
    """The hard sigmoid by a clip: clip(x + 3, 0, 6) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return torch.clamp(x + 3, 0, 6) * (1 / 6)
