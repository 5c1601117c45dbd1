"""A network of one architecture as a module."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

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


def subnet_state(supernet_state: Mapping[str, Tensor], space: SearchSpace, arch: Arch) -> dict[str, Tensor]:
    """Pick one network's weights out of a supernet's state, under the names that the network has."""
    chosen = {p.name.replace(".", "_"): c for p, c in zip(space.positions, arch.choices, strict=True)}
    state = {}
    for key, tensor in supernet_state.items():
        prefix, _, rest = key.removeprefix("parts.").partition(".")
        if not key.startswith("parts."):
            continue
        if prefix in chosen:
            candidate, _, rest = rest.partition(".")
            if candidate != chosen[prefix]:
                continue
        state[f"{prefix}.{rest}"] = tensor
    return state
