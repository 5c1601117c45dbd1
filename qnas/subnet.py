"""A network of one architecture as a module."""

from collections.abc import Iterable

import torch
from torch import nn

from qnas.arch import Arch
from qnas.blocks import build_block
from qnas.lower import BlockSpec, lower
from qnas.space import SearchSpace


def module_name(block: BlockSpec) -> str:
    """Return the name of a block's submodule: `stem`, `3_transition`, `3_1`, `head`."""
    return block.name.replace(".", "_")


def build_network(blocks: Iterable[BlockSpec]) -> nn.Sequential:
    """Build the module of lowered blocks: (B, channels, H, W) -> (B, classes). Identities vanish."""
    network = nn.Sequential()
    for block in blocks:
        if block.layers:
            network.add_module(module_name(block), build_block(block))
    return network.to(memory_format=torch.channels_last)


def build_subnet(space: SearchSpace, arch: Arch, classes: int) -> nn.Sequential:
    """Build the network of an architecture with freshly drawn weights."""
    return build_network(lower(space, arch, classes=classes))
