"""Modules of the blocks. Each submodule is built from a layer and named after the layer's role.

Tensors are (B, C, H, W), in channels_last memory format where that is faster. The networks are
fully convolutional, so a module serves every resolution.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qnas.common.errors import SpaceError, UsageError
from qnas.nn.depthwise import DepthwiseConv2d
from qnas.nn.inverted_residual import run_fused
from qnas.nn.kernels.block import can_run, mixer_half
from qnas.nn.kernels.pointwise import channel_half
from qnas.nn.neurons import run_neuron
from qnas.nn.padding import SameConv2d
from qnas.nn.wired_blocks import MBConvBlock, StarBlock
from qnas.spaces.blocks import BLOCKS, Place, mbconv_layers, module_of, quadra_layers, star_layers
from qnas.spaces.layer import LAYERSCALE, LayerSpec
from qnas.spaces.lower import BlockSpec
from qnas.spaces.neurons import DEFAULT_NEURON, NEURONS


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over channels, for feature maps (at each position) and pooled features."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) or (B, C) and keep the shape."""
        if x.ndim == 2:
            return super().forward(x)
        # in channels_last memory both permutations are views
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are those of the whole batch over all processes.

    It computes what torch's SyncBatchNorm computes, which does not run on a CPU. In a single process it
    behaves as torch's own module.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        places = (0, 2, 3)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean: Tensor = _Mean.apply(values.mean(places))
        centred = values - mean[:, None, None]
        variance: Tensor = _Mean.apply(centred.square().mean(places))
        self.track(mean.detach(), variance.detach(), values.numel() // len(mean) * dist.get_world_size())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics with the mean and biased variance of `count` values a channel."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


class _Mean(torch.autograd.Function):
    """The mean over the processes. Its gradient, of the sum of all processes' losses, is a mean too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _mean(grad)


def _mean(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


class LayerScale(nn.Module):
    """A learned factor of each channel (CaiT, arXiv 2103.17239), which starts small."""

    def __init__(self, channels: int, start: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, H, W) and keep the shape."""
        return x * self.weight.view(-1, 1, 1)


class GlobalAveragePool(nn.Module):
    """The mean over the positions of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return x.mean((2, 3))


# Standard deviation, in taps, of the Gaussian envelope of initial depthwise kernels.
ENVELOPE_TAPS = 0.7


def _convolution(spec: LayerSpec) -> nn.Module:
    if spec.same:
        return SameConv2d(spec.c_in, spec.c_out, spec.kernel, spec.stride, bias=spec.bias)
    return nn.Conv2d(spec.c_in, spec.c_out, spec.kernel, spec.stride, spec.padding, bias=spec.bias)


def _depthwise(spec: LayerSpec) -> nn.Module:
    """Build a depthwise convolution whose kernels start concentrated around their centres.

    Weights are drawn as torch draws them, weighted by a Gaussian of the distance from the centre, and scaled
    to keep their sum of squares. Trained kernels look like that (arXiv 2210.03651). A 7x7 kernel then starts
    almost like a 3x3 one instead of as noise from 49 places (benchmarks/start.py compares initialisations).
    """
    conv: nn.Conv2d
    if spec.same:
        conv = SameConv2d(spec.c_in, spec.c_out, spec.kernel, spec.stride, groups=spec.c_in, bias=spec.bias)
    elif spec.padding == spec.kernel // 2:
        conv = DepthwiseConv2d(spec.c_in, spec.kernel, spec.stride, bias=spec.bias)
    else:  # a user's block
        conv = nn.Conv2d(
            spec.c_in, spec.c_out, spec.kernel, spec.stride, spec.padding, groups=spec.c_in, bias=spec.bias
        )
    if conv.weight.is_meta:  # only shapes are asked for: a search does so for every network that it evaluates
        return conv
    with torch.no_grad():
        taps = torch.arange(spec.kernel, device=conv.weight.device) - spec.kernel // 2
        falling = torch.exp(-(taps**2) / (2 * ENVELOPE_TAPS**2))
        envelope = torch.outer(falling, falling)
        conv.weight.mul_(envelope / envelope.square().mean().sqrt())
    return conv


CLIP_RANGE = (-6.0, 6.0)  # of a mixer's output without layer normalisation; `qnas.spaces.blocks` explains why

EPS = {"layernorm": 1e-6, "batchnorm": 1e-5}  # of norms, where the space states none


def _eps(spec: LayerSpec) -> float:
    return EPS[spec.op] if spec.eps is None else spec.eps


# The operators of layer.OPS that are modules. `add`, `mul`, `scale` and `square` are in the blocks' forward.
MODULES: dict[str, Callable[[LayerSpec], nn.Module]] = {
    "conv": _convolution,
    "dwconv": _depthwise,
    "linear": lambda spec: nn.Linear(spec.c_in, spec.c_out, bias=spec.bias),
    "layernorm": lambda spec: ChannelLayerNorm(spec.c_out, eps=_eps(spec)),
    "batchnorm": lambda spec: BatchNorm2d(spec.c_out, eps=_eps(spec)),
    "layerscale": lambda spec: LayerScale(spec.c_out),
    "gelu": lambda _: nn.GELU(),
    "relu": lambda _: nn.ReLU(),
    "relu6": lambda _: nn.ReLU6(),
    "hswish": lambda _: nn.Hardswish(),
    "hsigmoid": lambda _: nn.Hardsigmoid(),
    "clip": lambda _: nn.Hardtanh(*CLIP_RANGE),
    "gap": lambda _: GlobalAveragePool(),
}


class Chain(nn.Sequential):
    """A sequence of layers, with a residual connection if the last layer is an add."""

    def __init__(self, layers: tuple[LayerSpec, ...]) -> None:
        self_adding = layers[-1].op == "add"
        super().__init__()
        for spec in layers[:-1] if self_adding else layers:
            self.add_module(spec.role, MODULES[spec.op](spec))
        self.is_residual = self_adding

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the output shape of the last layer."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return x + y if self.is_residual else y


class InvertedResidual(Chain):
    """The chain of an inverted residual; one operation where it trains on a CPU (`inverted_residual`)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""
        y = None if torch.compiler.is_compiling() else run_fused(self, x, BatchNorm2d, self.is_residual)
        return super().forward(x) if y is None else y


MixerTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # norm weight and bias, W_a, W_b, W_c
# norm weight and bias, expand weight and bias, project weight and bias
ChannelTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class QuadraBlock(nn.Module):
    """A depthwise mixer (the neuron) and a pointwise expansion, each with a residual connection.

    With the quadratic neuron it is the block of QuadraNet (arXiv 2311.17956, figure 3). `qnas.spaces.neurons`
    has the other neurons; `qnas.spaces.blocks` describes the order of the norms and why batch normalisation
    needs a clip. With layer normalisation and GELU, a block that is trained or differentiated keeps its input
    and the map between its halves, and recomputes the rest in the backward pass (`qnas.nn.kernels`). With
    other neurons, only the channel half does so.
    """

    is_residual = True  # so the block can be skipped
    # the convolutions of the mixer; a neuron has some of them
    conv_a: nn.Conv2d
    conv_b: nn.Conv2d
    conv_c: nn.Conv2d
    conv_s: nn.Conv2d
    norm1: nn.Module  # both with layer or batch normalisation
    norm2: nn.Module
    scale1: nn.Module  # both without
    scale2: nn.Module
    clip: nn.Module  # after the norm or scale of a mixer with products, without layer normalisation
    expand: nn.Conv2d
    act: nn.Module
    project: nn.Conv2d

    def __init__(
        self,
        c_in: int,
        kernel: int,
        expansion: int,
        *,
        norm: str = "layernorm",
        activation: str = "gelu",
        neuron: str = DEFAULT_NEURON,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        place = Place(c_in, c_in, 1, 1, norm, activation, norm_eps=norm_eps)
        for spec in place.settled(quadra_layers(place, kernel, expansion, neuron)):
            if spec.op in MODULES:
                self.add_module(spec.role, MODULES[spec.op](spec))
        self.neuron = neuron
        self.roles = NEURONS[neuron].roles
        self.is_pre_norm = norm == "layernorm"
        self.is_scaled = norm == LAYERSCALE
        self.has_clip = "clip" in self._modules
        self.has_kernels = self.is_pre_norm and activation == "gelu"
        with torch.no_grad():
            for role, factor in NEURONS[neuron].start.items():
                self.convolution(role).weight.mul_(factor)
            self.fill_ones()

    def convolution(self, role: str) -> nn.Conv2d:
        """Return a convolution of the mixer."""
        return cast(nn.Conv2d, getattr(self, role))

    @property
    def convolutions(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions of the mixer, in the order of the neuron's formula."""
        return tuple(self.convolution(role) for role in self.roles)

    @torch.no_grad()
    def fill_ones(self) -> None:
        """Set to one the biases that the neuron initialises to one."""
        for role in NEURONS[self.neuron].ones:
            bias = self.convolution(role).bias
            assert bias is not None
            bias.fill_(1.0)

    def mix(self, x: Tensor) -> Tensor:
        """Apply the neuron alone: (B, C, H, W) -> (B, C, H, W)."""
        return run_neuron(self.neuron, x, [(conv.weight, conv.bias) for conv in self.convolutions])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.has_kernels and (self.training or torch.is_grad_enabled()) and can_run(x):
            mixer, channels, eps = self.halves()
            is_fused = self.neuron == DEFAULT_NEURON
            x = mixer_half(x, *mixer, eps=eps) if is_fused else x + self.mix(self.norm1(x))
            return channel_half(x, *channels, eps=eps)
        if self.is_pre_norm:
            x = x + self.mix(self.norm1(x))
            hidden = self.expand(self.norm2(x))
        else:
            mixed = self.scale1(self.mix(x)) if self.is_scaled else self.norm1(self.mix(x))
            x = x + (self.clip(mixed) if self.has_clip else mixed)
            hidden = self.expand(x) if self.is_scaled else self.norm2(self.expand(x))
        added = self.project(self.act(hidden))
        y: Tensor = x + (self.scale2(added) if self.is_scaled else added)
        return y

    def halves(self) -> tuple[MixerTensors, ChannelTensors, float]:
        """Return the arguments of both halves' kernels after x, and epsilon. Needs layer normalisation."""
        norm1, norm2 = cast(nn.LayerNorm, self.norm1), cast(nn.LayerNorm, self.norm2)
        mixer = (norm1.weight, norm1.bias, *(conv.weight for conv in self.convolutions))
        pointwise = (self.expand.weight, self.expand.bias, self.project.weight, self.project.bias)
        channels = (norm2.weight, norm2.bias, *pointwise)
        return cast(MixerTensors, mixer), cast(ChannelTensors, channels), norm1.eps


def _submodules(layers: tuple[LayerSpec, ...]) -> OrderedDict[str, nn.Module]:
    return OrderedDict((spec.role, MODULES[spec.op](spec)) for spec in layers if spec.op in MODULES)


def star_block(
    c_in: int,
    kernel: int,
    expansion: int,
    mixers: str = "double",
    *,
    activation: str = "relu6",
    norm_eps: float | None = None,
) -> StarBlock:
    """Build a star block, with freshly drawn weights."""
    place = Place(c_in, c_in, 1, 1, "batchnorm", activation, norm_eps=norm_eps)
    return StarBlock(_submodules(place.settled(star_layers(place, kernel, expansion, mixers))))


def inverted_residual(
    c_in: int,
    c_out: int,
    stride: int,
    kernel: int,
    expansion: int,
    neuron: str = "linear",
    attention: str = "none",
    *,
    activation: str = "relu6",
    padding: str = "symmetric",
    norm_eps: float | None = None,
) -> nn.Module:
    """Build an inverted residual, with freshly drawn weights; that of MobileNetV2 is a chain.

    The second factor of a factored neuron starts around 1, so that the product starts with its linear part.
    """
    place = Place(c_in, c_out, stride, 1, "batchnorm", activation, padding, norm_eps)
    layers = place.settled(mbconv_layers(place, kernel, expansion, neuron, attention))
    if (neuron, attention) == ("linear", "none"):
        return InvertedResidual(layers)
    block = MBConvBlock(_submodules(layers), is_residual=layers[-1].op == "add")
    if neuron == "factored":
        nn.init.ones_(cast(nn.BatchNorm2d, block.norm_b).bias)
    return block


def build_block(block: BlockSpec) -> nn.Module:
    """Build the module of a block, with freshly drawn weights.

    Raises SpaceError if the number of parameters of a registered module differs from that of its layers.
    """
    # torch's initialisation: the N(0, 0.02) of large networks learns more slowly at these widths
    if not block.layers:
        return nn.Identity()
    kind = BLOCKS.get(block.block)
    if kind is None or kind.module is None:
        return Chain(block.layers)
    assert block.place is not None
    make, arguments = module_of(kind, block.place, block.parameters)
    module: nn.Module = make(**arguments)
    built, counted = count_parameters(module), sum(layer.params for layer in block.layers)
    if built != counted:
        raise SpaceError(
            f"block {kind.candidate_name(block.parameters)}: its module has {built} parameters, its layers "
            f"{counted}"
        )
    return module


def count_parameters(module: nn.Module) -> int:
    """Count the trained parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def quadratic_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the quadratic terms of all mixers.

    These are W_a and W_b of QuadraNet's neuron, W_b and W_s of Fan's, W_b of the factored and W_s of the
    compact one. Raises UsageError if a mixer has no linear part.
    """
    found = []
    for block in _relinear_blocks(module):
        neuron = NEURONS[block.neuron]
        roles = neuron.zeros if neuron.quadratic is None else neuron.quadratic
        found += [cast(nn.Parameter, block.convolution(role).weight) for role in roles or ()]
    return found


@torch.no_grad()
def start_linear(module: nn.Module) -> None:
    """Set every quadratic term to zero, so that the network computes the same as without these terms.

    Only the second factor of a product is set to zero: if both were, neither would get a gradient. Fan's
    neuron then has W_b = 0, b_b = 1, W_s = 0, c = 0. Raises UsageError if a mixer has no linear part.
    """
    for block in _relinear_blocks(module):
        for role in NEURONS[block.neuron].zeros or ():
            conv = block.convolution(role)
            conv.weight.zero_()
            if conv.bias is not None:
                conv.bias.zero_()
        block.fill_ones()


def _relinear_blocks(module: nn.Module) -> list[QuadraBlock]:
    blocks = [block for block in module.modules() if isinstance(block, QuadraBlock)]
    unfit = dict.fromkeys(block.neuron for block in blocks if NEURONS[block.neuron].zeros is None)
    if unfit:
        fit = ", ".join(name for name, neuron in NEURONS.items() if neuron.zeros is not None)
        raise UsageError(
            "`linear_start`, `quadratic_gamma`, `quadratic_alpha` and `quadratic_beta` need neurons with a "
            f"linear part ({fit}), but the network has {', '.join(unfit)}"
        )
    return blocks
