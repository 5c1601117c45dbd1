"""The JSON documents of a run's folder as typed models, and their reading.

A document is checked when it is read and passed on as the mapping that it is. A key that is missing or of
another type is refused in one line that names the file and the key. Unknown keys are left alone: files of
later versions have more. The facts between documents are recomputed in `runs.verification`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qnas.common.documents import (
    ABSENT,
    Amount,
    Count,
    Digest,
    Document,
    Name,
    Number,
    PathText,
    Positive,
    Scalar,
    Scalars,
    Share,
    Text,
    check_content,
)
from qnas.common.errors import ArchError, CheckpointError
from qnas.common.reading import read_json
from qnas.runs.names import ARCH_FILE, RESULT_FILE, SEARCH_FILE
from qnas.solver.limits import ENERGY, ENERGY_UNIT, LABEL
from qnas.spaces.arch import MOST_POSITIONS, ArchFields, read_arch_document

MOST_NETWORKS = 100_000  # of a ranking
MOST_CLASSES = 100_000
MOST_PX = 16_384


MOST_CELLS = 10_000  # candidates of a position
MOST_ROWS = Field(max_length=MOST_POSITIONS)
Versions = dict[Text, Text]
Choices = Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=MOST_POSITIONS)]
Loss = float  # a diverged network's may be infinite or NaN
Ordinal = Annotated[int, Field(ge=1, le=MOST_NETWORKS)]
Step = Annotated[int, Field(ge=1, le=10**12)]
Pixels = Annotated[int, Field(ge=1, le=MOST_PX)]
Threads = Annotated[int, Field(ge=0, le=4096)]
Seed = Annotated[int, Field(ge=0)]
Nats = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Confidence = Annotated[float, Field(gt=0, lt=1)]
LogShare = Annotated[float, Field(ge=-1e6, le=1e-6, allow_inf_nan=False)]
ClassName = Annotated[str, Field(max_length=1000)]
ClassNames = Annotated[list[ClassName], Field(max_length=MOST_CLASSES)]
LeftOut = dict[Text, Count]  # files by the reason
SplitNames = dict[Literal["train", "heldout", "test"], Annotated[Text, Field(max_length=100)]]


# ---- config.json


class AskedLimit(Document):
    """A limit as it was asked for, in a config.json."""

    name: Name
    budget: Text
    limit: Positive = ABSENT
    device: PathText = ABSENT
    table_digest: Digest = ABSENT
    energy_of: Name = ABSENT
    cells_digest: Digest = ABSENT
    confidence: Confidence = ABSENT


class SearchSettings(Document):
    """The settings of a search; `search.config` has the rest of the fields."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    resolution_px: Pixels = ABSENT
    threads: Threads = ABSENT
    k_best: Ordinal = ABSENT
    screened: Ordinal | None = None
    seed: Seed = ABSENT
    preset: PathText = ABSENT
    loss: Text = ABSENT
    metric: Text = ABSENT


class TrainSettings(Document):
    """The settings of a training; `training.recipe` has the rest of the fields."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    recipe: Scalars = ABSENT


class PretrainedFacts(Document):
    """The network whose weights a run started from."""

    name: Text
    sha256: Digest
    choices: Choices = ABSENT  # in an arch.json: the network's own candidates


class ConfigDocument(Document):
    """A config.json: the request of a search or of a training."""

    command: Literal["search", "train-subnet"] = ABSENT
    data: PathText = ABSENT
    data_digest: Digest = ABSENT
    max_broken: Share = ABSENT
    space: PathText = ABSENT
    space_digest: Digest = ABSENT
    # of a search over several resolutions or widths
    family_digest: Digest = ABSENT
    resolutions_px: Annotated[list[Pixels], Field(min_length=1, max_length=100)] = ABSENT
    width_multipliers: Annotated[list[Positive], Field(min_length=1, max_length=100)] = ABSENT
    versions: Versions = ABSENT
    pretrained: PretrainedFacts = ABSENT
    # of a search
    search: SearchSettings = ABSENT
    latency: Text = ABSENT
    device: PathText = ABSENT
    budget: Text = ABSENT
    budget_ms: Positive = ABSENT
    table_digest: Digest = ABSENT
    limits: Annotated[list[AskedLimit], Field(max_length=100)] = ABSENT
    # of a training
    train: TrainSettings = ABSENT
    from_supernet: bool = ABSENT
    from_finalist: bool = ABSENT
    choices: Choices = ABSENT
    teacher: PathText = ABSENT
    teacher_digest: Digest = ABSENT

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.search is None and self.train is None:
            raise ValueError("neither search nor train: not the request of a run")
        if self.search is None and self.from_supernet is None:
            raise ValueError("from_supernet: missing, though it is a training's request")
        if self.command not in (None, "search" if self.train is None else "train-subnet"):
            raise ValueError(f"command: {self.command}, though it is another one's request")
        return self


# ---- arch.json


class RecordedInterval(Document):
    """The interval of a latency, and the errors that it follows from."""

    level: Share
    low_ms: Amount
    high_ms: Amount
    low: Annotated[float, Field(ge=-1, le=0)]
    high: Amount
    weight: Annotated[float, Field(ge=1, le=1e3)]


class LimitEntry(Document):
    """A limit that a network meets."""

    name: Name
    unit: Literal["ms", "parameters", "MACs", "mJ"]
    budget: Positive
    limit: Positive
    amount: Amount
    fixed: Amount
    positions: Annotated[list[Amount], Field(max_length=MOST_POSITIONS)]
    least: Amount
    most: Amount
    table_digest: Digest = ABSENT
    coverage: Share = ABSENT
    quantity: Literal["latency", "throughput"] = ABSENT
    cells: Annotated[list[Annotated[list[Amount], Field(max_length=MOST_CELLS)]], MOST_ROWS] = ABSENT
    cells_digest: Digest = ABSENT
    interval: RecordedInterval = ABSENT
    # level of the intervals whose upper ends the amounts are, and the predicted latency
    confidence: Confidence = ABSENT
    latency_ms: Amount = ABSENT

    @model_validator(mode="after")
    def _check_unit(self) -> Self:
        if self.unit == ENERGY_UNIT:
            if not self.name.startswith(f"{ENERGY}-") or self.cells is None or self.cells_digest is None:
                raise ValueError(f"expected {ENERGY}-DEVICE with cells and cells_digest, as it is an energy")
        elif self.unit != "ms" and LABEL.get(self.name) != self.unit:
            raise ValueError(f"expected one of {', '.join(LABEL)} with its unit, or a device with ms")
        if self.unit == "ms" and (self.table_digest is None or self.coverage is None):
            raise ValueError("expected table_digest and coverage, as it is a device's")
        if self.confidence is not None and (self.interval is None or self.latency_ms is None):
            raise ValueError("expected interval and latency_ms, as there is a confidence")
        return self


class Certificate(Document):
    """The proof of a solve."""

    solver: Text
    score: Number
    score_bound: Number
    rank: Ordinal
    solved: Ordinal
    fixed_ms: Amount
    position_ms: Annotated[list[Amount], Field(max_length=MOST_POSITIONS)]
    fastest_ms: Amount
    slowest_ms: Amount
    # those among whose networks the rank and the bound hold; absent: among all networks
    kinds: Annotated[list[Name], Field(min_length=1, max_length=MOST_CELLS)] = ABSENT
    stages: Annotated[list[Ordinal], Field(min_length=1, max_length=MOST_CELLS)] = ABSENT

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.rank > self.solved:
            raise ValueError(f"number {self.rank} of {self.solved} networks")
        return self


class Measured(Document):
    """The latency of an exported file on this machine, or elsewhere by a command, `runtime`."""

    p50_ms: Amount
    p95_ms: Amount
    runtime: Text
    threads: Threads = ABSENT
    machine: Text


class FinalistFacts(Document):
    """What an arch.json says of the finalist that it is: its training by itself."""

    number: Ordinal
    of: Ordinal
    round: Ordinal
    start: Literal["supernet", "scratch"] = Field(alias="from")
    epochs: Ordinal
    seed: Seed
    resolution_px: Pixels
    heldout_accuracy: Share
    heldout_balanced_accuracy: Share
    heldout_loss: Loss
    weights_sha256: Digest


class RankedEntry(Document):
    """A network that was ranked on held-out images."""

    choices: Choices
    rank: Ordinal
    score: Number
    heldout_accuracy: Share
    heldout_balanced_accuracy: Share = ABSENT
    heldout_loss: Loss
    level: bool
    params: Count
    amounts: Annotated[list[Amount], Field(min_length=1, max_length=100)]


Ranking = Annotated[list[RankedEntry], Field(max_length=MOST_NETWORKS)]
OF_SOLVE = (
    *("device", "table_digest", "budget_ms", "margin", "limit_ms", "latency_ms", "latency_coverage"),
    *("macs", "params", "limits", "certificate"),
)


class ArchDocument(ArchFields):
    """An arch.json: a network, and the facts of its solve unless somebody wrote the choices by hand."""

    device: Name = ABSENT
    table_digest: Digest = ABSENT
    budget_ms: Positive = ABSENT
    margin: Amount = ABSENT
    limit_ms: Positive = ABSENT
    latency_ms: Amount = ABSENT
    latency_coverage: Share = ABSENT
    macs: Count = ABSENT
    params: Count = ABSENT
    limits: Annotated[list[LimitEntry], Field(max_length=100)] = ABSENT
    certificate: Certificate = ABSENT
    latency_source: Text | None = None
    supernet_accuracy: Share = ABSENT
    supernet_balanced_accuracy: Share = ABSENT
    heldout_accuracy: Share | None = None
    heldout_balanced_accuracy: Share | None = None
    seed: Seed | None = None
    versions: Versions = ABSENT
    supernet: PathText = ABSENT
    supernet_sha256: Digest | None = None
    ranking: Ranking = ABSENT
    warning: Text | None = None
    measured: Measured = ABSENT
    finalist: FinalistFacts = ABSENT
    pretrained: PretrainedFacts = ABSENT

    @model_validator(mode="after")
    def _check_solve(self) -> Self:
        missing = [name for name in OF_SOLVE if getattr(self, name) is None]
        if 0 < len(missing) < len(OF_SOLVE):
            raise ValueError(f"{', '.join(missing)}: missing beside the other facts of a solve")
        if self.limits is not None:
            if not self.limits or self.limits[0].unit != "ms":
                raise ValueError("limits: expected a device's first")
            if len({limit.name for limit in self.limits}) < len(self.limits):
                raise ValueError("limits: a name is there twice")
        return self


# ---- search.json


class Effects(Document):
    """What candidates add to the held-out loss."""

    nats: list[list[Nats]]
    explained: Loss | None
    networks: Count


class Rival(Document):
    """A network on the test images, with the supernet's weights."""

    choices: Choices
    latency_ms: Amount
    amounts: Annotated[list[Amount], Field(min_length=1, max_length=100)]
    macs: Count
    accuracy: Share
    balanced_accuracy: Share = ABSENT
    metrics: dict[Text, Number] = ABSENT


class Derived(Rival):
    """The derived network."""

    heldout_accuracy: Share
    heldout_balanced_accuracy: Share = ABSENT
    never_predicted: ClassNames = ABSENT


class Seeds(Document):
    """The derived networks of runs that differ in the seed only."""

    accuracies: dict[Annotated[str, Field(pattern="^[0-9]{1,40}$")], Share]
    mean: Share
    sd: Share | None


class Kernel(Document):
    """A kernel or block of the network on a device."""

    name: Text
    what: Text
    latency_ms: Amount
    kind: Text


class FinalistEntry(Document):
    """A network that was trained by itself; figures are on held-out images, after each epoch."""

    number: Ordinal
    round: Ordinal
    choices: Choices
    blocks: dict[Name, Count]
    latency_ms: Amount
    amounts: Annotated[list[Amount], Field(min_length=1, max_length=100)]
    score: Number
    score_bound: Number
    rank: Ordinal
    solved: Ordinal
    kinds: Annotated[list[Name], Field(max_length=MOST_CELLS)]
    stages: Annotated[list[Ordinal], Field(min_length=1, max_length=MOST_CELLS)] = ABSENT
    heldout_accuracies: list[Share]
    heldout_balanced_accuracies: list[Share]
    heldout_losses: list[Loss]
    problem: Text = ABSENT
    space: Name = ABSENT  # of a family, the space at its layout, and the size of its images
    resolution_px: Pixels = ABSENT


class RungEntry(Document):
    """A rung of successive halving."""

    networks: Ordinal
    epochs: Ordinal


class RoundEntry(Document):
    """A round of finalists, and the biases by which its networks were solved for."""

    biases: dict[Name, Nats]
    rungs: Annotated[list[RungEntry], Field(min_length=1, max_length=100)]


class FinalistsDocument(Document):
    """The finalists of a search."""

    start: Literal["supernet", "scratch"] = Field(alias="from")
    epochs: Ordinal
    factor: Annotated[int, Field(ge=2, le=MOST_NETWORKS)]
    seed: Seed
    resolution_px: Pixels
    images: Count
    rounds: Annotated[list[RoundEntry], Field(min_length=1, max_length=100)]
    networks: Annotated[list[FinalistEntry], Field(min_length=1, max_length=MOST_NETWORKS)]
    winner: Ordinal
    weights_sha256: Digest
    biases: dict[Name, Nats]
    explained: Loss | None

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if [each.number for each in self.networks] != list(range(1, len(self.networks) + 1)):
            raise ValueError("networks: not numbered from 1 on")
        if self.winner > len(self.networks):
            raise ValueError(f"winner: {self.winner} of {len(self.networks)} networks")
        if any(each.round > len(self.rounds) for each in self.networks):
            raise ValueError(f"networks: a round beyond the {len(self.rounds)} rounds")
        if not self.networks[self.winner - 1].heldout_accuracies:
            raise ValueError("winner: it has no accuracy")
        if self.rounds[0].biases:
            raise ValueError("rounds: the first one has biases, though nothing was trained before it")
        return self


class SearchDocument(Document):
    """A search.json: what a search found besides its network."""

    file_schema: Literal["qnas.search/1"] = Field(alias="schema")
    expected_ms: Number
    expected: list[Number]
    budget_binds: bool
    images: dict[Text, Count]
    broken_images: Count
    left_out: LeftOut = ABSENT
    split_names: SplitNames = ABSENT
    classes: ClassNames = ABSENT
    log_probabilities: list[list[LogShare]]
    effects: Effects | None
    screened: Ordinal
    ranking: Annotated[Ranking, Field(min_length=1)]
    derived: Derived
    random: Annotated[list[Rival], Field(max_length=MOST_NETWORKS)]
    macs_guided: Rival | None
    largest: Rival
    seeds: Seeds
    finalists: FinalistsDocument = ABSENT
    layers: dict[Name, Annotated[list[Kernel], Field(max_length=MOST_POSITIONS)]]


# ---- result.json and speed.json


class Interval(Document):
    """A share of images with its confidence interval."""

    value: Share
    low: Share
    high: Share


class ClassResult(Document):
    """The result for a class; one without images has no share."""

    name: ClassName = Field(alias="class")
    images: Count
    value: Share = ABSENT
    low: Share = ABSENT
    high: Share = ABSENT

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if self.images and None in (self.value, self.low, self.high):
            raise ValueError("expected value, low and high, as there are images")
        return self


class DeviceLatency(Document):
    """A predicted latency."""

    ms: Amount
    from_measurements: Share = ABSENT


class Deployed(Document):
    """The size and latencies of the network at the space's own resolution."""

    resolution_px: Count
    macs: Count
    params: Count
    latency: dict[Name, DeviceLatency]


class Stage(Document):
    """The epochs of a training whose images have one size."""

    resolution_px: Pixels
    epochs: Count


class BestEpoch(Document):
    """The epoch of the best test accuracy."""

    epoch: Count
    test_accuracy: Share


Statistics = Annotated[list[Number], Field(min_length=1, max_length=1000)]


class ResultDocument(Document):
    """A result.json: what a training ended with."""

    file_schema: Literal["qnas.subnet/1"] = Field(alias="schema")
    test_accuracy: Share
    test_balanced_accuracy: Share = ABSENT
    never_predicted: ClassNames = ABSENT
    left_out: LeftOut = ABSENT
    split_names: SplitNames = ABSENT
    test_loss: Loss
    test_images: Annotated[int, Field(ge=1, le=10**12)]
    broken_images: Count
    interval_level: Share
    top1: Interval
    top5: Interval | None
    metrics: dict[Text, Number] = ABSENT
    per_class: Annotated[list[ClassResult], Field(max_length=MOST_CLASSES)]
    best_by_test_images: BestEpoch = ABSENT
    params: Count
    deployed: Deployed
    resolution_px: Pixels
    stages: Annotated[list[Stage], Field(min_length=1, max_length=100)] = ABSENT
    classes: Annotated[list[ClassName], Field(min_length=1, max_length=MOST_CLASSES)]
    mean: Statistics
    std: Annotated[list[Positive], Field(min_length=1, max_length=1000)]
    significant_bits: Annotated[int, Field(ge=8, le=16)] | None = None  # earlier runs do not have it
    pads: bool = ABSENT
    data: PathText
    weights_sha256: Digest = ABSENT

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} values of mean, {len(self.std)} of std")
        if [each.name for each in self.per_class] != self.classes:
            raise ValueError("per_class: its classes are not those of `classes`")
        return self


class SpeedDocument(Document):
    """A speed.json: how fast a trained network is on the machine that trained it."""

    images_per_second: Amount
    batch_size: Count
    resolution_px: Pixels
    runtime: Text
    machine: Text
    threads: Threads


# ---- pareto.json


class FrontPoint(Document):
    """The best network for a budget."""

    # after a search over several resolutions
    space: Name = ABSENT
    resolution_px: Pixels = ABSENT
    budget_ms: Positive
    latency_ms: Positive
    # not in older versions; None where the errors of the device are unknown
    low_ms: Amount | None = None
    high_ms: Positive | None = None
    level: Share | None = None
    heldout_accuracy: Share | None
    heldout_low: Share | None
    heldout_high: Share | None
    heldout_balanced_accuracy: Share | None = None
    score: Number
    macs: Count
    params: Count
    on_front: bool
    far: bool
    own_budget: bool


class PublicPoint(Document):
    """A public network of the front of accuracy on ImageNet and latency on a device."""

    name: Name
    resolution_px: Pixels
    imagenet_top1: Share
    latency_ms: Positive
    low_ms: Amount | None
    high_ms: Positive | None
    macs: Count
    params: Count


class Front(Document):
    """The best networks on a device."""

    device: Name
    fastest_ms: Positive
    slowest_ms: Positive
    expected_ms: Amount
    trusted_ms: tuple[Positive, Positive | None] = Field(strict=False)
    own_budget_ms: Positive | None
    own_latency_ms: Positive
    own_accuracy: Share | None
    points: Annotated[list[FrontPoint], Field(min_length=1, max_length=MOST_NETWORKS)]
    public: Annotated[list[PublicPoint], Field(max_length=MOST_NETWORKS)] = ABSENT  # not in older versions
    confidence: Confidence = ABSENT


class ParetoDocument(Document):
    """A pareto.json: the best networks by budget."""

    file_schema: Literal["qnas.pareto/1"] = Field(alias="schema")
    space_digest: Digest
    resolution_px: Pixels = ABSENT
    family: Name = ABSENT  # that the space was chosen from
    ranked: bool
    unranked: Text = ""
    devices: Annotated[list[Front], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _check_ranked(self) -> Self:
        if self.ranked and any(p.heldout_accuracy is None for front in self.devices for p in front.points):
            raise ValueError("ranked, but a point has no heldout_accuracy")
        return self


# ---- family.json


class FamilyCertificate(Document):
    """The proof of the solve over a family."""

    solver: Text
    score: Number
    rank: Ordinal | None
    score_bound: Number
    networks: Ordinal
    layouts: Ordinal
    solved: Count
    rest_bound: Number | None


class LayoutNumber(Document):
    """What a resolution or a width adds to the scores of networks."""

    stage: Count  # from 1; 0 for a resolution
    value: Ordinal
    number: Number


class FamilySpace(Document):
    """What is known of a layout of a family."""

    space: Name
    space_digest: Digest
    resolution_px: Pixels
    channels: Annotated[list[Ordinal], Field(max_length=MOST_POSITIONS)]
    trained_px: Pixels | None  # None: no network is within the limits
    number: Number
    bound: Number | None
    best: Number | None
    networks: Count
    solved: bool
    limits: Annotated[list[LimitEntry], Field(min_length=1, max_length=100)]


class RankedOfFamily(RankedEntry):
    """A ranked network of a family, with the space at its layout."""

    space: Name


class FamilyDocument(Document):
    """A family.json: the layouts of a search over a family."""

    file_schema: Literal["qnas.family/1"] = Field(alias="schema")
    family: Name
    family_digest: Digest
    space: Name
    certificate: FamilyCertificate
    numbers: Annotated[list[LayoutNumber], Field(max_length=MOST_NETWORKS)]
    spaces: Annotated[list[FamilySpace], Field(min_length=1, max_length=MOST_NETWORKS)]
    ranking: Annotated[list[RankedOfFamily], Field(min_length=1, max_length=MOST_NETWORKS)]


# ---- metrics.jsonl


class MetricsRow(Document):
    """A line of a metrics.jsonl."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]  # of_limit_NAME

    step: Step
    loss: Number
    # of an architecture step
    arch_loss: Number = ABSENT
    arch_accuracy: Share = ABSENT
    arch_balanced_accuracy: Share = ABSENT
    expected_ms: Number = ABSENT
    limit_ms: Positive = ABSENT
    multiplier: Number = ABSENT
    temperature: Number = ABSENT
    entropy: Number = ABSENT
    identity_share: Number = ABSENT
    probabilities: Annotated[list[list[Share]], Field(max_length=MOST_POSITIONS)] = ABSENT
    warnings: Annotated[list[Text], Field(max_length=1000)] = ABSENT
    # at the end of an epoch of a training, of a finalist on held-out images
    epoch: Step = ABSENT
    resolution_px: Pixels = ABSENT
    train_loss: Number = ABSENT
    learning_rate: Amount = ABSENT
    test_accuracy: Share = ABSENT
    test_balanced_accuracy: Share = ABSENT
    test_loss: Loss = ABSENT
    heldout_accuracy: Share = ABSENT
    heldout_balanced_accuracy: Share = ABSENT
    heldout_loss: Loss = ABSENT

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        given = self.model_fields_set
        of_epoch = _OF_FINALISTS_EPOCH if "heldout_accuracy" in given else _OF_EPOCH
        for first, others in (("multiplier", _OF_ARCH_STEP), ("epoch", of_epoch)):
            missing = [name for name in (first, *others) if name not in given]
            if missing and given.intersection((first, *others)):
                raise ValueError(f"{', '.join(missing)}: missing")
        return self


_OF_ARCH_STEP = ("arch_loss", "expected_ms", "limit_ms", "temperature", "entropy", "identity_share")
_OF_EPOCH = ("train_loss", "learning_rate", "test_accuracy", "test_loss")
_OF_FINALISTS_EPOCH = ("train_loss", "learning_rate", "heldout_accuracy", "heldout_loss")


# ---- reading


def read_document(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """Read a JSON file of a run. Raises CheckpointError if it is missing, damaged or of another form."""
    content = read_json(path, CheckpointError)
    check_content(model, content, str(path), CheckpointError)
    return content


def read_search_document(folder: Path) -> dict[str, Any]:
    """Return the search.json of a finished search. Raises CheckpointError if there is none."""
    if not (folder / SEARCH_FILE).is_file():
        raise CheckpointError(f"{folder}: no {SEARCH_FILE} here: not the folder of a finished search")
    return read_document(folder / SEARCH_FILE, SearchDocument)


def read_result_document(folder: Path) -> dict[str, Any]:
    """Return the result.json of a training. Raises CheckpointError if it is missing or of another form."""
    return read_document(folder / RESULT_FILE, ResultDocument)


def read_arch_facts(path: Path) -> dict[str, Any]:
    """Return an arch.json with all its facts, not recomputed yet. Raises ArchError."""
    return read_arch_document(path, ArchDocument)


def check_solved(document: Mapping[str, Any], folder: Path) -> None:
    """Raise ArchError if an arch.json has no facts of a solve."""
    if "limits" not in document:
        raise ArchError(f"{folder / ARCH_FILE}: no limits, no latency and no certificate: not from a search")
