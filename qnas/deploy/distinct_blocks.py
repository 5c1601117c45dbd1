"""The distinct blocks of a space as modules to time."""

from dataclasses import dataclass

import torch
from torch import nn

from qnas.deploy.runtimes import Shape
from qnas.latency.device_table import all_blocks
from qnas.nn.blocks import build_block
from qnas.spaces.lower import BlockSpec
from qnas.spaces.space import SearchSpace

COPIES = 4  # blocks of a chain


_JITTER = 0.1  # of norms and biases


@dataclass(frozen=True)
class DistinctBlock:
    """A distinct block, and how many of it are timed in a chain."""

    name: str  # of the first place where it stands: "2.1 quadra_k3_e2"
    block: BlockSpec
    copies: int

    @property
    def shape(self) -> Shape:
        """The shape of its input."""
        first = self.block.layers[0]
        return first.c_in, first.resolution_px, first.resolution_px

    def build(self) -> nn.Module:
        """Build the chain, with weights drawn from torch's generator."""
        return draw_norms(nn.Sequential(*(build_block(self.block) for _ in range(self.copies))))


def distinct_blocks(space: SearchSpace) -> dict[BlockSpec, DistinctBlock]:
    """Return the blocks of a space that differ in more than their name, by themselves without it."""
    parts: dict[BlockSpec, DistinctBlock] = {}
    for block, candidate in all_blocks(space):
        key = block.unnamed
        if block.layers and key not in parts:
            name = f"{block.name} {candidate.name}" if candidate else block.name
            parts[key] = DistinctBlock(name, block, COPIES if _fits_itself(block) else 1)
    return parts


def _fits_itself(block: BlockSpec) -> bool:
    first, last = block.layers[0], block.layers[-1]
    return (first.c_in, first.resolution_px) == (last.c_out, last.out_px)


def draw_norms(module: nn.Module) -> nn.Module:
    """Move norms and biases off one and zero, in place."""
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.ndim == 1):
            parameter.add_(_JITTER * torch.randn_like(parameter))
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            assert norm.running_mean is not None
            norm.running_mean.normal_(0.0, _JITTER)
    return module
