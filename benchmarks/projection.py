"""The time of a search and a training on ImageNet, by arithmetic: what is measured, predicted and assumed.

No search has run on several GPUs yet. What was measured on a GPU is the forward pass of QuadraNet36-T
(`gpu.py`), or, where `scale.py --parts steps --torch-device cuda` has run, the steps of a search themselves.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnas.data.decoding import MOST_THREADS
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.search.config import SearchConfig
from qnas.spaces.space import load_space
from qnas.training.recipe import Recipe

FOLDER = Path(__file__).parent / "results"
MEASURED_GPU = FOLDER / "gpu_h200.json"
MEASURED_NETWORK, DTYPE, PX = "QuadraNet36-T", "float32", 224
RELATIVE_DEVICE = "a100-throughput"  # float32 with TF32, as the measurement
LAUNCH_DEVICE = "a100-eager"  # one image, every operator launched and waited for: at most what launches take
TRAIN_IMAGES, TEST_IMAGES = 1_281_167, 50_000  # of ImageNet-1k
HELD_OUT = 0.2  # of the training images, in a search
PRESET, RECIPE = "photos", "imagenet"
HOUR_S = 3600.0


@dataclass(frozen=True)
class Cost:
    """What a step takes on one GPU: seconds an image, and the least, for launching the operators."""

    image_s: float
    least_s: float

    def step_s(self, batch: int) -> float:
        """Return the seconds of a step with this many images."""
        return max(batch * self.image_s, self.least_s)

    def shown(self, batch: int) -> str:
        """Describe a step with this many images."""
        side = "images" if batch * self.image_s > self.least_s else "launches"
        return f"{1e3 * self.step_s(batch):.1f} ms with {batch} images a GPU (bound by {side})"


@dataclass(frozen=True)
class Costs:
    """The costs of both kinds of steps of a search, and the arithmetic that they come from."""

    weight: Cost
    arch: Cost
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Cluster:
    """GPUs of one machine, and the speed of each beside the others, as a share of its own: an assumption."""

    gpus: int = 8
    efficiency: float = 0.85
    batch: int = 64  # of each GPU

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.batch < 1 or not 0 < self.efficiency <= 1:
            raise ValueError(f"gpus, batch >= 1 and 0 < efficiency <= 1 must hold, but got {self}")

    @property
    def slower(self) -> float:
        """How much longer a step takes than that of one GPU with its part of the batch."""
        return 1 / self.efficiency if self.gpus > 1 else 1.0


def measured_costs(row: Mapping[str, Any]) -> Costs:
    """Return the costs that were measured on a GPU, in a row of the steps of a space."""
    weight_s, arch_s = (row["median_s"][f"{PX} px, {kind}"] for kind in ("weight", "arch"))
    line = (
        f"measured, {row['machine']}: a weight step takes {1e3 * weight_s:.1f} ms, an architecture step "
        f"{1e3 * arch_s:.1f} ms ({row['space']}, {PX} px, batch {row['batch']}); assumed: larger batches "
        "take as much longer, smaller ones as long"
    )
    weight, arch = (Cost(seconds / row["batch"], seconds) for seconds in (weight_s, arch_s))
    return Costs(weight, arch, (line,))


def derived_costs(row: Mapping[str, Any], gpu: Path = MEASURED_GPU) -> Costs:
    """Return costs from a network's measured forward pass and the steps' forward passes on a CPU."""
    document = json.loads(gpu.read_text(encoding="utf-8"))
    (own,) = (
        each for each in document["networks"] if (each["network"], each["dtype"]) == (MEASURED_NETWORK, DTYPE)
    )
    share = relative_ms(row["space"])
    forward_s, launch_s = share / own["images_per_s"], launch_seconds(row["space"])
    seconds = {kind: row["median_s"][f"{PX} px, {kind}"] for kind in ("forward", "weight", "arch")}
    weight, arch = (seconds[kind] / seconds["forward"] for kind in ("weight", "arch"))
    lines = (
        f"measured, {document['device']}: the forward pass of {own['network']}, {PX} px, {own['dtype']}, "
        f"batch {document['batch']}: {own['images_per_s']:,.0f} images/s = "
        f"{1e3 / own['images_per_s']:.3f} ms an image",
        f"predicted, device {RELATIVE_DEVICE}: a network in the middle of the range of {row['space']} takes "
        f"{share:.2f} of it = {1e3 * forward_s:.3f} ms an image",
        f"measured, {row['machine']}: a weight step takes {weight:.2f} forward passes, an architecture step "
        f"{arch:.2f} ({row['space']}, {PX} px, batch {row['batch']})",
        f"assumed: on the GPU too: {1e3 * weight * forward_s:.3f} and {1e3 * arch * forward_s:.3f} ms "
        "an image",
        f"predicted, device {LAUNCH_DEVICE}: launching the operators of a forward pass one by one takes "
        f"{1e3 * launch_s:.1f} ms; assumed: no step is faster than as many of them, "
        f"{1e3 * weight * launch_s:.0f} and {1e3 * arch * launch_s:.0f} ms",
    )
    costs = (Cost(passes * forward_s, passes * launch_s) for passes in (weight, arch))
    return Costs(*costs, lines)


def launch_seconds(space_name: str) -> float:
    """Return the predicted seconds of a pass in the middle of a range, with every launch waited for."""
    table = compute_table(load_device(LAUNCH_DEVICE), load_space(space_name).with_resolution(PX))
    return (table.fastest_ms + table.slowest_ms) / 2e3


def relative_ms(space_name: str, device_name: str = RELATIVE_DEVICE) -> float:
    """Return the predicted time in the middle of a space's range, as a share of the measured network's.

    The searches of `scale.py` have their budget in the middle of the range.
    """
    device = load_device(device_name)
    table = compute_table(device, load_space(space_name).with_resolution(PX))
    network = compute_table(device, load_space(MEASURED_NETWORK.lower()).with_resolution(PX))
    return (table.fastest_ms + table.slowest_ms) / 2 / network.fastest_ms


def arithmetic(costs: Costs, cluster: Cluster, space: str) -> Iterator[str]:
    """Yield the lines of the projection."""
    yield from costs.lines
    yield (
        f"assumed: on {cluster.gpus} GPUs a step takes {cluster.slower:.2f} times as long as on one with its "
        f"part of the batch (`--efficiency {cluster.efficiency:g}`)"
    )
    config, recipe = SearchConfig.load(PRESET), Recipe.load(RECIPE)
    images, each = round(TRAIN_IMAGES * (1 - HELD_OUT)), cluster.batch
    epoch = images // (cluster.gpus * each)
    warmup, searched = (epoch * epochs for epochs in (config.warmup_epochs, config.search_epochs))
    weights, archs = warmup + searched, searched // config.arch_every
    seconds = (weights * costs.weight.step_s(each) + archs * costs.arch.step_s(each)) * cluster.slower
    yield (
        f"search, preset {PRESET}: {images:,} training images, {TRAIN_IMAGES - images:,} held out; "
        f"{images:,} / ({cluster.gpus} x {each}) = {epoch:,} steps an epoch; {config.warmup_epochs} + "
        f"{config.search_epochs} epochs = {weights:,} weight steps; {searched:,} / {config.arch_every} = "
        f"{archs:,} architecture steps"
    )
    yield f"a weight step takes {costs.weight.shown(each)}, an architecture step {costs.arch.shown(each)}"
    yield (
        f"search of {space}: ({weights:,} x {1e3 * costs.weight.step_s(each):.1f} ms + {archs:,} x "
        f"{1e3 * costs.arch.step_s(each):.1f} ms) x {cluster.slower:.2f} = **{seconds / HOUR_S:.1f} hours**, "
        f"{1e3 * seconds / weights:.0f} ms a step, without effects and ranking"
    )
    each, steps = recipe.batch_size // cluster.gpus, recipe.epochs * (TRAIN_IMAGES // recipe.batch_size)
    seconds = steps * costs.weight.step_s(each) * cluster.slower
    yield (
        f"training, recipe {RECIPE}: {recipe.epochs} epochs of {TRAIN_IMAGES:,} / {recipe.batch_size:,} "
        f"steps = {steps:,} steps of {costs.weight.shown(each)}, x {cluster.slower:.2f} = "
        f"**{seconds / HOUR_S:.1f} hours**; assumed: a step of one network takes as long as one of a path"
    )


def cores_line(costs: Costs, cluster: Cluster, row: Mapping[str, Any]) -> str:
    """Return the line that says how many cores decode what the GPUs train on."""
    each = row["again"]["images_per_core_s"]
    wanted = cluster.gpus * cluster.batch / (costs.weight.step_s(cluster.batch) * cluster.slower)
    width, height = row["size"]
    return (
        f"images: weight steps of a search take {wanted:,.0f} images/s; measured, {row['machine']}: one core "
        f"decodes {each:,.0f} JPEGs of {width} x {height} a second to {row['resolution_px']} px: "
        f"**{wanted / each:.0f} cores** for {cluster.gpus} GPUs, if cores add up (assumed); qnas decodes "
        f"with at most {MOST_THREADS} threads in each process, {cluster.gpus * MOST_THREADS} in all"
    )


def memory_line(row: Mapping[str, Any]) -> str:
    """Return the line that says what the list of images takes, by the largest set that was measured."""
    each = row["first"]["held_bytes"] / row["images"]
    total = each * (TRAIN_IMAGES + TEST_IMAGES)
    return (
        f"memory: {each:,.0f} bytes an image of {row['kind']} (measured with {row['images']:,}) x "
        f"{TRAIN_IMAGES + TEST_IMAGES:,} images = {total / 1e9:.2f} GB in each process"
    )


def commands(cluster: Cluster, space: str) -> tuple[str, str]:
    """Return the commands of a search and a training on ImageNet as shards."""
    start = f"torchrun --standalone --nproc-per-node {cluster.gpus} -m qnas.commands"
    batch = cluster.gpus * cluster.batch
    return (
        f"{start} search --device gpu --budget 2ms --space {space} --data shards:DIR --preset {PRESET} "
        f"--batch-size {batch} --out RUN",
        f"{start} train-subnet RUN --recipe {RECIPE}",
    )
