"""Frozen models of settings: read from YAML, checked as a whole, and the source of command-line options.

Nothing here imports torch, so that the command line can build its help from these models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from qnas.common.documents import FilePart, describe_problems, read_mapping
from qnas.common.errors import UsageError
from qnas.common.resources import read_named

TorchDevice = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LossName = Literal["cross-entropy", "balanced", "focal"]
MetricName = Literal["accuracy", "balanced-accuracy"]
ClassWeights = Literal["none", "balanced"]
Sampler = Literal["shuffled", "balanced"]


def _scientific(value: Any) -> Any:
    """Read `4e-3` as a number: YAML 1.1 reads it as text, because it has no decimal point."""
    try:
        return float(value) if isinstance(value, str) and "e" in value.lower() else value
    except ValueError:
        return value


# bounds that no training reaches, so that products of settings stay finite
Number = Annotated[float, BeforeValidator(_scientific), Field(ge=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_scientific), Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Natural = Annotated[int, Field(ge=0, le=1_000_000)]

# fields that a search and the training of a single network share
TorchDeviceField = Annotated[
    TorchDevice, Field(description="Where to train: auto takes a GPU if there is one.")
]
PrecisionField = Annotated[
    Precision, Field(description="Number format of products: auto is bf16 on a GPU and fp32 on a CPU.")
]
CompileField = Annotated[bool, Field(description="Compile blocks with torch.compile; slower on CPUs.")]
ThreadsField = Annotated[
    Annotated[int, Field(ge=0, le=1024)], Field(description="CPU threads of torch; 0 takes all cores.")
]
SeedField = Annotated[Annotated[int, Field(ge=0, lt=2**63)], Field(description="Seed of all random numbers.")]
LossField = Annotated[
    LossName,
    Field(description="Training and ranking loss; balanced weights each class by its rarity."),
]
MetricField = Annotated[
    MetricName, Field(description="Metric to report; balanced-accuracy stands beside accuracy.")
]
ClassWeightsField = Annotated[
    ClassWeights,
    Field(
        description="Weights of the classes in the loss; balanced: images / (classes * images of the class)."
    ),
]
SamplerField = Annotated[
    Sampler,
    Field(description="Order of an epoch's training images; balanced draws all classes equally often."),
]
# the settings above that act on the shares of the classes; later than the first runs
BALANCE = ("loss", "metric", "class_weights", "sampler")


def check_balance(loss: str, class_weights: str, sampler: str) -> None:
    """Raise ValueError where rare classes would be made up for twice, which favours them over the others."""
    asked = [
        text
        for text, is_asked in (
            ("`loss='balanced'`", loss == "balanced"),
            ("`class_weights='balanced'`", class_weights == "balanced"),
            ("`sampler='balanced'`", sampler == "balanced"),
        )
        if is_asked
    ]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} both make up for rare classes: expected one of them")


class Settings(FilePart):
    """A frozen set of settings whose problems are reported together."""

    LATER: ClassVar[tuple[str, ...]] = ()  # fields added later, which files omit at their default

    @classmethod
    def check(cls, content: Mapping[str, Any], where: str) -> Self:
        """Build the settings from their fields. Raises UsageError with every problem in one line."""
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            raise UsageError(f"{where}: {describe_problems(error, cls)}") from error

    def override(self, changes: Mapping[str, Any]) -> Self:
        """Return the settings with these fields changed; None changes nothing. Raises UsageError."""
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return self.model_validate(self.model_dump(by_alias=True) | self._implied(given) | given)
        except ValidationError as error:  # of the changes alone, since the settings are valid
            raise UsageError(describe_problems(error, type(self), "`")) from error

    def _implied(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return further fields that these changes change, unless they are changed themselves."""
        return {}

    def values(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    def changed(self, names: Sequence[str]) -> str:
        """Return those of the fields that are not at their default, for messages; empty if there are none."""
        defaults = type(self).model_fields
        given = [name for name in names if getattr(self, name) != defaults[name].default]
        return " and ".join(f"`{name}={getattr(self, name)!r}`" for name in given)

    def known_values(self) -> dict[str, Any]:
        """Return the values without later fields at their default, of settings within these as well.

        Files keep them so: a run of an earlier version has the same ones, and goes on with them.
        """
        defaults, found = type(self).model_fields, self.values()
        for name in self.LATER:
            if found[name] == defaults[name].default:
                del found[name]
        for name in defaults:
            if isinstance(inner := getattr(self, name), Settings):
                found[name] = inner.known_values()
        return found

    def record(self) -> dict[str, Any]:
        """Return the fields as config.json keeps them, without the schema of a file."""
        return {name: value for name, value in self.known_values().items() if name != "schema"}


class SettingsFile(Settings):
    """Settings that people write as a YAML file; some are shipped in a folder of recipes."""

    WHAT: ClassVar[str]  # the model's name in messages
    SCHEMA: ClassVar[str]
    FOLDER: ClassVar[str]

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read the settings from YAML text; `where` names the text in messages. Raises UsageError."""
        content = read_mapping(text, where, cls.SCHEMA, UsageError)
        if "schema" not in content:
            raise UsageError(f"{where}: schema: missing, expected {cls.SCHEMA}")
        return cls.check(content, where)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Load shipped settings by name, or a YAML file by its path. Raises UsageError."""
        return cls.parse(*read_named(cls.FOLDER, name_or_path, cls.WHAT, UsageError))

    def to_yaml(self) -> str:
        """Return the settings as text that `parse` reads back to an equal value."""
        return str(yaml.safe_dump(self.known_values(), sort_keys=False))
