"""The only lowering of a space and an architecture to blocks, each a tuple of layers.

The module builders, the counters and every latency source read its result, so they cannot disagree. Layers
are in the order in which they run; `role` names a layer inside its block, and the submodule that computes it.
A block carries its parameters, so nothing has to infer them from layers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from qnas.common.errors import SpaceError
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.blocks import BLOCKS, Place, Value, settled
from qnas.spaces.layer import LayerSpec
from qnas.spaces.space import Candidate, Position, SearchSpace

HEAD = "head"  # the name of the last block


@dataclass(frozen=True)
class BlockSpec:
    """A named block: the layers of a stem, transition, candidate or head."""

    name: str  # "stem", "3.transition", "3.1" (stage and position), "head"
    kind: str  # "stem", "transition", "head", or that of the candidate
    layers: tuple[LayerSpec, ...]
    # of candidates: the key in BLOCKS, the place, and the block's parameters
    block: str = ""
    place: Place | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict, hash=False)

    @property
    def unnamed(self) -> "BlockSpec":
        """The block without its name: a key for all equal blocks, wherever they stand."""
        return replace(self, name="")


@dataclass(frozen=True)
class Slot:
    """A position waiting for a candidate, with the resolution that reaches it."""

    position: Position
    resolution_px: int


def stem_layers(space: SearchSpace, resolution_px: int) -> tuple[LayerSpec, ...]:
    """Return the layers of the stem: a convolution, a norm, and an activation where the space has one."""
    stem = space.stem
    c, bias = stem.channels, space.norm == "layernorm"
    conv = LayerSpec("conv", "conv", resolution_px, space.input.channels, c, stem.kernel, stem.stride, bias)
    norm = LayerSpec("norm", space.norm, conv.out_px, c, c)
    act = LayerSpec("act", space.activation, conv.out_px, c, c)
    return (conv, norm, act) if stem.activation else (conv, norm)


def transition_layers(
    space: SearchSpace, c_in: int, c_out: int, stride: int, resolution_px: int
) -> tuple[LayerSpec, ...]:
    """Return a norm and a convolution of kernel = stride; nothing if the shape stays the same."""
    if stride == 1 and c_in == c_out:
        return ()
    pre_norm = space.norm == "layernorm"
    conv = LayerSpec("conv", "conv", resolution_px, c_in, c_out, stride, stride, bias=pre_norm)
    if pre_norm:
        return LayerSpec("norm", space.norm, resolution_px, c_in, c_in), conv
    return conv, LayerSpec("norm", space.norm, conv.out_px, c_out, c_out)


def head_layers(space: SearchSpace, c_in: int, classes: int, resolution_px: int) -> tuple[LayerSpec, ...]:
    """Return the layers of the head: a pointwise convolution where the space has one, pooling, classifier."""
    px, norm, channels = resolution_px, space.norm, space.head.channels or c_in
    pre_norm = norm == "layernorm"
    layers = []
    if space.head.channels is not None:
        expand = LayerSpec("expand", "conv", px, c_in, channels, bias=pre_norm)
        norm1 = LayerSpec("norm1", norm, px, *((c_in, c_in) if pre_norm else (channels, channels)))
        act = LayerSpec("act", space.activation, px, channels, channels)
        layers += [norm1, expand, act] if pre_norm else [expand, norm1, act]
    layers.append(LayerSpec("pool", "gap", px, channels, channels))
    if pre_norm:
        layers.append(LayerSpec("norm2", norm, 1, channels, channels))
    layers.append(LayerSpec("classifier", "linear", 1, channels, classes, bias=True))
    return tuple(layers)


def skeleton(
    space: SearchSpace, *, resolution_px: int | None = None, classes: int | None = None
) -> tuple[BlockSpec | Slot, ...]:
    """Return the fixed blocks of every network of the space, with slots where candidates go.

    By default, it is that of the deployed network. Raises SpaceError where the resolution is too small.
    """
    px = space.input.resolution_px if resolution_px is None else resolution_px
    check_resolution(space, px)
    blocks: list[BlockSpec | Slot] = []

    def add_fixed(name: str, kind: str, layers: tuple[LayerSpec, ...]) -> int:
        if not layers:
            return px
        layers = settled(layers, space.padding, space.norm_eps)
        blocks.append(BlockSpec(name, kind, layers))
        return layers[-1].out_px

    px = add_fixed("stem", "stem", stem_layers(space, px))
    channels = space.stem.channels
    for i, stage in enumerate(space.stages):
        if space.transition == "conv":
            layers = transition_layers(space, channels, stage.channels, stage.stride, px)
            px = add_fixed(f"{i + 1}.transition", "transition", layers)
        for position in (p for p in space.positions if p.stage == i):
            blocks.append(Slot(position, px))
            px = -(-px // position.stride)
        channels = stage.channels
    add_fixed(HEAD, "head", head_layers(space, channels, classes or space.head.classes, px))
    return tuple(blocks)


def smallest_resolution_px(space: SearchSpace) -> int:
    """Return the smallest input that passes all strides of the space."""
    return math.prod((space.stem.stride, *(stage.stride for stage in space.stages)))


def check_resolution(space: SearchSpace, resolution_px: int) -> None:
    """Raise SpaceError where an input is too small to pass all strides of the space."""
    smallest = smallest_resolution_px(space)
    if resolution_px < smallest:
        raise SpaceError(
            f"resolution {resolution_px} px is too small for space {space.name}: at least {smallest} px"
        )


def make_block(name: str, block: str, place: Place, **parameters: Value) -> BlockSpec:
    """Return a block with these parameters at a place. Raises SpaceError where its layers do not fit."""
    kind = BLOCKS[block]
    assert not list(kind.check(parameters)), parameters
    given = kind.complete(parameters)
    layers = kind.layers_at(place, given)
    return BlockSpec(name, kind.kind(given), layers, block, kind.at(place, given), given)


def fill(space: SearchSpace, slot: Slot, candidate: Candidate) -> BlockSpec:
    """Return the block of a candidate in a slot. Identity has no layers."""
    p = slot.position
    place = Place(
        p.c_in,
        p.c_out,
        p.stride,
        slot.resolution_px,
        space.norm,
        space.activation,
        space.padding,
        space.norm_eps,
    )
    return make_block(p.name, candidate.block, place, **candidate.parameters)


def all_blocks(space: SearchSpace) -> list[tuple[BlockSpec, Candidate | None]]:
    """Return every block of a space with its candidate; None for a fixed block."""
    blocks: list[tuple[BlockSpec, Candidate | None]] = []
    for part in skeleton(space):
        if isinstance(part, Slot):
            blocks += [(fill(space, part, c), c) for c in part.position.candidates]
        else:
            blocks.append((part, None))
    return blocks


def lower(
    space: SearchSpace, arch: Arch, *, resolution_px: int | None = None, classes: int | None = None
) -> tuple[BlockSpec, ...]:
    """Return the blocks of a network in order, by default of the deployed network."""
    choices = iter(arch.choices)
    return tuple(
        fill(space, part, part.position.candidate(next(choices))) if isinstance(part, Slot) else part
        for part in skeleton(space, resolution_px=resolution_px, classes=classes)
    )


def layers_of(blocks: Iterable[BlockSpec]) -> Iterator[LayerSpec]:
    """Return all layers of these blocks in order."""
    return chain.from_iterable(block.layers for block in blocks)


def count_macs(blocks: Iterable[BlockSpec]) -> int:
    """Count the multiply-adds of convolutions and linear layers for one image."""
    return sum(layer.macs for layer in layers_of(blocks))


def count_params(blocks: Iterable[BlockSpec]) -> int:
    """Count the trained parameters."""
    return sum(layer.params for layer in layers_of(blocks))


def smallest_and_largest(space: SearchSpace) -> tuple[Arch, Arch]:
    """Return the networks with the fewest and the most MACs."""
    slots = [part for part in skeleton(space) if isinstance(part, Slot)]
    macs = [[count_macs([fill(space, slot, c)]) for c in slot.position.candidates] for slot in slots]
    ends = (tuple(row.index(end(row)) for row in macs) for end in (min, max))
    least, most = (arch_from_indices(space, indices) for indices in ends)
    return least, most
