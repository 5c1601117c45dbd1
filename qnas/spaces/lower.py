"""The one lowering: a space and an architecture to blocks, each a tuple of layers.

The module builders, the counters and every latency source read what this returns, so they cannot
disagree. Layers stand in the order in which they run; `role` names a layer inside its block and is
the name of the submodule that computes it.

Where normalisation goes. With layer normalisation a QuadraBlock is the paper's (arXiv 2311.17956):
`x + qconv(LN(x))`, then `x + PW2(GELU(PW1(LN(x))))`. Batch normalisation is here so that it folds
away at deployment, and before a padded convolution it cannot: so it follows the quadratic sum
(`x + clip(BN(qconv(x)))`, folding into W_a, W_c and a bias) and the first pointwise convolution. Behind
the neurons type3 and type4 nothing takes up a shift, and it stays an operator of its own.

Why the clip, to [-6, 6]: with batch normalisation nothing else bounds what a block multiplies. In
evaluation a norm is a constant scale and shift, a block squares its input, and so a network of d
blocks is a polynomial of degree 2^d, which overflows off its training distribution: at more contrast,
at another resolution. Clipped, a mixer adds at most 6 to its input and the network grows no faster
than linearly. The bound is ReLU6's, six standard deviations where the norm's scale is 1. It costs an
elementwise pass that nothing fuses. Layer normalisation bounds the input of the product itself, and the
linear neuron, which multiplies nothing, needs no clip.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from qnas.common.errors import SpaceError
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.layer import LayerSpec
from qnas.spaces.space import DEFAULT_NEURON, NEURONS, Candidate, Neuron, Position, SearchSpace, block_kind


@dataclass(frozen=True)
class BlockSpec:
    """A named block: the layers of a stem, transition, candidate or head."""

    name: str  # "stem", "3.transition", "3.1" (stage and position), "head"
    kind: str  # "stem", "transition", "head", or a key of BLOCKS
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True)
class Place:
    """What surrounds a candidate's block: its shape and the space's conventions."""

    c_in: int
    c_out: int
    stride: int
    resolution_px: int
    norm: str
    activation: str

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have the same shape."""
        return self.c_in == self.c_out and self.stride == 1


@dataclass(frozen=True)
class Slot:
    """A position waiting for a candidate, with the resolution that reaches it."""

    position: Position
    resolution_px: int


# The layers of each neuron by role; `neurons.NEURONS` has the formulas. conv_a and conv_b are the
# factors of the product (conv_a also what type3 squares), conv_c is the linear part, conv_s that of the
# squared input.
MIXERS: dict[Neuron, tuple[str, ...]] = {
    "quadranet": ("conv_a", "conv_b", "product", "conv_c", "sum"),
    "linear": ("conv_c",),
    "type2": ("square", "conv_s"),
    "type3": ("conv_a", "square"),
    "type4": ("conv_a", "conv_b", "product"),
    "fan": ("conv_a", "conv_b", "product", "square", "conv_s", "sum"),
    "compact": ("conv_c", "square", "conv_s", "sum"),
}
_ELEMENTWISE = {"product": "mul", "square": "square", "sum": "add"}  # all others are convolutions

# Biases of the formulas: inside the product, and what is added at the end, of which one is enough (the
# two of the compact neuron are one constant) and none where a batch norm shifts.
FACTOR_BIASES: dict[Neuron, tuple[str, ...]] = {"fan": ("conv_a", "conv_b")}
CONSTANTS: dict[Neuron, str] = {"linear": "conv_c", "fan": "conv_s", "compact": "conv_c"}


def mixer_layers(place: Place, kernel: int, neuron: Neuron) -> list[LayerSpec]:
    """Return the layers of a neuron in depthwise form, without norms."""
    c, px = place.c_in, place.resolution_px
    biased = set(FACTOR_BIASES.get(neuron, ()))
    if place.norm != "batchnorm":
        biased.add(CONSTANTS.get(neuron, ""))
    return [
        LayerSpec(role, _ELEMENTWISE[role], px, c, c)
        if role in _ELEMENTWISE
        else LayerSpec(role, "dwconv", px, c, c, kernel, bias=role in biased)
        for role in MIXERS[neuron]
    ]


def quadra_layers(
    place: Place, kernel: int, expansion: int, neuron: Neuron = DEFAULT_NEURON
) -> tuple[LayerSpec, ...]:
    """Return the layers of a QuadraBlock: depthwise mixer of a neuron, then pointwise expansion."""
    assert place.keeps_shape
    c, hidden, px = place.c_in, expansion * place.c_in, place.resolution_px
    norm, pre_norm = place.norm, place.norm == "layernorm"
    mixer = mixer_layers(place, kernel, neuron)
    expand = LayerSpec("expand", "conv", px, c, hidden, bias=pre_norm)
    act = LayerSpec("act", place.activation, px, hidden, hidden)
    project = LayerSpec("project", "conv", px, hidden, c, bias=True)
    if pre_norm:
        mixer = [LayerSpec("norm1", norm, px, c, c), *mixer]
        pointwise = [LayerSpec("norm2", norm, px, c, c), expand, act, project]
    else:
        # next to the convolution that it folds into, as it runs once folded
        at = len(mixer) - (mixer[-1].role == "sum")
        mixer.insert(at, LayerSpec("norm1", norm, px, c, c))
        if neuron != "linear":
            mixer.append(LayerSpec("clip", "clip", px, c, c))
        pointwise = [expand, LayerSpec("norm2", norm, px, hidden, hidden), act, project]
    return (
        *mixer,
        LayerSpec("residual1", "add", px, c, c),
        *pointwise,
        LayerSpec("residual2", "add", px, c, c),
    )


def mbconv_layers(place: Place, kernel: int, expansion: int) -> tuple[LayerSpec, ...]:
    """Return the layers of an inverted residual (MobileNetV2, arXiv 1801.04381)."""
    c_in, c_out, px, norm = place.c_in, place.c_out, place.resolution_px, place.norm
    hidden = expansion * c_in
    layers = []
    if expansion > 1:
        layers += [
            LayerSpec("expand", "conv", px, c_in, hidden),
            LayerSpec("norm1", norm, px, hidden, hidden),
            LayerSpec("act1", place.activation, px, hidden, hidden),
        ]
    depthwise = LayerSpec("depthwise", "dwconv", px, hidden, hidden, kernel, place.stride)
    px = depthwise.out_px
    layers += [
        depthwise,
        LayerSpec("norm2", norm, px, hidden, hidden),
        LayerSpec("act2", place.activation, px, hidden, hidden),
        LayerSpec("project", "conv", px, hidden, c_out),
        LayerSpec("norm3", norm, px, c_out, c_out),
    ]
    if place.keeps_shape:
        layers.append(LayerSpec("residual", "add", px, c_out, c_out))
    return tuple(layers)


def identity_layers(place: Place, kernel: int, expansion: int) -> tuple[LayerSpec, ...]:
    """Return no layers: the input passes unchanged."""
    assert place.keeps_shape
    return ()


# By `Candidate.kind`.
BLOCKS: dict[str, Callable[[Place, int, int], tuple[LayerSpec, ...]]] = {
    **{block_kind("quadra", neuron): partial(quadra_layers, neuron=neuron) for neuron in NEURONS},
    "mbconv": mbconv_layers,
    "identity": identity_layers,
}


def stem_layers(space: SearchSpace, resolution_px: int) -> tuple[LayerSpec, ...]:
    """Return the layers of the stem: a convolution, a norm, and an activation where asked for."""
    stem = space.stem
    conv = LayerSpec(
        "conv",
        "conv",
        resolution_px,
        space.input.channels,
        stem.channels,
        stem.kernel,
        stem.stride,
        bias=space.norm == "layernorm",
    )
    layers = [conv, LayerSpec("norm", space.norm, conv.out_px, stem.channels, stem.channels)]
    if stem.activation:
        layers.append(LayerSpec("act", space.activation, conv.out_px, stem.channels, stem.channels))
    return tuple(layers)


def transition_layers(
    space: SearchSpace, c_in: int, c_out: int, stride: int, resolution_px: int
) -> tuple[LayerSpec, ...]:
    """Return a norm and a convolution of kernel = stride; nothing where the shape stays."""
    if stride == 1 and c_in == c_out:
        return ()
    if space.norm == "layernorm":
        return (
            LayerSpec("norm", space.norm, resolution_px, c_in, c_in),
            LayerSpec("conv", "conv", resolution_px, c_in, c_out, stride, stride, bias=True),
        )
    conv = LayerSpec("conv", "conv", resolution_px, c_in, c_out, stride, stride)
    return conv, LayerSpec("norm", space.norm, conv.out_px, c_out, c_out)


def head_layers(space: SearchSpace, c_in: int, classes: int, resolution_px: int) -> tuple[LayerSpec, ...]:
    """Return the layers of the head: pointwise convolution where asked for, pooling, classifier."""
    px, norm = resolution_px, space.norm
    pre_norm = norm == "layernorm"
    layers = []
    channels = c_in
    if space.head.channels is not None:
        channels = space.head.channels
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

    Without arguments it is that of the deployed network. Raises SpaceError where the resolution is
    too small to pass all strides.
    """
    px = space.input.resolution_px if resolution_px is None else resolution_px
    check_resolution(space, px)
    blocks: list[BlockSpec | Slot] = []

    def add_fixed(name: str, kind: str, layers: tuple[LayerSpec, ...]) -> int:
        if not layers:
            return px
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
    add_fixed("head", "head", head_layers(space, channels, classes or space.head.classes, px))
    return tuple(blocks)


def smallest_resolution_px(space: SearchSpace) -> int:
    """Return the smallest input that passes all strides of the space."""
    total = max(space.stem.stride, space.stem.kernel if space.stem.kernel == space.stem.stride else 1)
    for stage in space.stages:
        total *= stage.stride
    return total


def check_resolution(space: SearchSpace, resolution_px: int) -> None:
    """Raise SpaceError where an input is too small to pass all strides of the space."""
    smallest = smallest_resolution_px(space)
    if resolution_px < smallest:
        raise SpaceError(
            f"resolution {resolution_px} px is too small for space {space.name}: at least {smallest} px"
        )


def fill(space: SearchSpace, slot: Slot, candidate: Candidate) -> BlockSpec:
    """Return the block that a candidate makes of a slot. Identity has no layers."""
    p = slot.position
    place = Place(p.c_in, p.c_out, p.stride, slot.resolution_px, space.norm, space.activation)
    layers = BLOCKS[candidate.kind](place, candidate.kernel, candidate.expansion)
    return BlockSpec(p.name, candidate.kind, layers)


def lower(
    space: SearchSpace, arch: Arch, *, resolution_px: int | None = None, classes: int | None = None
) -> tuple[BlockSpec, ...]:
    """Return the blocks of a network in order; of the deployed one unless told otherwise."""
    choices = iter(arch.choices)
    return tuple(
        fill(space, part, part.position.candidate(next(choices))) if isinstance(part, Slot) else part
        for part in skeleton(space, resolution_px=resolution_px, classes=classes)
    )


def layers_of(blocks: Iterable[BlockSpec]) -> Iterator[LayerSpec]:
    """Yield all layers of these blocks in order."""
    for block in blocks:
        yield from block.layers


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
    return (
        arch_from_indices(space, tuple(row.index(min(row)) for row in macs)),
        arch_from_indices(space, tuple(row.index(max(row)) for row in macs)),
    )
