"""Batch normalisation folded into the convolution before it, as it is deployed."""

from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qnas.nn.blocks import QuadraBlock
from qnas.spaces.space import Neuron

# Neurons whose output is a sum of convolutions and products of them, by the convolutions that scale with
# it: of a product the first factor. The last takes up the shift. A square that comes last cannot be
# scaled by a negative factor, and a product alone not be shifted: the norms of type3 and type4 stay.
SCALED: dict[Neuron, tuple[str, ...]] = {
    "quadranet": ("conv_a", "conv_c"),
    "linear": ("conv_c",),
    "type2": ("conv_s",),
    "fan": ("conv_a", "conv_s"),
    "compact": ("conv_c", "conv_s"),
}


def fold_quadratic_norms(network: nn.Module) -> None:
    """Fold each batch norm behind a neuron's sum into its convolutions and a bias, in place.

    BN(A . B + C) = (sA) . B + sC + t with s = weight / sqrt(var + eps) and t = bias - s mean.
    The clip behind it stays, and so do norms that nothing takes up (`SCALED`).
    """
    for block in network.modules():
        if not isinstance(block, QuadraBlock) or not isinstance(block.norm1, nn.BatchNorm2d):
            continue
        if block.neuron not in SCALED:
            continue
        norm = block.norm1
        convolutions = [cast(nn.Conv2d, getattr(block, role)) for role in SCALED[block.neuron]]
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

    Norms behind the product of a neuron that takes up no shift stay.
    """
    fold_quadratic_norms(module)
    for parent in module.modules():
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            is_behind_product = isinstance(parent, QuadraBlock) and name == "norm1"
            if before is not None and isinstance(child, nn.BatchNorm2d) and not is_behind_product:
                assert isinstance(before[1], nn.Conv2d), f"{name} follows {before[0]}, no convolution"
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, nn.Identity())
            before = name, child
