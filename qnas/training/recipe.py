"""The recipe of one network's training: a YAML file as a frozen value.

A recipe holds the settings of weights and images, not of the machine. Omitted fields are off, or suit a
short training on small images. The shipped recipes in `recipes/` are meant to be copied and changed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qnas.common.errors import UsageError
from qnas.training import settings
from qnas.training.settings import Count, Natural, Number, Settings, SettingsFile, Share

# settings that need weights which are trained already, later than the first runs
HEAD_FIRST = ("head_epochs", "backbone_rate")

# The default recipe for each kind of data, for two CPU cores or one GPU.
DEFAULTS = {
    "digits": "digits",
    "fashion-mnist": "fashion-short",
    "cifar10": "cifar-short",
    "imagefolder": "photos",
    "shards": "photos",
}


def default_recipe(kind: str, *, is_pretrained: bool) -> str:
    """Return the recipe for data of this kind, and for weights that started from pretrained ones."""
    return "finetune-pretrained" if is_pretrained else DEFAULTS[kind]


class Recipe(SettingsFile):
    """The training recipe of a network. A field of 0 is off, except for counts, rates and the temperature."""

    WHAT: ClassVar[str] = "recipe"
    SCHEMA: ClassVar[str] = "qnas.recipe/1"
    FOLDER: ClassVar[str] = "recipes"
    LATER: ClassVar[tuple[str, ...]] = HEAD_FIRST

    file_schema: Literal["qnas.recipe/1"] = Field(default="qnas.recipe/1", alias="schema", repr=False)
    epochs: Count = Field(description="Passes over the training images.")
    batch_size: Count = Field(description="Images per step, over all processes and parts.")
    resolution_px: Count | None = Field(
        default=None,
        description="Height and width of images in pixels, at the end of the training. Default: as in the "
        "recipe, else as in the space, for which latencies hold.",
    )
    start_resolution_px: Count | None = Field(
        default=None,
        description="Height and width in the first epochs, doubled until they are the last epochs'. Default: "
        "as in the recipe; else, if no resolution is given, as in the search.",
    )
    learning_rate: Number = Field(description="Learning rate of AdamW at the end of the warm-up.")
    warmup_epochs: Number = Field(default=1.0, description="Epochs in which the learning rate rises.")
    head_epochs: Natural = Field(
        default=0,
        description="First epochs that train the classifier alone; batch norms keep their statistics then.",
    )
    backbone_rate: Annotated[Number, Field(le=1)] = Field(
        default=1.0,
        description="Learning rate of all weights but the classifier's, as a share of the classifier's.",
    )
    weight_decay: Number = Field(default=0.05, description="Weight decay, except on norms and biases.")
    gradient_clip: Annotated[Number, Field(gt=0)] = Field(
        default=5.0, description="Largest norm of all gradients together."
    )
    accumulation: Count = Field(
        default=1,
        description="Parts of a batch that are run one after another, to save memory; batch norms see "
        "one part at a time.",
    )
    label_smoothing: Share = Field(default=0.1, description="Share of a label spread over all classes.")
    random_resized_crop: Annotated[Number, Field(le=1)] = Field(
        default=0.0,
        description="Least share of an image's area that is cut out and resized; 0 shifts images by up to "
        "an eighth instead.",
    )
    randaugment: Annotated[Number, Field(le=10)] = Field(
        default=0.0, description="Magnitude of RandAugment; 0 is off."
    )
    randaugment_std: Number = Field(default=0.0, description="Standard deviation of that magnitude.")
    mixup: Number = Field(
        default=0.0,
        description="Alpha of mixup's Beta distribution; 0 is off. With cutmix, each batch has one of "
        "the two.",
    )
    cutmix: Number = Field(default=0.0, description="Alpha of cutmix's Beta distribution; 0 is off.")
    random_erasing: Annotated[Number, Field(le=1)] = Field(
        default=0.0, description="Share of images of which a rectangle is erased."
    )
    stochastic_depth: Share = Field(
        default=0.0, description="Drop rate of the last block; it rises linearly from 0 at the first."
    )
    ema_decay: Share = Field(
        default=0.0,
        description="Decay per step of the weights' moving average, which is the result; 0 is off.",
    )
    linear_start: bool = Field(default=False, description="Start with all quadratic products at zero.")
    quadratic_gamma: Number = Field(
        default=1.0, description="Learning rate of the quadratic weights, as a share of the others'."
    )
    quadratic_alpha: Number = Field(
        default=0.0, description="Additional weight decay (L2) of the quadratic weights."
    )
    quadratic_beta: Number = Field(
        default=0.0, description="Shrinkage to zero (L1) of the quadratic weights."
    )
    teacher_weight: Annotated[Number, Field(le=1)] = Field(
        default=0.5, description="Weight of the teacher's loss, where there is a teacher."
    )
    teacher_temperature: Annotated[Number, Field(gt=0)] = Field(
        default=1.0, description="Temperature that softens the teacher's outputs."
    )

    @model_validator(mode="after")
    def _check_head_first(self) -> Self:
        if self.head_epochs >= self.epochs:
            raise ValueError(
                f"`head_epochs={self.head_epochs}`: expected fewer than the epochs, `epochs={self.epochs}`"
            )
        return self

    def check_start(self, *, trained: bool, where: str = "") -> None:
        """Raise UsageError for settings that need weights which are `trained`, where they are not."""
        if not trained and (asked := self.changed(HEAD_FIRST)):
            raise UsageError(
                f"{where}{asked}: for weights that are trained already, and the training starts from "
                "scratch: leave it out"
            )

    def _implied(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A shorter training has fewer epochs for the classifier alone."""
        epochs = given.get("epochs")
        return (
            {"head_epochs": epochs - 1} if isinstance(epochs, int) and 1 <= epochs <= self.head_epochs else {}
        )

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """The sizes in pixels that images have one after another, each with its number of epochs.

        Sizes double from `start_resolution_px` on and end at `resolution_px`. The epochs of each are in
        inverse proportion to it, but at least one; with too few epochs, the smallest sizes are left out. An
        epoch's time grows with the square of the size, so the last size still takes the most time.
        Progressive resizing: fast.ai in DAWNBench, 2018; EfficientNetV2, arXiv 2104.00298.

        >>> recipe = Recipe(epochs=14, batch_size=32, learning_rate=2e-3, resolution_px=224)
        >>> recipe.override({"start_resolution_px": 64}).stages
        ((64, 8), (128, 4), (224, 2))
        """
        last = self.resolution_px
        assert last is not None, "the resolution is not resolved"
        sizes = [self.start_resolution_px or last]
        while sizes[-1] * 2 < 0.75 * last:  # so that the last step is not a small one
            sizes.append(sizes[-1] * 2)
        sizes = [px for px in sizes if px < last] + [last]
        shares = [1 / px for px in sizes]
        stages, left = [], self.epochs
        for px, share in zip(sizes[:0:-1], shares[:0:-1], strict=True):
            epochs = min(left, max(1, round(self.epochs * share / sum(shares))))
            stages.append((px, epochs))
            left -= epochs
        stages.append((sizes[0], left))
        return tuple((px, epochs) for px, epochs in reversed(stages) if epochs)


class TrainConfig(Settings):
    """A training: its recipe, with the resolution resolved, its seed and its machine."""

    LATER: ClassVar[tuple[str, ...]] = settings.BALANCE

    recipe: Recipe
    torch_device: settings.TorchDeviceField = "auto"
    precision: settings.PrecisionField = "auto"
    compile: settings.CompileField = False
    threads: settings.ThreadsField = 0
    seed: settings.SeedField = 0
    loss: settings.LossField = "cross-entropy"
    metric: settings.MetricField = "accuracy"
    class_weights: settings.ClassWeightsField = "none"
    sampler: settings.SamplerField = "shuffled"

    @model_validator(mode="after")
    def _check_balance(self) -> Self:
        settings.check_balance(self.loss, self.class_weights, self.sampler)
        return self

    @property
    def resolution_px(self) -> int:
        """Height and width of the images."""
        assert self.recipe.resolution_px is not None, "the resolution is not resolved"
        return self.recipe.resolution_px
