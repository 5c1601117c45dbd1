"""A supernet that starts from a pretrained network.

Each module of inverted residuals takes the network's tensors: kernels in the middle of larger ones, with a
ring of zeros, or their centres; and of the hidden channels the most important first, so that a smaller
expansion, whose channels are the leading ones, has the best of them (as in Once-for-All, arXiv 1908.09791).
The order of hidden channels changes nothing of the network itself. Where stages have several widths, the
channels between blocks are ordered too.

A product of two depthwise convolutions starts as the linear one: W_a is the pretrained convolution with its
norm, and the norm of W_b has scale 0 and shift 1, so that the other factor is 1 (ReLinear's start, arXiv
2110.06081). The first steps change that scale, and then W_b, which is drawn anew. Without ReLU6 a product's
block also clips its output to [-6, 6] (`qnas.spaces.blocks`), and is the linear one only within.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qnas.nn.mixed_block import IndependentChoice, SharedChoice
from qnas.nn.pretrained.derivation import QUADRATIC, check_fits, own_candidate, own_indices
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.nn.subnet import module_name
from qnas.nn.supernet import Supernet
from qnas.spaces.arch import Arch
from qnas.spaces.lower import HEAD, BlockSpec, skeleton
from qnas.spaces.space import Candidate, SearchSpace

CLASSIFIER = "classifier"
# the roles of a linear mixer -> those of a product's first factor
_FIRST_FACTOR = {"depthwise": "conv_a", "norm2": "norm_a"}
_SECOND_FACTOR = ("conv_b", "norm_b")


@torch.no_grad()
def start_from(supernet: Supernet, network: PretrainedNetwork) -> None:
    """Set a supernet's weights to those of a pretrained network, in place, and note which are from there.

    The classifier is the network's where the numbers of classes are equal, and stays newly drawn otherwise.
    The first product candidates of a position start as linear ones. The architecture parameters favour the
    network's own candidates: each is as probable as all others of its position together. Raises UsageError
    where the supernet's space does not fit the network.
    """
    space = supernet.space
    check_fits(space, network.space)
    state = sorted_channels(network)
    if supernet.family is not None and supernet.family.has_widths:
        several = [stage for stage, row in enumerate(supernet.family.widths) if len(row) > 1]
        state = sorted_widths(network.space, state, several)
    started: list[str] = []
    for part in skeleton(space):
        if isinstance(part, BlockSpec):
            name = module_name(part)
            own = _of(state, name)
            started += _fill(supernet.parts[name], own, f"parts.{name}", skip_other_classes=name == HEAD)
            continue
        name = part.position.name.replace(".", "_")
        own = _of(state, name)
        choice = supernet.parts[name]
        if isinstance(choice, SharedChoice):
            modules = dict(choice.shared.items())
            neurons = {c.kind: _neuron(c) for c in part.position.candidates}
            prefix = f"parts.{name}.shared"
        else:
            assert isinstance(choice, IndependentChoice)
            modules = dict(choice.named_children())
            neurons = {c.name: _neuron(c) for c in part.position.candidates}
            prefix = f"parts.{name}"
        for key, module in modules.items():
            started += _start_block(module, own, neurons[key], f"{prefix}.{key}")
    _favour(supernet, own_indices(space, network.space))
    known = {name for name, _ in supernet.named_parameters()}
    supernet.pretrained = frozenset(known & set(started))


def _favour(supernet: Supernet, own: Sequence[int | None]) -> None:
    """Make the network's own candidates as probable as all others of their positions together."""
    for row, place, position in zip(supernet.alpha, own, supernet.space.positions, strict=True):
        if place is not None and len(position.candidates) > 1:
            row[place] += math.log(len(position.candidates) - 1)


def starting_network(
    network: PretrainedNetwork, space: SearchSpace, arch: Arch, classes: int
) -> nn.Sequential:
    """Return a network of a space as a supernet that starts from a pretrained network has it.

    What is not the network's is drawn by torch's generator. Raises UsageError where the space does not fit.
    """
    supernet = Supernet(space, classes, torch.Generator(), "shared")
    start_from(supernet, network)
    return supernet.subnet(arch, classes)


def _neuron(candidate: Candidate) -> str:
    return str(candidate.parameters.get("neuron", ""))


def _of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of a block, without its name."""
    return {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}


def _start_block(module: nn.Module, own: Mapping[str, Tensor], neuron: str, prefix: str) -> list[str]:
    """Fill the module of a kind of candidates; return the names of the tensors that are from the network."""
    if neuron != QUADRATIC:
        return _fill(module, own, prefix)
    renamed = {}
    for key, tensor in own.items():
        role, _, rest = key.partition(".")
        renamed[f"{_FIRST_FACTOR.get(role, role)}.{rest}"] = tensor
    norm = module.get_submodule("norm_b")
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.zeros_(norm.weight)
    nn.init.ones_(norm.bias)
    return _fill(module, renamed, prefix, besides=_SECOND_FACTOR)


def _fill(
    module: nn.Module,
    own: Mapping[str, Tensor],
    prefix: str,
    *,
    besides: tuple[str, ...] = (),
    skip_other_classes: bool = False,
) -> list[str]:
    """Copy tensors into a module of the same names; return the names that were copied.

    `besides` are submodules that the network lacks.
    """
    filled = []
    for name, tensor in module.state_dict().items():
        role = name.partition(".")[0]
        if role in besides:
            continue
        source = own[name]
        if skip_other_classes and role == CLASSIFIER and source.shape != tensor.shape:
            continue
        tensor.copy_(fitted(source, tensor.shape))
        filled.append(f"{prefix}.{name}")
    return filled


def fitted(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the leading channels of a tensor, and of its kernel the centre, or all of it within zeros.

    >>> fitted(torch.ones(4, 1, 3, 3), torch.Size([2, 1, 5, 5]))[1, 0, 1].tolist()
    [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    for dim, size in enumerate(shape):
        given = tensor.shape[dim]
        if dim < 2 or size <= given:
            assert size <= given, (tensor.shape, shape)
            tensor = tensor.narrow(dim, 0 if dim < 2 else (given - size) // 2, size)
        else:
            ring = (size - given) // 2
            pads = [0, 0] * (tensor.ndim - dim - 1) + [ring, ring]
            tensor = functional.pad(tensor, pads)
    return tensor


def sorted_channels(network: PretrainedNetwork) -> dict[str, Tensor]:
    """Return a network's state with the hidden channels of each block in the order of their importance."""
    state = dict(network.state)
    for position in network.space.positions:
        if own_candidate(network.space, position).sizes["expansion"] == 1:
            continue  # its channels are those of its input
        name = position.name.replace(".", "_")
        order = importance(_of(state, name), network.space.activation).argsort(descending=True, stable=True)
        for key in ("expand", "norm1", "depthwise", "norm2"):
            for full in [full for full in state if full.startswith(f"{name}.{key}.")]:
                if state[full].ndim:  # not the count of batches
                    state[full] = state[full][order]
        state[f"{name}.project.weight"] = state[f"{name}.project.weight"][:, order]
    return state


def sorted_widths(
    space: SearchSpace, state: Mapping[str, Tensor], chosen: Collection[int]
) -> dict[str, Tensor]:
    """Return a network's state with the channels between blocks in the order of their importance.

    `chosen` are the numbers of the stages, from 0, in which they are ordered; the first block of such a stage
    has no shortcut. All blocks of a stage add to the same channels. The importance of one is the sum of its
    absolute weights in the blocks that read it, times the root mean square of the sum that it holds, taken as
    normal with the shifts and scales of the norms that end the blocks.
    """
    found = dict(state)
    names = [module_name(position) for position in space.positions]
    stages = [position.stage for position in space.positions]
    for stage in chosen:
        writers = [name for name, own in zip(names, stages, strict=True) if own == stage]
        after = next((name for name, own in zip(names, stages, strict=True) if own > stage), HEAD)
        readers = [*writers[1:], after]
        mean = sum(found[f"{name}.norm3.bias"] for name in writers)
        variance = sum(found[f"{name}.norm3.weight"].square() for name in writers)
        assert isinstance(mean, Tensor)
        weights = sum(_read(found, name).abs().sum((0, 2, 3)) for name in readers)
        order = (weights * (mean.square() + variance).sqrt()).argsort(descending=True, stable=True)
        for name in writers:
            found[f"{name}.project.weight"] = found[f"{name}.project.weight"][order]
            for key in [key for key in found if key.startswith(f"{name}.norm3.") and found[key].ndim]:
                found[key] = found[key][order]
        for name in readers:
            if (key := f"{name}.expand.weight") in found:
                found[key] = found[key][:, order]
                continue
            # without an expansion, the depthwise convolution and its norm are of these channels
            for key in [key for key in found if key.startswith((f"{name}.depthwise.", f"{name}.norm2."))]:
                found[key] = found[key][order] if found[key].ndim else found[key]
            found[f"{name}.project.weight"] = found[f"{name}.project.weight"][:, order]
    return found


def _read(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the weights by which a block reads its input, with its channels second."""
    if (key := f"{name}.expand.weight") in state:
        return state[key]
    return state[f"{name}.depthwise.weight"].transpose(0, 1)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hswish": functional.hardswish,
    "gelu": functional.gelu,
}


def importance(block: Mapping[str, Tensor], activation: str) -> Tensor:
    """Return how much each hidden channel of a block matters for its output: (hidden,).

    It is the sum of the channel's absolute weights in the projection, as in Once-for-All (arXiv 1908.09791),
    times the root mean square of what the channel sends there. That follows from the norm before it without
    any image: its outputs are taken as normal, with the norm's shift as mean and its scale as deviation.
    """
    weights = block["project.weight"].abs().sum((0, 2, 3))
    mean, deviation = block["norm2.bias"][:, None], block["norm2.weight"][:, None]
    places = torch.linspace(-4, 4, 81)
    density = torch.exp(-places.square() / 2)
    sent = _ACTIVATIONS[activation](mean + deviation * places)  # (hidden, places)
    return weights * (sent.square() @ (density / density.sum())).sqrt()
