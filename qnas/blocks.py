"""Blocks of layers as modules. Every submodule is made from its layer and named after its role.

Tensors are (B, C, H, W), in channels_last memory format where that is faster; the networks are
fully convolutional, so a module serves every resolution.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from qnas.distributed import BatchNorm2d
from qnas.kernels.block import can_run, mixer_half
from qnas.kernels.pointwise import channel_half
from qnas.layer import LayerSpec
from qnas.lower import BlockSpec, Place, quadra_layers
from qnas.quadratic import quadratic_conv2d


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


def _convolution(spec: LayerSpec) -> nn.Module:
    groups = spec.c_in if spec.op == "dwconv" else 1
    return nn.Conv2d(
        spec.c_in, spec.c_out, spec.kernel, spec.stride, spec.padding, groups=groups, bias=spec.bias
    )


CLIP_RANGE = (-6.0, 6.0)  # what a mixer with batch normalisation may add; `qnas.lower` says why

# Operators of layer.OPS that are modules; `add` and `mul` are written out in the blocks' forward.
MODULES: dict[str, Callable[[LayerSpec], nn.Module]] = {
    "conv": _convolution,
    "dwconv": _convolution,
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
    """Quadratic depthwise mixer and pointwise expansion, each with a residual.

    QuadraNet, arXiv 2311.17956, figure 3; `qnas.lower` says where the norms stand, and why batch
    normalisation needs a clip. While training, and wherever gradients are taken, a block with layer
    normalisation and GELU keeps its input and the map between its halves, and computes the rest again in
    the backward pass (`qnas.kernels`); with `recompute` off it keeps the expanded activation too.
    """

    conv_a: nn.Conv2d
    conv_b: nn.Conv2d
    conv_c: nn.Conv2d
    norm1: nn.Module
    norm2: nn.Module
    clip: nn.Module  # with batch normalisation only
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
        recompute: bool = True,
    ) -> None:
        super().__init__()
        place = Place(channels, channels, 1, 1, norm, activation)
        for spec in quadra_layers(place, kernel_size, expansion):
            if spec.op in MODULES:
                self.add_module(spec.role, MODULES[spec.op](spec))
        self.is_pre_norm = norm == "layernorm"
        self.has_kernels = self.is_pre_norm and activation == "gelu"
        self.recompute = recompute

    def mix(self, x: Tensor) -> Tensor:
        """Apply the quadratic convolution alone: (B, C, H, W) -> (B, C, H, W)."""
        return quadratic_conv2d(
            x, self.conv_a.weight, self.conv_b.weight, self.conv_c.weight, self.conv_c.bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.has_kernels and (self.training or torch.is_grad_enabled()) and can_run(x):
            return self._run_halves(x)
        if self.is_pre_norm:
            x = x + self.mix(self.norm1(x))
            hidden = self.expand(self.norm2(x))
        else:
            x = x + self.clip(self.norm1(self.mix(x)))
            hidden = self.norm2(self.expand(x))
        y: Tensor = x + self.project(self.act(hidden))
        return y

    def _run_halves(self, x: Tensor) -> Tensor:
        norm1, norm2 = cast(nn.LayerNorm, self.norm1), cast(nn.LayerNorm, self.norm2)
        expand, project = cast(nn.Conv2d, self.expand), cast(nn.Conv2d, self.project)
        assert expand.bias is not None
        assert project.bias is not None
        depthwise = (conv.weight for conv in (self.conv_a, self.conv_b, self.conv_c))
        x = mixer_half(x, norm1.weight, norm1.bias, *depthwise, eps=norm1.eps)
        pointwise = (expand.weight, expand.bias, project.weight, project.bias)
        return channel_half(x, norm2.weight, norm2.bias, *pointwise, eps=norm2.eps, recompute=self.recompute)


def _quadra(layers: tuple[LayerSpec, ...]) -> nn.Module:
    by_role = {spec.role: spec for spec in layers}
    conv, expand = by_role["conv_a"], by_role["expand"]
    return QuadraBlock(
        conv.c_in,
        conv.kernel,
        expand.c_out // expand.c_in,
        norm=by_role["norm1"].op,
        activation=by_role["act"].op,
    )


# Kinds of block that are not a plain chain of their layers.
BLOCKS: dict[str, Callable[[tuple[LayerSpec, ...]], nn.Module]] = {
    "quadra": _quadra,
    "identity": lambda _: nn.Identity(),
}


def build_block(block: BlockSpec) -> nn.Module:
    """Build the module of a block, with freshly drawn weights."""
    # torch's own initialisation: the N(0, 0.02) of the large networks learns more slowly at these widths
    return BLOCKS.get(block.kind, Chain)(block.layers)


def count_parameters(module: nn.Module) -> int:
    """Count the trained parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def quadratic_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all quadratic products, W_a and W_b of every mixer."""
    mixers = (block for block in module.modules() if isinstance(block, QuadraBlock))
    return [cast(nn.Parameter, conv.weight) for m in mixers for conv in (m.conv_a, m.conv_b)]


@torch.no_grad()
def start_linear(module: nn.Module) -> None:
    """Set every quadratic product to zero: the network then computes what it would without them.

    W_b alone is zero, as with both no gradient would ever reach either.
    """
    for block in module.modules():
        if isinstance(block, QuadraBlock):
            block.conv_b.weight.zero_()


__all__ = [
    "BLOCKS",
    "MODULES",
    "QuadraBlock",
    "build_block",
    "count_parameters",
    "quadratic_weights",
    "start_linear",
]
