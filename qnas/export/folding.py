"""Batch normalisation folded into the convolution before it, as it is deployed."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qnas.blocks import QuadraBlock


def fold_quadratic_norms(network: nn.Module) -> None:
    """Fold each batch norm behind a quadratic sum into W_a, W_c and a bias, in place.

    BN(A . B + C) = (sA) . B + sC + t with s = weight / sqrt(var + eps) and t = bias - s mean.
    The clip behind it stays.
    """
    for block in network.modules():
        if not isinstance(block, QuadraBlock) or not isinstance(block.norm1, nn.BatchNorm2d):
            continue
        norm, conv_a, conv_c = block.norm1, block.conv_a, block.conv_c
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            conv_a.weight *= scale[:, None, None, None]
            conv_c.weight *= scale[:, None, None, None]
            conv_c.bias = nn.Parameter(norm.bias - scale * norm.running_mean)
        block.norm1 = nn.Identity()


def fold_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place; the module is in eval mode."""
    fold_quadratic_norms(module)
    for parent in module.modules():
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if before is not None and isinstance(child, nn.BatchNorm2d):
                assert isinstance(before[1], nn.Conv2d), f"{name} follows {before[0]}, no convolution"
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, nn.Identity())
            before = name, child
