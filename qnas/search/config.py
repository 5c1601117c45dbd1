"""The configuration of a search: a frozen value, with presets as YAML files under recipes/search/.

Nothing here imports torch, so that the command line can build its help from the fields.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qnas.nn.modes import GradientForm, WeightsMode, gradient_for
from qnas.search.halving import count_rungs, epochs_within
from qnas.training import settings
from qnas.training.settings import Count, Natural, Number, SettingsFile, Share

LatencyLoss = Literal["multiplier", "add-linear", "mul-log"]
WeightSteps = Literal["path", "sandwich", "whole"]
Paths = Literal["even", "probabilities", "fair"]
FinalistWeights = Literal["supernet", "scratch"]

# settings of finalists, later than the first runs
FINALISTS = (
    *("finalists", "finalist_epochs", "finalists_from", "finalist_factor", "finalist_rounds"),
    "finalist_recipe",
)
# settings of weight steps and of pretrained weights, later than the first runs
TRAINED_PATHS = ("weight_steps", "step_paths")
PRETRAINED = ("head_epochs", "pretrained_rate")

# The default preset for each kind of data, for two CPU cores or one GPU.
PRESET_OF_DATA = {
    "digits": "digits",
    "fashion-mnist": "small",
    "cifar10": "small",
    "imagefolder": "photos",
    "shards": "photos",
}


def default_preset(kind: str, *, is_pretrained: bool) -> str:
    """Return the preset of a search on data of this kind, which may start from pretrained weights."""
    return "pretrained" if is_pretrained else PRESET_OF_DATA[kind]


class SearchConfig(SettingsFile):
    """The settings of a search: its length, its method and the machine. A preset is a complete set."""

    WHAT: ClassVar[str] = "search preset"
    SCHEMA: ClassVar[str] = "qnas.search-preset/1"
    FOLDER: ClassVar[str] = "recipes/search"
    LATER: ClassVar[tuple[str, ...]] = (*settings.BALANCE, *FINALISTS, *TRAINED_PATHS, *PRETRAINED)

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
    head_epochs: Natural = Field(
        default=0,
        description="First epochs of the warm-up, which train the classifier alone on the features of the "
        "pretrained network; for pretrained weights.",
    )
    pretrained_rate: Annotated[Number, Field(le=1)] = Field(
        default=1.0, description="Learning rate of pretrained weights, as a share of the others'."
    )
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
    weight_steps: WeightSteps = Field(
        default="path",
        description="What a weight step trains: paths on the labels; a sandwich: the largest network on "
        "the labels, the smallest one and paths on its answers; or the whole: the pretrained network, else "
        "the largest.",
    )
    step_paths: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="Drawn paths of a weight step. Default: 1, in a sandwich 2."
    )
    # With `probabilities`, a candidate that is preferred early is trained more and then looks better: the
    # supernet accuracies of networks of equal latency then depend on how often they were drawn.
    paths: Paths = Field(
        default="even",
        description="How the paths of weight steps are drawn: evenly within the limits, by the "
        "architecture's probabilities, or fairly: evenly, with the kinds of blocks taking turns.",
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
    finalists: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=0,
        description="Different networks within the limits that are trained by themselves; the best on "
        "held-out images is the result. 0 chooses by the supernet alone.",
    )
    finalist_epochs: Count | None = Field(
        default=None,
        description="Epochs of a finalist that stays to the end. Default: as many as make all finalists "
        "together take at most as many epochs as the search, but at least one for each halving.",
    )
    finalists_from: FinalistWeights = Field(
        default="supernet", description="Weights that a finalist's training starts from."
    )
    finalist_factor: Annotated[int, Field(ge=2, le=100)] = Field(
        default=2,
        description="Share of the finalists that goes on: one in so many, with so many times the epochs.",
    )
    finalist_rounds: Annotated[int, Field(ge=1, le=5)] = Field(
        default=1,
        description="Sets of finalists, at most. After each, a number for each kind of block corrects the "
        "effects by what the trainings showed, and the next set is solved for with them.",
    )
    finalist_recipe: str | None = Field(
        default=None,
        description="Recipe of the finalists' training, by name or path. Default: as of train-subnet, by the "
        "kind of data.",
    )
    threads: settings.ThreadsField = 0
    seed: settings.SeedField = 0
    loss: settings.LossField = "cross-entropy"
    metric: settings.MetricField = "accuracy"
    class_weights: settings.ClassWeightsField = "none"
    sampler: settings.SamplerField = "shuffled"

    def _implied(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what goes with a shorter warm-up, without finalists, and without paths."""
        implied: dict[str, Any] = {}
        most = given.get("warmup_epochs")
        if isinstance(most, int) and 0 <= most < self.head_epochs:
            implied["head_epochs"] = most
        if given.get("finalists") == 0:
            implied |= {name: type(self).model_fields[name].default for name in FINALISTS}
        if given.get("nested_weight_steps") == "mixture" and self.paths == "fair":
            implied["paths"] = "even"  # there are no paths
        return implied

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        gradient_for(self.weights, self.gradient)
        settings.check_balance(self.loss, self.class_weights, self.sampler)
        self._check_finalists()
        self._check_weight_steps()
        if self.head_epochs > self.warmup_epochs:
            raise ValueError(
                f"`head_epochs={self.head_epochs}`: expected at most as many as of the warm-up, "
                f"`warmup_epochs={self.warmup_epochs}`"
            )
        return self

    @property
    def drawn_paths(self) -> int:
        """Paths that are drawn for a weight step."""
        return self.step_paths or (2 if self.weight_steps == "sandwich" else 1)

    def _check_weight_steps(self) -> None:
        """Raise ValueError for settings of paths where weight steps draw none."""
        if self.weight_steps == "whole" and self.step_paths is not None:
            raise ValueError(f"`step_paths={self.step_paths}`: `weight_steps='whole'` draws no paths")
        if self.weights != "nested" or self.nested_weight_steps != "mixture":
            return
        if given := self.changed(TRAINED_PATHS) or ("`paths='fair'`" if self.paths == "fair" else ""):
            raise ValueError(
                f"{given}: there are no paths with `nested_weight_steps='mixture'`: expected 'sampled'"
            )

    def _check_finalists(self) -> None:
        """Raise ValueError for settings of finalists without any, and for too few epochs to halve them."""
        if not self.finalists:
            if given := self.changed(FINALISTS):
                raise ValueError(f"{given}: there are no finalists: expected `finalists` of at least 1 too")
            return
        rungs = count_rungs(self.finalists, self.finalist_factor)
        if self.finalist_epochs is not None and self.finalist_epochs < rungs:
            raise ValueError(
                f"`finalist_epochs={self.finalist_epochs}`: expected at least {rungs}, as {self.finalists} "
                f"finalists are thinned out {rungs - 1} times, by {self.finalist_factor}"
            )

    @property
    def epochs_of_finalists(self) -> int:
        """Epochs of a finalist that stays to the end: as asked, or by the length of the search."""
        assert self.finalists, "there are no finalists"
        if self.finalist_epochs is not None:
            return self.finalist_epochs
        most = (self.warmup_epochs + self.search_epochs) // self.finalist_rounds
        return epochs_within(self.finalists, self.finalist_factor, most)
