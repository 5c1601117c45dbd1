"""How one network is trained: a YAML file as a frozen value.

A recipe says what is done to weights and images, nothing of the machine; what it leaves out is off, or
as for a short training on small images. `recipes/` holds the shipped ones, each to be copied and changed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qnas.common.documents import describe_problems, read_mapping
from qnas.common.errors import UsageError
from qnas.common.resources import read_named

SCHEMA: Literal["qnas.recipe/1"] = "qnas.recipe/1"

# By kind of data, where none is named; for two CPU cores or one GPU.
DEFAULTS = {
    "digits": "digits",
    "fashion-mnist": "fashion-short",
    "cifar10": "cifar-short",
    "imagefolder": "photos",
    "shards": "photos",
}


def _scientific(value: Any) -> Any:
    """Take `4e-3` for the number it means: YAML 1.1 has it as text, for want of a point."""
    if not isinstance(value, str) or "e" not in value.lower():
        return value
    try:
        return float(value)
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_scientific), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_scientific), Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """How to train a network. A field of 0 is off, but for counts, rates and the temperature."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file_schema: Literal["qnas.recipe/1"] = Field(default=SCHEMA, alias="schema", repr=False)
    epochs: Count
    batch_size: Count  # images a step, over all processes and parts
    resolution_px: Count | None = None  # None: of the search, else of the space
    learning_rate: Number  # of AdamW, at the end of the warm-up
    warmup_epochs: Number = 1.0
    weight_decay: Number = 0.05  # not on norms and biases
    gradient_clip: Annotated[Number, Field(gt=0)] = 5.0  # of the total norm
    # parts that a batch is taken in, one after another, for less memory; batch norms see a part at a time
    accumulation: Count = 1
    label_smoothing: Share = 0.1
    # least share of an image's area that is cut out and resized; 0: images are shifted by up to an eighth
    random_resized_crop: Annotated[Number, Field(le=1)] = 0.0
    randaugment: Annotated[Number, Field(le=10)] = 0.0  # magnitude
    randaugment_std: Number = 0.0
    mixup: Number = 0.0  # alpha of the Beta distribution; with cutmix, each batch has one of the two
    cutmix: Number = 0.0  # alpha
    random_erasing: Annotated[Number, Field(le=1)] = 0.0  # share of the images
    stochastic_depth: Share = 0.0  # of the last block, from 0 at the first, linearly
    ema_decay: Share = 0.0  # a step; the averaged weights are the result
    linear_start: bool = False  # ReLinear: the quadratic product is zero at first
    quadratic_gamma: Number = 1.0  # ReLinear: rate of the weights in the product, as a share of the others'
    quadratic_alpha: Number = 0.0  # ReLinear: their further decay (L2)
    quadratic_beta: Number = 0.0  # ReLinear: their shrinkage to zero (L1)
    teacher_weight: Annotated[Number, Field(le=1)] = 0.5  # of the teacher's loss, where there is a teacher
    teacher_temperature: Annotated[Number, Field(gt=0)] = 1.0

    def override(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with these fields instead; None changes nothing. Raises UsageError."""
        given = {name: value for name, value in changes.items() if value is not None}
        return _validate(self.values() | given, "recipe")

    def values(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """Return the recipe as text that `parse_recipe` reads back to an equal value."""
        return str(yaml.safe_dump(self.values(), sort_keys=False))


def parse_recipe(text: str, where: str) -> Recipe:
    """Read a recipe from YAML text; `where` names it in messages.

    Raises UsageError with every problem of the file in one line.
    """
    content = read_mapping(text, where, SCHEMA, UsageError)
    if "schema" not in content:
        raise UsageError(f"{where}: schema: missing, expected {SCHEMA}")
    return _validate(content, where)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a shipped recipe by name, or one's own by the path of its YAML file. Raises UsageError."""
    return parse_recipe(*read_named("recipes", name_or_path, "recipe", UsageError))


def _validate(content: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise UsageError(f"{where}: {describe_problems(error, Recipe)}") from error
