"""A search space, read from a YAML file or made in Python, as a frozen value.

A network is a stem, stages of positions with a transition before each, and a head. Every position is filled
by one of its candidates; a fixed network is a space with one candidate per position. Latencies are for the
space's own `input.resolution_px` and `head.classes`, whatever the training images are.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_serializer, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from qnas.common.arguments import check_arguments
from qnas.common.documents import FilePart, describe_problems, read_mapping, to_tuples
from qnas.common.errors import SpaceError, nearest, one_line
from qnas.common.resources import read_named, stems
from qnas.spaces.blocks import BLOCKS, Block, Value
from qnas.spaces.layer import NORMS
from qnas.spaces.neurons import SPACES_OWN

SCHEMA = "qnas.space/1"

# What `search` can bear: with 10,000 candidates in all, the exact solver takes seconds and half a gigabyte.
# The largest shipped space has 22 positions, and 655 candidates in all.
MOST_CANDIDATES = 64  # of a position
MOST_STAGES = 100
MOST_POSITIONS = 1_000
MOST_IN_ALL = 10_000  # candidates of all positions together
# the name of a space at one resolution of its family
AT_RESOLUTION = re.compile("(?P<name>.+)-(?P<px>[1-9][0-9]{0,3})px")
FEWEST_CLASSES, MOST_CLASSES = 2, 1_000_000
# keys that the first files did not have, with their defaults: only other values are part of a digest
LATER_KEYS = {"padding": "symmetric", "norm_eps": None}
LATER_INPUT_KEYS = {"mean": None, "std": None}

Channels = Annotated[int, Field(ge=1, le=16384)]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(ge=1e-3, le=10)]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel


class Candidate(FilePart):
    """A block that a position may hold, with all its parameters.

    Its arguments are the keys of the file, `Candidate(block="quadra", kernel=3, expansion=2)`.
    """

    block: str
    parameters: dict[str, Value]

    if TYPE_CHECKING:

        def __init__(self, *, block: str, **parameters: Value) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        given = {name: value for name, value in content.items() if name != "block"}
        if "block" not in content:
            return {"parameters": {}}  # pydantic reports the missing key
        block = _block_of(content)
        if block is None:
            known = nearest(str(content["block"]), BLOCKS)
            message = f"unknown block ({known}, or one that a `plugin` registers first)"
            problem = _problem(("block",), message, content["block"])
            raise ValidationError.from_exception_data("Candidate", [problem])
        problems = [
            _problem((name,) if name else (), message, given[name] if name else content)
            for name, message in block.check(given)
        ]
        if problems:
            raise ValidationError.from_exception_data("Candidate", problems)
        return {"block": block.name, "parameters": block.complete(given)}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        # without defaults, so that a space keeps its digest when one of its blocks gets a new parameter
        defaults = {p.name: p.default for p in BLOCKS[self.block].parameters}
        given = {name: value for name, value in self.parameters.items() if value != defaults[name]}
        return {"block": self.block, **given}

    def __hash__(self) -> int:
        return hash((self.block, *self.parameters.items()))

    @property
    def kind(self) -> str:
        """The name of the candidates that may share weights with this one, as `Block.kind`."""
        return BLOCKS[self.block].kind(self.parameters)

    @property
    def name(self) -> str:
        """The name in architectures and tables, such as `quadra_k7_e4` or `quadra_k7_e4_linear`."""
        return BLOCKS[self.block].candidate_name(self.parameters)

    @property
    def sizes(self) -> dict[str, int]:
        """The parameters that are numbers, such as kernel and expansion."""
        return {name: value for name, value in self.parameters.items() if isinstance(value, int)}

    @property
    def with_spaces_norm(self) -> "Candidate":
        """The same candidate without a layer or batch normalisation of its own."""
        own = {"norm": SPACES_OWN} if self.parameters.get("norm") in NORMS else {}
        return Candidate(block=self.block, **{**self.parameters, **own})

    def is_within(self, other: "Candidate") -> bool:
        """Return whether the other is of the same kind and no smaller in anything."""
        return self.kind == other.kind and all(v <= other.sizes[name] for name, v in self.sizes.items())


def _problem(key: tuple[str, ...], message: str, value: Any) -> InitErrorDetails:
    # the message is passed as a value, since pydantic would fill in braces in it
    return InitErrorDetails(
        type=PydanticCustomError("value_error", "{message}", {"message": message}), loc=key, input=value
    )


def _block_of(content: Any) -> Block | None:
    """Return the kind of block of a candidate's entry, None where it is unknown."""
    name = content.get("block") if isinstance(content, dict) else None
    return BLOCKS.get(name) if isinstance(name, str) else None


def _expand_candidates(entries: Any) -> Any:
    """Expand lists: `{kernel: [3, 5], expansion: [2, 4]}` stands for four candidates.

    Candidates of one kind stay together, in the order of the block's parameters. They are counted before
    they are expanded.
    """
    if not isinstance(entries, list | tuple):
        return entries
    lists = [(entry, _listed(entry)) for entry in entries[: MOST_CANDIDATES + 1]]
    count = sum(math.prod(len(entry[name]) for name in listed) for entry, listed in lists)
    if (count := count + max(0, len(entries) - len(lists))) > MOST_CANDIDATES:
        raise PydanticKnownError(
            "too_long", {"field_type": "List", "max_length": MOST_CANDIDATES, "actual_length": count}
        )
    expanded: list[Any] = []
    for entry, listed in lists:
        for values in product(*(entry[name] for name in listed)):
            expanded.append({**entry, **dict(zip(listed, values, strict=True))} if listed else entry)
    return tuple(expanded)


def _listed(entry: Any) -> list[str]:
    """Return the parameters of a candidate's entry that are lists, words first."""
    block = _block_of(entry)
    ordered = sorted(block.parameters, key=lambda p: not p.is_word) if block is not None else []
    return [p.name for p in ordered if isinstance(entry.get(p.name), list | tuple)]


Candidates = Annotated[tuple[Candidate, ...], BeforeValidator(_expand_candidates), Field(min_length=1)]


class Input(FilePart):
    """The deployed network's input. `mean` and `std` normalise it in place of the data's own statistics.

    Both are on a scale where the byte 255 is 1, a value for each channel.
    """

    channels: Annotated[int, Field(ge=1, le=16)] = 3
    resolution_px: Annotated[int, Field(ge=1, le=4096)]
    mean: Annotated[tuple[Mean, ...], BeforeValidator(to_tuples)] | None = None
    std: Annotated[tuple[Std, ...], BeforeValidator(to_tuples)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = [len(given) for given in (self.mean, self.std) if given is not None]
        if counts and counts != [self.channels, self.channels]:
            raise ValueError(
                f"mean and std: expected both with a value for each of {self.channels} channels, got "
                f"{len(self.mean or ())} and {len(self.std or ())}"
            )
        return self

    @property
    def normalisation(self) -> Normalisation | None:
        """Mean and std of each channel, None where they are the data's own."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)


class Stem(FilePart):
    """The first convolution. A kernel equal to the stride cuts the image into patches."""

    channels: Channels
    kernel: Annotated[int, Field(ge=1, le=31)]
    stride: Annotated[int, Field(ge=1, le=8)]
    activation: bool = False


class Stage(FilePart):
    """Positions of one width. `stride` is that of the transition before the first position."""

    channels: Channels
    positions: Annotated[int, Field(ge=1, le=100)]
    stride: Annotated[int, Field(ge=1, le=4)]
    candidates: Candidates | None = None  # instead of the space's own


class Head(FilePart):
    """Pooling and classifier, after a pointwise convolution to `channels` where that is given."""

    classes: Annotated[int, Field(ge=FEWEST_CLASSES, le=MOST_CLASSES)]
    channels: Channels | None = None


@dataclass(frozen=True)
class Position:
    """A position, filled by one candidate. `name` is the stage and the position in it, counted from 1."""

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
        """The names of the candidates, in order."""
        return tuple(c.name for c in self.candidates)

    def candidate(self, name: str) -> Candidate:
        """Return the candidate of that name."""
        return self.candidates[self.names.index(name)]


class SearchSpace(FilePart):
    """A checked search space. Two spaces with the same digest have the same networks."""

    file_schema: Literal["qnas.space/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    source: str
    input: Input
    norm: Literal["layernorm", "batchnorm"]
    activation: Literal["gelu", "relu", "relu6", "hswish"]
    # of convolutions with a stride: half the kernel on each side, or TensorFlow's SAME (layer.same_pads)
    padding: Literal["symmetric", "same"] = "symmetric"
    norm_eps: Annotated[float, Field(gt=0, le=0.1)] | None = None  # None: that of `qnas.nn.blocks`
    stem: Stem
    # conv: a convolution and a norm between stages; block: the first block of a stage changes the shape
    transition: Literal["conv", "block"]
    candidates: Candidates
    stages: Annotated[
        tuple[Stage, ...], BeforeValidator(to_tuples), Field(min_length=1, max_length=MOST_STAGES)
    ]
    head: Head

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problem := self._size_problem():  # before the positions are made
            raise ValueError(problem)
        problems = []
        if self.stem.kernel % 2 == 0 and self.stem.kernel != self.stem.stride:
            problems.append(f"stem.kernel: expected an odd number or the stride, got {self.stem.kernel}")
        # at larger strides a kernel may equal the stride, and the kernels' outputs differ in size
        problems += [
            f"stages[{i}].stride: expected at most 2 with transition: block, got {stage.stride}"
            for i, stage in enumerate(self.stages)
            if self.transition == "block" and stage.stride > 2
        ]
        lists = {"candidates": self.candidates}
        lists |= {f"stages[{i}].candidates": s.candidates for i, s in enumerate(self.stages) if s.candidates}
        for where, candidates in lists.items():
            names = [c.name for c in candidates]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                problems.append(f"{where}: listed twice: {', '.join(twice)}")
            problems += [f"{where}: {problem}" for problem in self._equal(candidates)]
            problems += [
                f"{where}: {c.block} needs norm: batchnorm, got {self.norm}"
                for c in candidates
                if BLOCKS[c.block].needs_batchnorm and self.settle(c).get("norm", self.norm) != "batchnorm"
            ]
        problems += [
            f"position {p.name}: no candidate can go from {p.c_in} to {p.c_out} channels at stride {p.stride}"
            for p in self.positions
            if not p.candidates
        ]
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return self

    def settle(self, candidate: Candidate) -> dict[str, Value]:
        """Return a candidate's parameters with the space's norm and activation where it has no own."""
        return BLOCKS[candidate.block].settle(candidate.parameters, self.norm, self.activation)

    def _equal(self, candidates: Sequence[Candidate]) -> list[str]:
        """Return which candidates have other names and are the same block, by the space's own words."""
        first: dict[tuple[object, ...], str] = {}
        problems = []
        for c in candidates:
            known = first.setdefault((c.block, *self.settle(c).items()), c.name)
            if known != c.name:
                problems.append(
                    f"{known} and {c.name} are the same block, as the space has norm: {self.norm} and "
                    f"activation: {self.activation}"
                )
        return problems

    def _size_problem(self) -> str:
        """Return what is too much for a search, "" where nothing is."""
        positions = sum(stage.positions for stage in self.stages)
        if positions > MOST_POSITIONS:
            return f"stages: expected at most {MOST_POSITIONS:,} positions together, got {positions:,}"
        in_all = sum(stage.positions * len(stage.candidates or self.candidates) for stage in self.stages)
        if in_all > MOST_IN_ALL:
            return f"expected at most {MOST_IN_ALL:,} candidates in all positions together, got {in_all:,}"
        return ""

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        """All positions in order. Where the shape changes, candidates that keep it are left out."""
        found = []
        channels = self.stem.channels
        for i, stage in enumerate(self.stages):
            for j in range(stage.positions):
                changes = j == 0 and self.transition == "block"
                c_in, stride = (channels, stage.stride) if changes else (stage.channels, 1)
                candidates = stage.candidates or self.candidates
                position = Position(f"{i + 1}.{j + 1}", i, c_in, stage.channels, stride, candidates)
                if not position.keeps_shape:
                    able = tuple(c for c in candidates if not BLOCKS[c.block].keeps_shape)
                    position = replace(position, candidates=able)
                found.append(position)
            channels = stage.channels
        return tuple(found)

    @property
    def is_fixed(self) -> bool:
        """Whether there is only one network."""
        return all(len(p.candidates) == 1 for p in self.positions)

    @cached_property
    def digest(self) -> str:
        """The identity of the space's networks, independent of its comments and its source."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"source"})
        for part in (content, *content["stages"]):
            for candidate in part["candidates"] or ():
                if candidate["block"] == "identity":  # digests date from when every block had these
                    candidate |= {"kernel": 1, "expansion": 1}
        for part, later in ((content, LATER_KEYS), (content["input"], LATER_INPUT_KEYS)):
            for key, default in later.items():
                if part[key] == default:
                    del part[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def with_norm(self, norm: Literal["layernorm", "batchnorm"]) -> "SearchSpace":
        """Return the same space with another norm, which is that of all candidates but those without any."""
        content = self.written() | {"norm": norm}
        content["candidates"] = _with_spaces_norm(self.candidates)
        for part, stage in zip(content["stages"], self.stages, strict=True):
            if stage.candidates:
                part["candidates"] = _with_spaces_norm(stage.candidates)
        return SearchSpace.model_validate(content)

    def with_resolution(self, resolution_px: int) -> "SearchSpace":
        """Return the same space for images of another size: with the same weights and other latencies."""
        content = self.written()
        content["input"]["resolution_px"] = resolution_px
        return SearchSpace.model_validate(content)

    def with_classes(self, classes: int) -> "SearchSpace":
        """Return the same space for another number of classes."""
        content = self.written()
        content["head"]["classes"] = classes
        return SearchSpace.model_validate(content)

    def to_yaml(self) -> str:
        """Return the space as text that `parse_space` reads back to an equal value."""
        return str(yaml.safe_dump(self.written(), sort_keys=False, allow_unicode=True))

    def written(self) -> dict[str, Any]:
        """Return the content of the space's file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _with_spaces_norm(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return candidates without layer or batch norms of their own, each once."""
    return tuple(dict.fromkeys(candidate.with_spaces_norm for candidate in candidates))


def make_space(
    name: str,
    *,
    input: Mapping[str, Any],
    norm: str,
    activation: str,
    stem: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    head: Mapping[str, Any],
    transition: str = "conv",
    padding: str = "symmetric",
    norm_eps: float | None = None,
    source: str = "made in Python",
) -> SearchSpace:
    """Make a space in Python: the arguments are the keys of a YAML file, and lists stand for combinations.

    Raises SpaceError with every problem in one line.

    >>> space = make_space(
    ...     "tiny",
    ...     input={"channels": 3, "resolution_px": 32},
    ...     norm="layernorm",
    ...     activation="gelu",
    ...     stem={"channels": 8, "kernel": 2, "stride": 2},
    ...     candidates=[{"block": "quadra", "kernel": [3, 5], "expansion": 2}, {"block": "identity"}],
    ...     stages=[{"channels": 8, "positions": 2, "stride": 1}],
    ...     head={"classes": 10},
    ... )
    >>> space.positions[0].names
    ('quadra_k3_e2', 'quadra_k5_e2', 'identity')
    """
    given = {key: value for key, value in locals().items() if LATER_KEYS.get(key, ...) != value}
    return check_space({"schema": SCHEMA, **given}, f"space {one_line(name, 40)}")


def check_space(content: Mapping[str, Any], where: str) -> SearchSpace:
    """Return the space of a file's content. Raises SpaceError as `parse_space`."""
    try:
        return SearchSpace.model_validate(content)
    except ValidationError as error:
        raise SpaceError(f"{where}: {describe_problems(error, SearchSpace)}") from error


def parse_space(text: str, where: str) -> SearchSpace:
    """Read a space from YAML text; `where` names it in messages.

    Raises SpaceError with every problem in one line; problems between keys once each key is valid.
    """
    content = read_mapping(text, where, SCHEMA, SpaceError)
    if listed := listed_choices(content):
        key, values = listed[0]
        raise SpaceError(
            f"{where}: {key}: {len(values)} values, which make a family of spaces: expected one value here; "
            "a search takes them all"
        )
    return check_space(content, where)


def listed_choices(content: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """Return the keys of a file's content whose lists make a family of spaces, with these lists."""
    part, stages = content.get("input"), content.get("stages")
    found = [("input.resolution_px", part.get("resolution_px"))] if isinstance(part, dict) else []
    for i, stage in enumerate(stages if isinstance(stages, list) else ()):
        found += [(f"stages[{i}].channels", stage.get("channels"))] if isinstance(stage, dict) else []
    return [(key, values) for key, values in found if isinstance(values, list)]


def load_space(name_or_path: str | Path) -> SearchSpace:
    """Load a shipped space by name, or your own by the path of its YAML file.

    A shipped space at another input resolution has the name of both: `union-mobile-160px`. Raises SpaceError
    when there is none, or when it is broken.

    >>> space = load_space("quadranet-small")
    >>> len(space.positions), space.positions[0].names[:2]
    (10, ('quadra_k3_e2', 'quadra_k3_e4'))
    """
    check_arguments(space=name_or_path)
    if (space := load_at_resolution(name_or_path)) is not None:
        return space
    return parse_space(*read_named("search_spaces", name_or_path, "search space", SpaceError))


def load_at_resolution(name: str | Path) -> SearchSpace | None:
    """Return a shipped space at the resolution that its name ends with; None for another name."""
    shipped, at = stems("search_spaces", ".yaml"), AT_RESOLUTION.fullmatch(str(name))
    if at is None or at["name"] not in shipped or at[0] in shipped:
        return None
    content = load_space(at["name"]).written()
    own = {"name": at[0], "input": content["input"] | {"resolution_px": int(at["px"])}}
    return check_space(content | own, f"search space {at[0]}")
