"""Folding of norms into the convolutions beside them, as for deployment.

Batch norms and learned scales are folded into the convolution before them, scale and shift of layer norms
into the one behind.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qnas.nn.blocks import ChannelLayerNorm, LayerScale, QuadraBlock
from qnas.nn.padding import SameConv2d
from qnas.spaces.neurons import NEURONS


def fold_quadratic_norms(network: nn.Module) -> None:
    """Fold each batch norm behind a neuron's sum into its convolutions and a bias, in place.

    BN(A . B + C) = (sA) . B + sC + t with s = weight / sqrt(var + eps) and t = bias - s mean.
    The clip behind it stays, and so do norms without a convolution to fold into (`Neuron.folds`).
    """
    for block in network.modules():
        norm = getattr(block, "norm1", None) if isinstance(block, QuadraBlock) else None
        if not isinstance(block, QuadraBlock) or not isinstance(norm, nn.BatchNorm2d):
            continue
        convolutions = [block.convolution(role) for role in NEURONS[block.neuron].folds]
        if not convolutions:
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            for conv in convolutions:
                conv.weight *= scale[:, None, None, None]
                if conv.bias is not None:
                    conv.bias *= scale
            last = convolutions[-1]
            assert last.bias is None, "behind a batch norm's sum no convolution has a constant of its own"
            last.bias = nn.Parameter(norm.bias - scale * norm.running_mean)
        block.norm1 = nn.Identity()


def fold_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place; the module is in eval mode.

    Norms behind a neuron's product stay if no convolution can take up their shift. Submodules of a user's
    module may run in any order, so there only norms that follow a convolution in a Sequential are folded.
    """
    fold_quadratic_norms(module)
    fold_scales(module)
    for parent in module.modules():
        if not isinstance(parent, QuadraBlock | nn.Sequential):
            continue
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            is_behind_product = isinstance(parent, QuadraBlock) and name == "norm1"
            if isinstance(child, nn.BatchNorm2d) and not is_behind_product and before is not None:
                role, convolution = before
                if isinstance(convolution, nn.Conv2d):
                    setattr(parent, role, fuse_conv_bn_eval(convolution, child))
                    setattr(parent, name, nn.Identity())
            before = name, child


@torch.no_grad()
def fold_scales(network: nn.Module) -> None:
    """Fold the learned scales of QuadraBlocks into their convolutions, in place.

    s (A . B + C + t) = (sA) . B + sC + st. A scale stays behind a neuron without a convolution that could
    take it up (`Neuron.scaled`): that of a square may be below zero.
    """
    for block in network.modules():
        if not isinstance(block, QuadraBlock) or not block.is_scaled:
            continue
        mixers = [block.convolution(role) for role in NEURONS[block.neuron].scaled]
        for name, convolutions in (("scale1", mixers), ("scale2", [block.project])):
            scale = getattr(block, name)
            if not isinstance(scale, LayerScale) or not convolutions:
                continue
            for conv in convolutions:
                conv.weight *= scale.weight[:, None, None, None]
                if conv.bias is not None:
                    conv.bias *= scale.weight
            setattr(block, name, nn.Identity())


def fold_affine(module: nn.Module) -> None:
    """Fold each layer norm's scale and shift into the convolution or linear layer behind it, in place.

    W (s . x + t) + b = (W s) . x + (W t + b). It is exact where nothing is padded: a shift would reach into
    the border. The norm keeps neither scale nor shift. In a QuadraBlock, that is its second norm.
    """
    for parent in module.modules():
        if not isinstance(parent, QuadraBlock | nn.Sequential):
            continue
        children = list(parent.children())
        pairs: Iterable[tuple[nn.Module, nn.Module]] = pairwise(children)
        if isinstance(parent, QuadraBlock):
            pairs = [(parent.norm2, parent.expand)] if parent.is_pre_norm else []
        for norm, layer in pairs:
            if isinstance(norm, ChannelLayerNorm) and isinstance(layer, nn.Linear | nn.Conv2d):
                _fold_into(norm, layer)


@torch.no_grad()
def _fold_into(norm: nn.LayerNorm, layer: nn.Linear | nn.Conv2d) -> None:
    pads = isinstance(layer, nn.Conv2d) and (any(layer.padding) or isinstance(layer, SameConv2d))
    if norm.weight is None or pads or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        return
    rest = (1,) * (layer.weight.ndim - 2)
    shift = (layer.weight * norm.bias.view(1, -1, *rest)).flatten(1).sum(1)
    layer.weight *= norm.weight.view(1, -1, *rest)
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)
    norm.weight = norm.bias = None  # type: ignore[assignment]  # as torch has it without them
