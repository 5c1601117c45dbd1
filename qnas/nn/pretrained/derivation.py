"""A network of inverted residuals as a space with one candidate a position, and the space around it.

The derived space keeps the network's stem, widths, strides and head. A position may have a smaller or larger
kernel, fewer hidden channels, or nothing at all where the shape stays; with quadratic candidates, also a
product of two depthwise convolutions. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qnas.common.errors import UsageError, abbreviate
from qnas.spaces.arch import Arch
from qnas.spaces.space import Candidate, Position, SearchSpace, make_space

BLOCK = "mbconv"
KERNELS = (3, 5, 7)  # of a derived space, besides the network's own
EXPANSIONS = (2, 3, 4, 6)  # likewise, up to the network's own
QUADRATIC = "factored"  # a product of two depthwise convolutions that contains a linear one


@dataclass(frozen=True)
class Residual:
    """An inverted residual of a network, as `mbconv` has it."""

    channels: int
    stride: int
    kernel: int
    expansion: int


def fixed_space(name: str, blocks: Sequence[Residual], **properties: Any) -> SearchSpace:
    """Return a network as a space with one candidate a position.

    `properties` are the other arguments of `make_space`. Blocks of one width that differ in anything but the
    stride of the first are stages of their own, since the candidates are those of a stage.
    """
    stages: list[dict[str, Any]] = []
    for block in blocks:
        candidates = [{"block": BLOCK, "kernel": block.kernel, "expansion": block.expansion}]
        last = stages[-1] if stages else None
        if (
            last is not None
            and block.stride == 1
            and (last["channels"], last["candidates"]) == (block.channels, candidates)
        ):
            last["positions"] += 1
        else:
            stage = {"channels": block.channels, "positions": 1, "stride": block.stride}
            stages.append(stage | {"candidates": candidates})
    candidates = stages[-1]["candidates"]
    return make_space(
        name, norm="batchnorm", transition="block", candidates=candidates, stages=stages, **properties
    )


def derived_space(network: SearchSpace, *, quadratic: bool = False) -> SearchSpace:
    """Return the space around a network that `fixed_space` made.

    Every position takes the kernels KERNELS and that of the network, and the expansions EXPANSIONS up to that
    of the network; an expansion of one has no convolution that could be cut. Where the shape stays, a block
    can be left out. `quadratic` adds the same candidates as products. The largest network of the space
    contains the given one.
    """
    lists = []
    for i, stage in enumerate(network.stages):
        (own,) = stage.candidates or network.candidates
        kernels, most = sorted({*KERNELS, own.sizes["kernel"]}), own.sizes["expansion"]
        expansions = [e for e in EXPANSIONS if e < most] if most > 1 else []
        neuron = {"neuron": ["linear", QUADRATIC]} if quadratic else {}
        made: list[dict[str, Any]] = [
            {"block": BLOCK, **neuron, "kernel": kernels, "expansion": [*expansions, most]}
        ]
        if most > 1 or any(p.keeps_shape for p in network.positions if p.stage == i):
            made.append({"block": "identity"})
        lists.append(made)
    common = max(lists, key=lists.count)
    content = network.model_dump(mode="json", by_alias=True, exclude_unset=True)
    content["candidates"] = common
    for stage, own_list in zip(content["stages"], lists, strict=True):
        del stage["candidates"]
        if own_list != common:
            stage["candidates"] = own_list
    content["name"] += "-quadratic" if quadratic else ""
    return SearchSpace.model_validate(content)


def check_fits(space: SearchSpace, network: SearchSpace) -> None:
    """Raise UsageError, with all problems in one line, where a space cannot start from a network's weights.

    It needs the network's stem, widths, strides, head and conventions, at most its positions in each stage,
    and candidates whose weights are slices of the network's, as those of `derived_space` are.
    """
    problems = []
    for key in ("norm", "activation", "padding", "norm_eps", "stem", "transition"):
        found, wanted = getattr(space, key), getattr(network, key)
        if found != wanted:
            problems.append(f"{key}: expected {_shown(wanted)}, got {_shown(found)}")
    for key in ("channels", "mean", "std"):
        found, wanted = getattr(space.input, key), getattr(network.input, key)
        if found != wanted:
            problems.append(f"input.{key}: expected {_shown(wanted)}, got {_shown(found)}")
    if space.head.channels != network.head.channels:
        problems.append(f"head.channels: expected {network.head.channels}, got {space.head.channels}")
    if len(space.stages) != len(network.stages):
        problems.append(f"stages: expected {len(network.stages)}, got {len(space.stages)}")
    for i, (stage, wanted) in enumerate(zip(space.stages, network.stages, strict=False)):
        if (stage.channels, stage.stride) != (wanted.channels, wanted.stride):
            problems.append(
                f"stages[{i}]: expected {wanted.channels} channels at stride {wanted.stride}, got "
                f"{stage.channels} at {stage.stride}"
            )
        if stage.positions > wanted.positions:
            problems.append(
                f"stages[{i}].positions: expected at most {wanted.positions}, got {stage.positions}"
            )
    if not problems:
        for position in space.positions:
            own = own_candidate(network, position)
            unfit = [c.name for c in position.candidates if not _can_start(c, own)]
            if unfit:
                problems.append(f"position {position.name}: {', '.join(unfit)} cannot start from {own.name}")
    if problems:
        raise UsageError(f"space {space.name} does not fit {network.name}: {abbreviate(problems, '; ')}")


def _shown(value: Any) -> str:
    return str(value.model_dump(exclude_unset=True)) if hasattr(value, "model_dump") else str(value)


def own_candidate(network: SearchSpace, position: Position) -> Candidate:
    """Return what a network has at a position of a space that fits it."""
    (found,) = next(p for p in network.positions if p.name == position.name).candidates
    return found


def _can_start(candidate: Candidate, own: Candidate) -> bool:
    if candidate.block != BLOCK:
        return candidate.block == "identity"
    return (
        all(candidate.parameters[name] == own.parameters[name] for name in ("attention", "act"))
        and candidate.sizes["expansion"] <= own.sizes["expansion"]
        # an expansion of one has no convolution before its mixer
        and (candidate.sizes["expansion"] == 1) == (own.sizes["expansion"] == 1)
    )


def own_choices(space: SearchSpace, network: SearchSpace) -> tuple[str, ...]:
    """Return the network's candidate at each position of a space that fits it, whether it is one there."""
    return tuple(own_candidate(network, position).name for position in space.positions)


def own_indices(space: SearchSpace, network: SearchSpace) -> tuple[int | None, ...]:
    """Return the place of the network's candidate at each position; None where it is not a choice there."""
    choices = zip(space.positions, own_choices(space, network), strict=True)
    return tuple(p.names.index(name) if name in p.names else None for p, name in choices)


def own_arch(space: SearchSpace, network: SearchSpace) -> Arch:
    """Return the network as one of a space that fits it. Raises UsageError where the space lacks it."""
    choices = own_choices(space, network)
    lacking = [p.name for p, c in zip(space.positions, choices, strict=True) if c not in p.names]
    if lacking or len(space.positions) != len(network.positions):
        which = f"position{'s' * (len(lacking) > 1)} {', '.join(lacking)}" if lacking else "all its positions"
        raise UsageError(f"space {space.name} does not contain {network.name} itself: it lacks {which}")
    return Arch(choices)
