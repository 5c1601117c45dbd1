"""A search space: a YAML file as a frozen value.

A network is a stem, stages of positions with a transition before each, and a head. Every position
is filled by one of its candidates; a fixed network is a space with one candidate a position. The
latency of a space is that of its own `input.resolution_px` and `head.classes`, whatever it is
trained on.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qnas.common.documents import describe_problems, read_mapping
from qnas.common.errors import SpaceError, nearest
from qnas.common.resources import read_named

SCHEMA = "qnas.space/1"


class BlockKind(NamedTuple):
    """What a space must know of a kind of block; `lower.BLOCKS` says what it consists of."""

    keeps_shape: bool  # cannot change channels or resolution
    needs_batchnorm: bool  # is defined with batch normalisation only


# The neuron of a QuadraBlock's mixer; `lower.MIXERS` says what it consists of, `neurons.NEURONS` what
# it computes.
Neuron = Literal["quadranet", "linear", "type2", "type3", "type4", "fan", "compact"]
NEURONS: tuple[Neuron, ...] = get_args(Neuron)
DEFAULT_NEURON: Neuron = "quadranet"


BLOCK_KINDS: dict[str, BlockKind] = {
    "quadra": BlockKind(keeps_shape=True, needs_batchnorm=False),
    "mbconv": BlockKind(keeps_shape=False, needs_batchnorm=True),
    "identity": BlockKind(keeps_shape=True, needs_batchnorm=False),
}


def block_kind(block: str, neuron: Neuron = DEFAULT_NEURON) -> str:
    """Name a block with its neuron, where that is not QuadraNet's.

    >>> block_kind("quadra"), block_kind("quadra", "fan"), block_kind("mbconv")
    ('quadra', 'quadra_fan', 'mbconv')
    """
    return block if neuron == DEFAULT_NEURON else f"{block}_{neuron}"


class _Node(BaseModel):
    """A part of the file: frozen, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("expected an odd number")
    return kernel


def _known_block(block: str) -> str:
    if block not in BLOCK_KINDS:
        raise ValueError(f"unknown block ({nearest(block, BLOCK_KINDS)})")
    return block


OddKernel = Annotated[int, Field(ge=1, le=31), AfterValidator(_odd)]
Channels = Annotated[int, Field(ge=1, le=16384)]


class Candidate(_Node):
    """A block that a position may hold."""

    block: Annotated[str, AfterValidator(_known_block)]
    kernel: OddKernel = 1
    expansion: Annotated[int, Field(ge=1, le=16)] = 1
    neuron: Neuron = DEFAULT_NEURON  # of block quadra

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.model_fields_set - {"block"}
        if self.block == "identity" and given:
            raise ValueError(f"identity takes no {' or '.join(sorted(given))}")
        if "neuron" in given and self.block != "quadra":
            raise ValueError(f"{self.block} takes no neuron")
        missing = sorted({"kernel", "expansion"} - given)
        if self.block != "identity" and missing:
            raise ValueError(f"{self.block} needs {' and '.join(missing)}")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # spaces are known by the digest of this: those from before there were neurons must keep theirs
        fields: dict[str, Any] = content(self)
        if self.neuron == DEFAULT_NEURON:
            fields.pop("neuron", None)
        return fields

    @property
    def kind(self) -> str:
        """The block with its neuron, as `block_kind`."""
        return block_kind(self.block, self.neuron)

    @property
    def name(self) -> str:
        """The name in architectures and tables, such as `quadra_k7_e4` or `quadra_k7_e4_linear`."""
        if self.block == "identity":
            return self.block
        return block_kind(f"{self.block}_k{self.kernel}_e{self.expansion}", self.neuron)


def _expand_candidates(entries: Any) -> Any:
    """Write out lists: `{kernel: [3, 5], expansion: [2, 4]}` stands for four candidates.

    Those of one neuron come together, in the order of their kernels.
    """
    if not isinstance(entries, list):
        return entries
    expanded: list[Any] = []
    for entry in entries:
        listed = (
            [k for k in ("neuron", "kernel", "expansion") if isinstance(entry.get(k), list)]
            if isinstance(entry, dict)
            else []
        )
        for values in product(*(entry[k] for k in listed)):
            expanded.append({**entry, **dict(zip(listed, values, strict=True))} if listed else entry)
    return tuple(expanded)


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Candidates = Annotated[
    tuple[Candidate, ...], BeforeValidator(_expand_candidates), Field(min_length=1, max_length=64)
]


class Input(_Node):
    """The deployed network's input."""

    channels: Annotated[int, Field(ge=1, le=16)] = 3
    resolution_px: Annotated[int, Field(ge=1, le=4096)]


class Stem(_Node):
    """The first convolution. A kernel equal to the stride cuts the image into patches."""

    channels: Channels
    kernel: Annotated[int, Field(ge=1, le=31)]
    stride: Annotated[int, Field(ge=1, le=8)]
    activation: bool = False


class Stage(_Node):
    """Positions of one width. `stride` is that of the transition before the first position."""

    channels: Channels
    positions: Annotated[int, Field(ge=1, le=100)]
    stride: Annotated[int, Field(ge=1, le=4)]
    candidates: Candidates | None = None  # instead of the space's own


class Head(_Node):
    """Pooling and classifier, after a pointwise convolution to `channels` where that is given."""

    classes: Annotated[int, Field(ge=2)]
    channels: Channels | None = None


@dataclass(frozen=True)
class Position:
    """A place that one candidate fills. `name` is stage and place in it, counted from 1."""

    name: str
    stage: int
    c_in: int
    c_out: int
    stride: int
    candidates: tuple[Candidate, ...]

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have the same shape, so that identity is possible."""
        return self.c_in == self.c_out and self.stride == 1

    @property
    def names(self) -> tuple[str, ...]:
        """Candidates by name, in order."""
        return tuple(c.name for c in self.candidates)

    def candidate(self, name: str) -> Candidate:
        """Return the candidate of that name."""
        return self.candidates[self.names.index(name)]


class SearchSpace(_Node):
    """A checked search space. Two spaces with one digest have the same networks."""

    file_schema: Literal["qnas.space/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    source: str
    input: Input
    norm: Literal["layernorm", "batchnorm"]
    activation: Literal["gelu", "relu", "relu6", "hswish"]
    stem: Stem
    # conv: a normed convolution between stages; block: the first block of a stage makes the change
    transition: Literal["conv", "block"]
    candidates: Candidates
    stages: Annotated[tuple[Stage, ...], BeforeValidator(_to_tuple), Field(min_length=1)]
    head: Head

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.stem.kernel % 2 == 0 and self.stem.kernel != self.stem.stride:
            problems.append(f"stem.kernel: expected an odd number or the stride, got {self.stem.kernel}")
        if self.transition == "block":
            # at larger strides a kernel may equal the stride, and the kernels' outputs differ in size
            problems += [
                f"stages[{i}].stride: expected at most 2 with transition: block, got {stage.stride}"
                for i, stage in enumerate(self.stages)
                if stage.stride > 2
            ]
        for where, candidates in self._candidate_lists():
            names = [c.name for c in candidates]
            if len(set(names)) < len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                problems.append(f"{where}: listed twice: {', '.join(twice)}")
            problems += [
                f"{where}: {c.block} needs norm: batchnorm, got {self.norm}"
                for c in candidates
                if BLOCK_KINDS[c.block].needs_batchnorm and self.norm != "batchnorm"
            ]
        problems += [
            f"position {p.name}: no candidate can go from {p.c_in} to {p.c_out} channels at stride {p.stride}"
            for p in self.positions
            if not p.candidates
        ]
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return self

    def _candidate_lists(self) -> Iterator[tuple[str, tuple[Candidate, ...]]]:
        yield "candidates", self.candidates
        for i, stage in enumerate(self.stages):
            if stage.candidates is not None:
                yield f"stages[{i}].candidates", stage.candidates

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        """All positions in order. Where the shape changes, candidates that keep it are left out."""
        found = []
        channels = self.stem.channels
        for i, stage in enumerate(self.stages):
            for j in range(stage.positions):
                first = j == 0 and self.transition == "block"
                position = Position(
                    name=f"{i + 1}.{j + 1}",
                    stage=i,
                    c_in=channels if first else stage.channels,
                    c_out=stage.channels,
                    stride=stage.stride if first else 1,
                    candidates=stage.candidates or self.candidates,
                )
                if not position.keeps_shape:
                    able = (c for c in position.candidates if not BLOCK_KINDS[c.block].keeps_shape)
                    position = Position(**{**vars(position), "candidates": tuple(able)})
                found.append(position)
            channels = stage.channels
        return tuple(found)

    @property
    def is_fixed(self) -> bool:
        """Whether there is only one network."""
        return all(len(p.candidates) == 1 for p in self.positions)

    @cached_property
    def digest(self) -> str:
        """Identify the networks of the space, whatever its comments and its source say."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"source"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_norm(self, norm: Literal["layernorm", "batchnorm"]) -> "SearchSpace":
        """Return the same space with another norm."""
        content = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return SearchSpace.model_validate({**content, "norm": norm})

    def with_resolution(self, resolution_px: int) -> "SearchSpace":
        """Return the same space for images of another size: with the same weights, other latencies."""
        content = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        shown = {**content["input"], "resolution_px": resolution_px}
        return SearchSpace.model_validate({**content, "input": shown})

    def to_yaml(self) -> str:
        """Return the space as text that `parse_space` reads back to an equal value."""
        content = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def parse_space(text: str, where: str) -> SearchSpace:
    """Read a space from YAML text; `where` names it in messages.

    Raises SpaceError with every problem of the file in one line; those between keys follow once each
    key is right by itself.
    """
    content = read_mapping(text, where, SCHEMA, SpaceError)
    try:
        return SearchSpace.model_validate(content)
    except ValidationError as error:
        raise SpaceError(f"{where}: {describe_problems(error, SearchSpace)}") from error


def load_space(name_or_path: str | Path) -> SearchSpace:
    """Load a shipped space by name, or one's own by the path of its YAML file.

    Raises SpaceError when there is none, or when it is broken.
    """
    return parse_space(*read_named("search_spaces", name_or_path, "search space", SpaceError))
