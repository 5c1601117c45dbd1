"""Shared parts of the experiments: the data, networks trained alone, supernets, and the files of results.

Both experiments (rank_correlation.py, search_quality.py) train dozens of small networks with one recipe.
Each training is a JSON line with a key for everything on which it depends. A stopped run therefore continues,
and both experiments share trainings. Networks with the same blocks count as the same network: the positions
of identities in a stage make no difference. Times are processor times of one thread, which other programs on
the machine hardly change.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import nn

from qnas.common.files import write_text
from qnas.data.batches import batches
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.table import LatencyTable
from qnas.nn import blocks
from qnas.nn.subnet import build_subnet
from qnas.search.config import SearchConfig
from qnas.search.searcher import Searcher
from qnas.solver.distributions import sample_near
from qnas.solver.limits import Limits
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.space import SearchSpace, load_space
from qnas.training.loop import stream
from qnas.training.optimizer import make_optimizer, make_schedule, weight_step
from qnas.training.scoring import classify

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
OUT = FOLDER / "results"  # data of RESULTS.md: each training, supernet and search is a line
WINDOW = 0.97  # networks "of one latency" have at least this share of it
RIVALS = 10  # random networks of one latency, for each seed
SEARCH_SEEDS = (0, 1, 2)
TRAINED_PX = 32  # image size of all trainings
PILOT_STEPS = 30  # steps to time before a supernet is trained for a given time
DRAWS = 2000  # bootstrap samples
LEVEL = 0.95


@dataclass(frozen=True)
class Recipe:
    """The recipe of all trainings of single networks from scratch."""

    images: int = 10_000  # number of training images, equally many of each class
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_epochs: float = 0.5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1


# ---- data and spaces


def tiny_space(name: str, resolution_px: int = TRAINED_PX) -> SearchSpace:
    """Return one of the experiments' spaces, with latencies for images of this size."""
    return load_space(FOLDER / "spaces" / f"{name}.yaml").with_resolution(resolution_px)


def load_images(spec: str, images: int, *, resolution_px: int = TRAINED_PX) -> ImageData:
    """Read a data set and keep this many of its training images and all test images.

    A fifth of the kept images are held out; they are drawn from those that every run of qnas holds out.
    """
    data = load_data(parse_data_spec(spec), resolution_px=resolution_px)
    heldout = stratified(data.heldout, images // 5)
    train = stratified(data.train, images - len(heldout))
    # channels last in memory, as qnas keeps images
    pixels = torch.cat([train.read(torch.arange(len(train))), heldout.read(torch.arange(len(heldout)))])
    both = replace(
        data.train_and_heldout,
        images=pixels.contiguous(memory_format=torch.channels_last),
        labels=torch.cat([train.labels, heldout.labels]),
    )
    return replace(data, train=train, heldout=heldout, train_and_heldout=both)


def stratified(split: Split, count: int) -> Split:
    """Return `count` images of a split, evenly spaced within each class.

    Class sizes differ by at most one, except that classes with too few images are used completely.
    """
    classes = torch.unique(split.labels).tolist()
    kept = []
    for i, label in enumerate(classes):
        members = torch.nonzero(split.labels == label)[:, 0]
        wanted = min(count // len(classes) + (i < count % len(classes)), len(members))
        kept.append(members[torch.arange(wanted) * len(members) // max(wanted, 1)])
    places = torch.cat(kept).sort().values
    return replace(split, images=split.read(places), labels=split.labels[places])


# ---- cached results


class Cache:
    """Results as JSON lines, each with a key of everything on which it depends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # incomplete line of a stopped run
                    continue
                self._rows[row["key"]] = row

    def get(self, parts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result for these parts, or None."""
        return self._rows.get(cache_key(parts))

    def matching(self, parts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the results that have these parts among others, in the order in which they were stored."""
        return [row for row in self._rows.values() if all(row.get(k) == v for k, v in parts.items())]

    def put(self, parts: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Store a result, and return it with its parts."""
        row = {"key": cache_key(parts), **parts, **found}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            # a stopped run may have left an incomplete line
            is_whole = file.tell() == 0 or _last_byte(self._path) == b"\n"
            file.write((b"" if is_whole else b"\n") + json.dumps(row).encode() + b"\n")
        self._rows[row["key"]] = row
        return row


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return a key for JSON values that does not depend on the order of names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def blocks_of(space: SearchSpace, arch: Arch) -> list[list[str]]:
    """Return the chosen blocks by stage without identities. Equal networks have equal blocks."""
    rows = zip(space.positions, arch.choices, strict=True)
    return [
        [choice for _, choice in stage if choice != "identity"]
        for _, stage in groupby(rows, key=lambda row: row[0].stage)
    ]


# ---- networks trained alone


def training_parts(
    space: SearchSpace, arch: Arch, data: ImageData, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Return all on which a training depends. The image size of latencies is not part of it."""
    return {
        "space": space.with_resolution(TRAINED_PX).digest,
        "blocks": blocks_of(space, arch),
        "data": data.digest,
        "recipe": asdict(recipe),
        "start_taps": blocks.ENVELOPE_TAPS,
        "seed": seed,
    }


def known_training(
    space: SearchSpace, arch: Arch, data: ImageData, recipe: Recipe, seed: int, cache: Cache
) -> dict[str, Any] | None:
    """Return the result of a network's training, or None if it is not done yet."""
    return cache.get(training_parts(space, arch, data, recipe, seed))


def train_alone(
    space: SearchSpace, arch: Arch, data: ImageData, recipe: Recipe, seed: int, cache: Cache
) -> dict[str, Any]:
    """Train a network from scratch on all kept training images. Return its `accuracy` on test images.

    The seed determines the initial weights and the order of images. A cached result is reused.
    """
    parts = training_parts(space, arch, data, recipe, seed)
    return train_once(lambda: build_subnet(space, arch, len(data.classes)), parts, data, recipe, seed, cache)


def train_once(
    build: Callable[[], nn.Module],
    parts: Mapping[str, Any],
    data: ImageData,
    recipe: Recipe,
    seed: int,
    cache: Cache,
) -> dict[str, Any]:
    """Build a network and train it from scratch on all kept training images, as `train_alone` does.

    `parts` are all on which the training depends. A cached result is reused.
    """
    known = cache.get(parts)
    if known is not None:
        return known
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().train()
    split = data.train_and_heldout
    optimizer = make_optimizer(network.parameters(), recipe.learning_rate, recipe.weight_decay)
    epoch_steps = len(split) // recipe.batch_size
    steps = recipe.epochs * epoch_steps
    schedule = make_schedule(optimizer, steps, round(recipe.warmup_epochs * epoch_steps))
    images_and_labels = stream(split, recipe.batch_size, seed, 0, augment=True)
    for _ in range(steps):
        images, labels = next(images_and_labels)
        weight_step(network, optimizer, images, labels, recipe.label_smoothing)
        schedule.step()
    score = classify(network.eval(), batches(data.test, 256)).score
    spent = time.process_time() - start
    print(f"{data.name}, seed {seed}: {percent(score.accuracy)} in {spent:.0f} s", flush=True)
    found = {"accuracy": score.accuracy, "loss": score.loss, "seconds": spent}
    return cache.put(parts, found)


def spread_networks(space: SearchSpace, table: LatencyTable, count: int, seed: int) -> list[Arch]:
    """Draw one network from each of `count` equal latency intervals.

    The intervals leave out the first and last twentieth of the range, where there are few networks.
    """
    rng = np.random.default_rng(seed)
    reach = table.slowest_ms - table.fastest_ms
    edges = table.fastest_ms + reach * np.linspace(0.05, 0.95, count + 1)
    return [draw_networks(space, table, float(low), float(high), 1, rng)[0] for low, high in pairwise(edges)]


def draw_networks(
    space: SearchSpace,
    table: LatencyTable,
    low_ms: float,
    high_ms: float,
    count: int,
    rng: np.random.Generator,
) -> list[Arch]:
    """Draw `count` different networks with a latency in [low, high]."""
    found: dict[str, Arch] = {}
    for indices in sample_near(table, low_ms, high_ms, 20 * count, rng):
        arch = arch_from_indices(space, indices)
        found.setdefault(json.dumps(blocks_of(space, arch)), arch)
    assert len(found) >= count, f"{len(found)} networks of {low_ms} to {high_ms} ms, wanted {count}"
    return list(found.values())[:count]


def middle_ms(table: LatencyTable) -> float:
    """Return the middle between the latencies of the fastest and the slowest network."""
    return (table.fastest_ms + table.slowest_ms) / 2


def rivals(
    space: SearchSpace, table: LatencyTable, budget_ms: float, seed: int, count: int = RIVALS
) -> list[Arch]:
    """Draw the networks of the budget's latency with which a search of this seed is compared."""
    rng = np.random.default_rng([seed, count])
    return draw_networks(space, table, WINDOW * budget_ms, budget_ms, count, rng)


# ---- supernets


# Weight sharing modes, with the steps that train the weights.
ARMS: dict[str, dict[str, Any]] = {
    "independent": {"weights": "independent"},
    "shared": {"weights": "shared"},
    "shared-by-probabilities": {"weights": "shared", "paths": "probabilities"},
    "nested": {"weights": "nested", "nested_weight_steps": "sampled"},
    "nested-mixture": {"weights": "nested", "nested_weight_steps": "mixture"},
}


def base_config(arm: str, seed: int) -> SearchConfig:
    """Return the common configuration of all supernets. Their epochs are planned by time."""
    return SearchConfig(
        preset="benchmark",
        resolution_px=TRAINED_PX,
        warmup_epochs=1,
        search_epochs=1,
        batch_size=64,
        learning_rate=2e-3,
        arch_learning_rate=0.05,
        arch_every=3,
        threads=1,
        seed=seed,
        **ARMS[arm],
    )


def epoch_seconds(space: SearchSpace, limits: Limits, data: ImageData, config: SearchConfig) -> float:
    """Time the first steps of a configuration, and return the seconds per epoch of its first phase."""
    searcher = Searcher(space, limits, data, config)
    searcher.step()
    start = time.process_time()
    for _ in range(PILOT_STEPS):
        searcher.step()
    return (time.process_time() - start) / PILOT_STEPS * searcher.schedule.steps_per_epoch


def plan_epochs(warm_up_s: float, search_s: float, seconds: float, warm_up_share: float) -> tuple[int, int]:
    """Return the epochs of warm-up and of search, at least one each, that take `seconds` together.

    `warm_up_s` and `search_s` are seconds per epoch. `warm_up_share` is the warm-up's share of the epochs.
    """
    total = seconds / (warm_up_share * warm_up_s + (1 - warm_up_share) * search_s)
    warm_up = max(1, round(warm_up_share * total))
    return warm_up, max(1, round((seconds - warm_up * warm_up_s) / search_s))


# ---- figures


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def rank_interval(
    first: Sequence[float], second: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return Kendall's tau-b of two sequences of figures, with a percentile interval by bootstrap.

    The bootstrap draws networks, each with both its figures. A network that is drawn twice ties with itself
    in both sequences, which tau-b ignores. Samples with a constant sequence have no tau and are not counted.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert x.shape == y.shape == (len(x),), (x.shape, y.shape)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(x), size=(draws, len(x)))
    taus = np.array([kendalltau(x[pick], y[pick]).statistic for pick in picks])
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(taus, [tail, 100 - tail])
    return Interval(float(kendalltau(x, y).statistic), float(low), float(high))


def upper_half(figures: Sequence[float]) -> NDArray[np.int64]:
    """Return the sorted indices of the better half of the figures, rounded up."""
    count = (len(figures) + 1) // 2
    return np.sort(np.argsort(-np.asarray(figures), kind="stable")[:count])


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (NaN for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def percent(value: float, sd: float = math.nan) -> str:
    """Format a fraction as a percentage: `87.3%`, or with its spread `87.3 ± 0.4%`."""
    return f"{100 * value:.1f}%" if math.isnan(sd) else f"{100 * value:.1f} ± {100 * sd:.1f}%"


# ---- tables


def describe_recipe(recipe: Recipe) -> str:
    """Describe in a sentence how single networks are trained."""
    return (
        f"Trained alone: {recipe.images} training images, {recipe.epochs} epochs of batches of "
        f"{recipe.batch_size}, AdamW at {recipe.learning_rate:g} with a cosine, weight decay "
        f"{recipe.weight_decay:g}, label smoothing {recipe.label_smoothing:g}, shifts and flips; accuracy "
        "on all test images."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. All columns except the first are right-aligned."""
    assert all(len(row) == len(header) for row in rows), "rows of another length than the header"
    rules = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rules, *rows))


def write_section(path: Path, name: str, text: str) -> None:
    """Write a text between the marks of a section in a file. A new section is added at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if begin in before:
        head, _, rest = before.partition(begin)
        _, _, tail = rest.partition(end)
        write_text(path, head + section + tail)
    else:
        write_text(path, before + ("\n" if before else "") + section + "\n")
