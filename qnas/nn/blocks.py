"""Blocks of layers as modules. Every submodule is made from its layer and named after its role.

Tensors are (B, C, H, W), in channels_last memory format where that is faster; the networks are
fully convolutional, so a module serves every resolution.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from qnas.common.errors import SpaceError, UsageError
from qnas.nn.batch_norm import BatchNorm2d
from qnas.nn.kernels.block import can_run, mixer_half
from qnas.nn.kernels.pointwise import channel_half
from qnas.nn.neurons import run_neuron
from qnas.spaces.blocks import BLOCKS, Place, module_of, quadra_layers
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import BlockSpec
from qnas.spaces.neurons import DEFAULT_NEURON, NEURONS


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
    """Build a depthwise convolution whose kernels start concentrated around their centres.

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


CLIP_RANGE = (-6.0, 6.0)  # what a mixer with batch normalisation may add; `qnas.spaces.blocks` says why

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


MixerTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # norm weight and bias, W_a, W_b, W_c
# norm weight and bias, expand weight and bias, project weight and bias
ChannelTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class QuadraBlock(nn.Module):
    """Depthwise mixer of a neuron and pointwise expansion, each with a residual.

    QuadraNet, arXiv 2311.17956, figure 3, where the neuron is the quadratic one; `qnas.spaces.neurons` has
    the others, `qnas.spaces.blocks` says where the norms stand and why batch normalisation needs a clip.
    While training, and wherever gradients are taken, a block with layer normalisation and GELU keeps its
    input and the map between its halves, and computes the rest again in the backward pass
    (`qnas.nn.kernels`; of other neurons the channel half alone).
    """

    is_residual = True  # what it adds can be left out
    # those that the neuron has
    conv_a: nn.Conv2d
    conv_b: nn.Conv2d
    conv_c: nn.Conv2d
    conv_s: nn.Conv2d
    norm1: nn.Module
    norm2: nn.Module
    clip: nn.Module  # behind a product with batch normalisation
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
    ) -> None:
        super().__init__()
        place = Place(c_in, c_in, 1, 1, norm, activation)
        for spec in quadra_layers(place, kernel, expansion, neuron):
            if spec.op in MODULES:
                self.add_module(spec.role, MODULES[spec.op](spec))
        self.neuron = neuron
        self.roles = NEURONS[neuron].roles
        self.is_pre_norm = norm == "layernorm"
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
        """The mixer's, in the order in which the neuron's formula takes them."""
        return tuple(self.convolution(role) for role in self.roles)

    @torch.no_grad()
    def fill_ones(self) -> None:
        """Set the biases to one that the neuron starts at one."""
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
        mixer, channels, eps = self.halves()
        x = mixer_half(x, *mixer, eps=eps) if self.neuron == DEFAULT_NEURON else x + self.mix(self.norm1(x))
        return channel_half(x, *channels, eps=eps)

    def halves(self) -> tuple[MixerTensors, ChannelTensors, float]:
        """Return what the kernels of both halves take after x, and epsilon; with layer normalisation."""
        norm1, norm2 = cast(nn.LayerNorm, self.norm1), cast(nn.LayerNorm, self.norm2)
        mixer = (norm1.weight, norm1.bias, *(conv.weight for conv in self.convolutions))
        pointwise = (self.expand.weight, self.expand.bias, self.project.weight, self.project.bias)
        channels = (norm2.weight, norm2.bias, *pointwise)
        return cast(MixerTensors, mixer), cast(ChannelTensors, channels), norm1.eps


def build_block(block: BlockSpec) -> nn.Module:
    """Build the module of a block, with freshly drawn weights.

    Raises SpaceError where a registered module is not what the layers of its block say.
    """
    # not the N(0, 0.02) of the large networks, which learns more slowly at these widths
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
    """Return the weights of the quadratic terms of every mixer, which are zero in a linear network.

    Of QuadraNet's neuron W_a and W_b, of Fan's W_b and W_s, of the compact one W_s. Raises UsageError
    where a mixer has no linear part.
    """
    found = []
    for block in _relinear_blocks(module):
        neuron = NEURONS[block.neuron]
        roles = neuron.zeros if neuron.quadratic is None else neuron.quadratic
        found += [cast(nn.Parameter, block.convolution(role).weight) for role in roles or ()]
    return found


@torch.no_grad()
def start_linear(module: nn.Module) -> None:
    """Set every quadratic term to zero: the network then computes what it would without them.

    Of a product the second factor alone is zero, as with both no gradient would ever reach either. Fan's
    is then W_b = 0, b_b = 1, W_s = 0, c = 0. Raises UsageError where a mixer has no linear part.
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
