"""The configuration of a search: a frozen value, with presets as YAML files under recipes/search/.

Nothing here imports torch, so that the command line can build its help from the fields.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from qnas.nn.modes import GradientForm, WeightsMode, gradient_for
from qnas.training import settings
from qnas.training.settings import Count, Natural, Number, SettingsFile, Share

LatencyLoss = Literal["multiplier", "add-linear", "mul-log"]
Paths = Literal["even", "probabilities"]

# The default preset for each kind of data, for two CPU cores or one GPU.
PRESET_OF_DATA = {
    "digits": "digits",
    "fashion-mnist": "small",
    "cifar10": "small",
    "imagefolder": "photos",
    "shards": "photos",
}


class SearchConfig(SettingsFile):
    """The settings of a search: its length, its method and the machine. A preset is a complete set."""

    WHAT: ClassVar[str] = "search preset"
    SCHEMA: ClassVar[str] = "qnas.search-preset/1"
    FOLDER: ClassVar[str] = "recipes/search"
    LATER: ClassVar[tuple[str, ...]] = settings.BALANCE

    file_schema: Literal["qnas.search-preset/1"] = Field(
        default="qnas.search-preset/1", alias="schema", repr=False
    )
    preset: str = Field(description="Name of the preset that the other fields started from.", repr=False)
    resolution_px: Count | None = Field(
        default=None,
        description="Height and width of training images in pixels; latencies are always those of the "
        "space's own resolution. Default: as in the preset, else the space's own.",
    )
    warmup_epochs: Natural = Field(description="Epochs that train weights alone, before the search.")
    search_epochs: Count = Field(description="Epochs of searching, after the warm-up.")
    batch_size: Count = Field(description="Images per step.")
    learning_rate: Number = Field(description="Learning rate of the weights (AdamW).")
    arch_learning_rate: Number = Field(description="Learning rate of the architecture parameters (Adam).")
    arch_every: Count = Field(description="Weight steps for each architecture step.")
    weight_decay: Number = Field(default=0.01, description="Weight decay, except on norms and biases.")
    label_smoothing: Share = Field(
        default=0.1, description="Share of a label spread over all classes, in weight steps only."
    )
    latency_loss: LatencyLoss = Field(
        default="multiplier", description="How the expected latency enters the architecture's loss."
    )
    weights: WeightsMode = Field(
        default="shared",
        description="Weights of the candidates: independent, shared (slices of the largest) or nested (all "
        "at once).",
    )
    gradient: GradientForm | None = Field(
        default=None,
        description="Gradient of the architecture. Default: exact for nested weights, else two-path.",
    )
    nested_weight_steps: Literal["mixture", "sampled"] = Field(
        default="sampled",
        description="With nested weights, what a weight step trains: the whole mixture or one drawn path.",
    )
    # With `probabilities`, a candidate that is preferred early is trained more and then looks better: the
    # supernet accuracies of networks of equal latency then depend on how often they were drawn.
    paths: Paths = Field(
        default="even",
        description="How the paths of weight steps are drawn: evenly within the limits, or by the "
        "architecture's probabilities.",
    )
    torch_device: settings.TorchDeviceField = "auto"
    precision: settings.PrecisionField = "auto"
    compile: settings.CompileField = False
    effect_networks: Natural | None = Field(
        default=None,
        description="Networks that the candidates' effects on the loss are fitted to; 0 derives by "
        "probabilities. Default: as many as the effects need, fewer in a short search.",
    )
    k_best: Count = Field(default=20, description="Networks that are ranked on all held-out images.")
    screened: Count | None = Field(
        default=None,
        description="Networks that are solved for and screened on some held-out images before the ranking. "
        "Default: 16 times as many as are ranked, fewer in a short search.",
    )
    random_networks: Natural = Field(
        default=10, description="Random networks of equal latency to compare with."
    )
    threads: settings.ThreadsField = 0
    seed: settings.SeedField = 0
    loss: settings.LossField = "cross-entropy"
    metric: settings.MetricField = "accuracy"
    class_weights: settings.ClassWeightsField = "none"
    sampler: settings.SamplerField = "shuffled"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        gradient_for(self.weights, self.gradient)
        settings.check_balance(self.loss, self.class_weights, self.sampler)
        return self
