"""The module of one architecture, and its weights taken from a supernet."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qnas.nn.blocks import build_block
from qnas.spaces.arch import Arch
from qnas.spaces.block_order import block_labels, take_first_places
from qnas.spaces.lower import BlockSpec, lower
from qnas.spaces.space import Position, SearchSpace

CLASSIFIER_WEIGHT = "parts.head.classifier.weight"  # of a supernet, (classes, C)


def module_name(block: BlockSpec | Position) -> str:
    """Return the name of a part's submodule, such as `stem`, `3_transition`, `3_1` or `head`."""
    return block.name.replace(".", "_")


def build_network(blocks: Iterable[BlockSpec]) -> nn.Sequential:
    """Build the module of lowered blocks, without identities: (B, channels, H, W) -> (B, classes)."""
    network = nn.Sequential()
    for block in blocks:
        if block.layers:
            network.add_module(module_name(block), build_block(block))
    return network.to(memory_format=torch.channels_last)


def build_subnet(space: SearchSpace, arch: Arch, classes: int) -> nn.Sequential:
    """Build the network of an architecture with random initial weights."""
    return build_network(lower(space, arch, classes=classes))


def subnet_state(supernet_state: Mapping[str, Tensor], space: SearchSpace, arch: Arch) -> dict[str, Tensor]:
    """Extract one network's weights from a supernet's state, renamed to the network's names.

    A block has the weights of its position after blocks are moved to the front (`spaces.block_order`). The
    supernet's names show how weights are kept: `parts.POSITION.CANDIDATE.` for independent candidates,
    `parts.POSITION.shared.KIND.` for slices of one module per kind of block. All other blocks are slices
    where the supernet has wider ones. Slices are views.
    """
    classifier = supernet_state.get(CLASSIFIER_WEIGHT)
    classes = None if classifier is None else len(classifier)  # those of the data, not of the space
    by_name = {block.name: block for block in lower(space, arch, classes=classes)}
    blocks = [by_name[position.name] for position in space.positions]
    prefixes = [module_name(block) for block in blocks]
    places = take_first_places(block_labels(space), arch.indices(space))
    chosen = {prefixes[place]: i for i, place in enumerate(places)}  # the block that runs at each position
    shapes = {
        prefix: state_shapes(blocks[i])
        for prefix, i in chosen.items()
        if any(key.startswith(f"parts.{prefix}.shared.{blocks[i].kind}.") for key in supernet_state)
    }
    positions = set(prefixes)
    fixed = {
        name: state_shapes(block)
        for block in by_name.values()
        if (name := module_name(block)) not in positions
    }
    state = {}
    for key, tensor in supernet_state.items():
        prefix, _, rest = key.removeprefix("parts.").partition(".")
        if not key.startswith("parts."):
            continue
        if prefix not in chosen:
            shape = fixed.get(prefix, {}).get(rest, tensor.shape)
            state[f"{prefix}.{rest}"] = take_slice(tensor, shape)
            continue
        i = chosen[prefix]
        kept_as = f"shared.{blocks[i].kind}." if prefix in shapes else f"{arch.choices[i]}."
        name = rest.removeprefix(kept_as)
        if prefix in shapes:
            if name not in shapes[prefix]:  # of another kind of block, or only in larger candidates
                continue
            tensor = take_slice(tensor, shapes[prefix][name])
        elif not rest.startswith(kept_as):
            continue
        state[f"{prefixes[i]}.{name}"] = tensor
    return state


def state_shapes(block: BlockSpec) -> dict[str, torch.Size]:
    """Return the shapes of a block's parameters and buffers by name, without allocating memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_block(block).state_dict().items()}


def take_slice(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the slice of a larger candidate's tensor that a smaller candidate uses, as a view.

    The slice has the leading channels (the first two dimensions) and the centre of the kernel (the last two):
    (C, 1, 7, 7) -> (C, 1, 3, 3), (4C, C, 1, 1) -> (2C, C, 1, 1).
    """
    for dim, (whole, part) in enumerate(zip(tensor.shape, shape, strict=True)):
        if whole != part:
            tensor = tensor.narrow(dim, (whole - part) // 2 if dim >= 2 else 0, part)
    return tensor
