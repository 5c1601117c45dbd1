"""Blocks of layers as modules. Every submodule is made from its layer and named after its role.

Tensors are (B, C, H, W), in channels_last memory format where that is faster; the networks are
fully convolutional, so a module serves every resolution.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.nn.batch_norm import BatchNorm2d
from qnas.nn.kernels.block import can_run, mixer_half
from qnas.nn.kernels.pointwise import channel_half
from qnas.nn.neurons import NEURONS
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import MIXERS, BlockSpec, Place, quadra_layers
from qnas.spaces.space import DEFAULT_NEURON, Neuron, block_kind


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over channels, at each place of a map or of pooled features."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) or (B, C); the shape stays."""
        if x.ndim == 2:
            return super().forward(x)
        # in channels_last memory both permutations are views
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalAveragePool(nn.Module):
    """The mean over places."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return x.mean((2, 3))


# Taps by which the envelope of freshly drawn depthwise kernels falls to exp(-1/2).
ENVELOPE_TAPS = 0.7


def _convolution(spec: LayerSpec) -> nn.Module:
    return nn.Conv2d(spec.c_in, spec.c_out, spec.kernel, spec.stride, spec.padding, bias=spec.bias)


def _depthwise(spec: LayerSpec) -> nn.Module:
    """Build a depthwise convolution whose kernels are about their centres to begin with.

    Drawn as torch does and weighted by a Gaussian of the distance, the sum of squares kept. Trained kernels
    look like that (arXiv 2210.03651), and a 7x7 kernel starts almost as a 3x3 one instead of as noise from
    49 places (benchmarks/start.py compares starts).
    """
    conv = nn.Conv2d(
        spec.c_in, spec.c_out, spec.kernel, spec.stride, spec.padding, groups=spec.c_in, bias=spec.bias
    )
    with torch.no_grad():
        taps = torch.arange(spec.kernel, device=conv.weight.device) - spec.kernel // 2
        falling = torch.exp(-(taps**2) / (2 * ENVELOPE_TAPS**2))
        envelope = torch.outer(falling, falling)
        conv.weight.mul_(envelope / envelope.square().mean().sqrt())
    return conv


CLIP_RANGE = (-6.0, 6.0)  # what a mixer with batch normalisation may add; `qnas.spaces.lower` says why

# Operators of layer.OPS that are modules; `add`, `mul` and `square` are written out in the blocks' forward.
MODULES: dict[str, Callable[[LayerSpec], nn.Module]] = {
    "conv": _convolution,
    "dwconv": _depthwise,
    "linear": lambda spec: nn.Linear(spec.c_in, spec.c_out, bias=spec.bias),
    "layernorm": lambda spec: ChannelLayerNorm(spec.c_out, eps=1e-6),
    "batchnorm": lambda spec: BatchNorm2d(spec.c_out),
    "gelu": lambda _: nn.GELU(),
    "relu": lambda _: nn.ReLU(),
    "relu6": lambda _: nn.ReLU6(),
    "hswish": lambda _: nn.Hardswish(),
    "clip": lambda _: nn.Hardtanh(*CLIP_RANGE),
    "gap": lambda _: GlobalAveragePool(),
}


class Chain(nn.Sequential):
    """Layers one after another, with the input added at the end where the last layer is an add."""

    def __init__(self, layers: tuple[LayerSpec, ...]) -> None:
        self_adding = layers[-1].op == "add"
        super().__init__()
        for spec in layers[:-1] if self_adding else layers:
            self.add_module(spec.role, MODULES[spec.op](spec))
        self.is_residual = self_adding

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the shape that the last layer says."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return x + y if self.is_residual else y


class QuadraBlock(nn.Module):
    """Depthwise mixer of a neuron and pointwise expansion, each with a residual.

    QuadraNet, arXiv 2311.17956, figure 3, where the neuron is the quadratic one; `qnas.nn.neurons` has the
    others, `qnas.spaces.lower` says where the norms stand, and why batch normalisation needs a clip. While
    training, and wherever gradients are taken, a block with layer normalisation and GELU keeps its input
    and the map between its halves, and computes the rest again in the backward pass (`qnas.nn.kernels`; of
    other neurons the channel half alone); with `recompute` off it keeps the expanded activation too.
    """

    # those of `lower.MIXERS` that the neuron has
    conv_a: nn.Conv2d
    conv_b: nn.Conv2d
    conv_c: nn.Conv2d
    conv_s: nn.Conv2d
    norm1: nn.Module
    norm2: nn.Module
    clip: nn.Module  # behind a product with batch normalisation
    expand: nn.Module
    act: nn.Module
    project: nn.Module

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        expansion: int,
        *,
        norm: str = "layernorm",
        activation: str = "gelu",
        neuron: Neuron = DEFAULT_NEURON,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        place = Place(channels, channels, 1, 1, norm, activation)
        for spec in quadra_layers(place, kernel_size, expansion, neuron):
            if spec.op in MODULES:
                self.add_module(spec.role, MODULES[spec.op](spec))
        self.neuron = neuron
        self.roles = tuple(role for role in MIXERS[neuron] if role.startswith("conv_"))
        self.is_pre_norm = norm == "layernorm"
        self.has_clip = "clip" in self._modules
        self.has_kernels = self.is_pre_norm and activation == "gelu"
        self.recompute = recompute
        _start(self)

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """The mixer's, in the order in which the neuron's function takes them."""
        return tuple(cast(nn.Conv2d, getattr(self, role)) for role in self.roles)

    def mix(self, x: Tensor) -> Tensor:
        """Apply the neuron alone: (B, C, H, W) -> (B, C, H, W)."""
        return NEURONS[self.neuron](x, *((conv.weight, conv.bias) for conv in self.convolutions))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.has_kernels and (self.training or torch.is_grad_enabled()) and can_run(x):
            return self._run_halves(x)
        if self.is_pre_norm:
            x = x + self.mix(self.norm1(x))
            hidden = self.expand(self.norm2(x))
        else:
            mixed = self.norm1(self.mix(x))
            x = x + (self.clip(mixed) if self.has_clip else mixed)
            hidden = self.norm2(self.expand(x))
        y: Tensor = x + self.project(self.act(hidden))
        return y

    def _run_halves(self, x: Tensor) -> Tensor:
        if self.neuron == "quadranet":
            norm1 = cast(nn.LayerNorm, self.norm1)
            depthwise = (conv.weight for conv in self.convolutions)
            x = mixer_half(x, norm1.weight, norm1.bias, *depthwise, eps=norm1.eps)
        else:
            x = x + self.mix(self.norm1(x))
        norm2 = cast(nn.LayerNorm, self.norm2)
        expand, project = cast(nn.Conv2d, self.expand), cast(nn.Conv2d, self.project)
        assert expand.bias is not None
        assert project.bias is not None
        pointwise = (expand.weight, expand.bias, project.weight, project.bias)
        return channel_half(x, norm2.weight, norm2.bias, *pointwise, eps=norm2.eps, recompute=self.recompute)


# Beside torch's own initialisation, whose convolutions have an output with a third of the input's second
# moment: factors by role that give what feeds on squares (a normal x^2 has a second moment of 3), or is a
# product and nothing else, the same third. A product has 1.85 ninths, since both its factors are mostly
# their centre's: QuadraNet's is left at that.
START: dict[Neuron, dict[str, float]] = {
    "type2": {"conv_s": 3**-0.5},
    "type4": {"conv_a": (3 / 1.85) ** 0.25, "conv_b": (3 / 1.85) ** 0.25},
    "fan": {"conv_s": 3**-0.5},
    "compact": {"conv_s": 3**-0.5},
}


@torch.no_grad()
def _start(block: QuadraBlock) -> None:
    """Make the freshly drawn weights of a neuron such as training can start from."""
    for role, factor in START.get(block.neuron, {}).items():
        cast(nn.Conv2d, getattr(block, role)).weight.mul_(factor)
    if block.neuron == "fan":
        # as ReLinear has it: with b_b at 1 the product holds the linear part, about 0 there is none
        assert block.conv_b.bias is not None
        block.conv_b.bias.fill_(1.0)


def _quadra(layers: tuple[LayerSpec, ...], neuron: Neuron) -> nn.Module:
    by_role = {spec.role: spec for spec in layers}
    conv = next(spec for spec in layers if spec.op == "dwconv")
    expand = by_role["expand"]
    return QuadraBlock(
        conv.c_in,
        conv.kernel,
        expand.c_out // expand.c_in,
        norm=by_role["norm1"].op,
        activation=by_role["act"].op,
        neuron=neuron,
    )


# Kinds of block that are not a plain chain of their layers.
BLOCKS: dict[str, Callable[[tuple[LayerSpec, ...]], nn.Module]] = {
    **{block_kind("quadra", neuron): partial(_quadra, neuron=neuron) for neuron in NEURONS},
    "identity": lambda _: nn.Identity(),
}


def build_block(block: BlockSpec) -> nn.Module:
    """Build the module of a block, with freshly drawn weights."""
    # not the N(0, 0.02) of the large networks, which learns more slowly at these widths
    return BLOCKS.get(block.kind, Chain)(block.layers)


def count_parameters(module: nn.Module) -> int:
    """Count the trained parameters of a module."""
    return sum(p.numel() for p in module.parameters())


# What ReLinear (arXiv 2110.06081) starts at zero and lets in slowly: weights by role. W_a of QuadraNet's
# product goes with W_b, as nothing else uses it. Neurons without a linear part have no such start.
_STARTS_AT_ZERO: dict[Neuron, tuple[str, ...]] = {
    "quadranet": ("conv_b",),
    "linear": (),
    "fan": ("conv_b", "conv_s"),
    "compact": ("conv_s",),
}
_LET_IN: dict[Neuron, tuple[str, ...]] = {**_STARTS_AT_ZERO, "quadranet": ("conv_a", "conv_b")}


def quadratic_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the quadratic terms of every mixer, which are zero in a linear network.

    Of QuadraNet's neuron W_a and W_b, of Fan's W_b and W_s, of the compact one W_s. Raises UsageError
    where a mixer has no linear part.
    """
    return [
        cast(nn.Parameter, conv.weight)
        for block in _relinear_blocks(module)
        for conv in _named(block, _LET_IN[block.neuron])
    ]


@torch.no_grad()
def start_linear(module: nn.Module) -> None:
    """Set every quadratic term to zero: the network then computes what it would without them.

    Of a product the second factor alone is zero, as with both no gradient would ever reach either. Fan's
    is then W_b = 0, b_b = 1, W_s = 0, c = 0. Raises UsageError where a mixer has no linear part.
    """
    for block in _relinear_blocks(module):
        for conv in _named(block, _STARTS_AT_ZERO[block.neuron]):
            conv.weight.zero_()
        if block.neuron == "fan":
            assert block.conv_b.bias is not None
            block.conv_b.bias.fill_(1.0)
            if block.conv_s.bias is not None:
                block.conv_s.bias.zero_()


def _relinear_blocks(module: nn.Module) -> list[QuadraBlock]:
    blocks = [block for block in module.modules() if isinstance(block, QuadraBlock)]
    unfit = dict.fromkeys(block.neuron for block in blocks if block.neuron not in _STARTS_AT_ZERO)
    if unfit:
        raise UsageError(
            f"linear start, quadratic gamma, alpha and beta: the network has neurons of {', '.join(unfit)}, "
            f"which have no linear part; expected {', '.join(_STARTS_AT_ZERO)}"
        )
    return blocks


def _named(block: QuadraBlock, roles: tuple[str, ...]) -> list[nn.Conv2d]:
    return [cast(nn.Conv2d, getattr(block, role)) for role in roles]


__all__ = [
    "BLOCKS",
    "MODULES",
    "QuadraBlock",
    "build_block",
    "count_parameters",
    "quadratic_weights",
    "start_linear",
]
