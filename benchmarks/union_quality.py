"""Quadratic blocks, inverted residuals and both in one space, at equal latency: random networks and searches.

    python benchmarks/union_quality.py --data cifar10:DIR --data fashion-mnist:DIR [--write]

union-tiny holds inverted residuals, star blocks and QuadraBlocks side by side; its families are

- quadratic: the candidates with a product (inverted residuals and QuadraBlocks of the factored neuron, star);
- inverted: inverted residuals as in MobileNetV2;
- union: all of them.

Budgets are SHARES of the way from the fastest to the slowest inverted residuals, with latencies at 96 px.
For each device, budget and data set there are random networks of each family that take at least 97% of the
budget, and searches of each family with `qnas search --finalists`, of the same processor time: half of it
for the supernet, half for the finalists. `union, supernet alone` spends it all on the supernet.
`union, layouts` searches over three widths of each stage and three resolutions as well. All networks are
trained alone with one recipe and one seed; the seeds of the table are those of the searches.

Epochs of searches are planned from some timed steps, in processor time of one thread, which other programs
hardly change. Every training and search is a line in results/, so that a stopped run goes on. --devices,
--data, --seeds and --parts select what is run, and --write writes all that is known to RESULTS.md. On one
thread, a data set at both budgets should take some three hours, which has not been measured.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments import (
    OUT,
    RESULTS,
    TRAINED_PX,
    Cache,
    Recipe,
    base_config,
    describe_recipe,
    epoch_seconds,
    load_images,
    markdown_table,
    mean_and_sd,
    percent,
    plan_epochs,
    rivals,
    tiny_space,
    train_once,
    training_parts,
    write_section,
)

import qnas
from qnas.common import host
from qnas.data.datasets import Datasets
from qnas.data.image_data import ImageData, Split
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import LatencyTable
from qnas.nn.subnet import build_subnet
from qnas.search.config import SearchConfig
from qnas.solver.kinds import kinds_of
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.loop import set_up_process

SPACE, DEPLOYED_PX = "union-tiny", 96
DEVICES = ("cpu", "vpu", "gpu")
# Budgets, of the way from the fastest to the slowest inverted residuals: where some of the blocks fit, so
# that it matters which. On other devices than the first, the first one alone.
SHARES = (0.15, 0.3)
FAMILIES = {"inverted": ("mbconv",), "quadratic": ("mbconv_factored", "star", "quadra_factored")}
UNION, BASE = "union", "inverted"
RANDOM = {UNION: 10, "quadratic": 5, "inverted": 5}  # networks
LAYOUTS, ALONE = "union, layouts", "union, supernet alone"
SEARCHES = ("inverted", "quadratic", UNION, ALONE, LAYOUTS)
WIDTHS, RESOLUTIONS = (0.75, 1.0, 1.25), (72, 96, 120)
SEEDS, OTHERS_SEEDS = (0, 1, 2), (0,)
SECONDS = 300.0  # of a search: processor time
FINALISTS = 6
WARM_UP_SHARE = 0.4  # of a supernet's epochs
RECIPE = Recipe(images=20_000, epochs=9, learning_rate=2e-3)
TRAINING_SEED = 0
FLIPPED = ("cifar10",)  # data sets whose images show the same mirrored


@dataclass(frozen=True)
class Task:
    """A device with its budget, and the data."""

    device: str
    share: float
    data: str

    @property
    def budget_ms(self) -> float:
        """The budget: a share of the range of inverted residuals."""
        table = table_of(self.device, BASE)
        return table.fastest_ms + self.share * (table.slowest_ms - table.fastest_ms)


@cache
def union() -> SearchSpace:
    """Return the space of all candidates, with latencies at DEPLOYED_PX."""
    return tiny_space(SPACE, DEPLOYED_PX)


@cache
def family_of(name: str) -> SearchSpace:
    """Return the union, or the space of the candidates of one family."""
    if name == UNION:
        return union()
    space = union()
    kinds = dict(zip(space.positions[0].names, kinds_of(space)[0], strict=True))
    kept = [name_of for name_of, kind in kinds.items() if not kind or kind in FAMILIES[name]]
    content = space.model_dump(mode="json", by_alias=True, exclude_unset=True)
    candidates = {c.name: c for c in space.positions[0].candidates}
    content["candidates"] = [candidates[each].model_dump(mode="json", by_alias=True) for each in kept]
    content["name"] = f"{name}-tiny"
    return SearchSpace.model_validate(content)


@cache
def table_of(device: str, family: str = UNION) -> LatencyTable:
    """Return the latencies of a family on a device."""
    return compute_table(load_device(device), family_of(family))


def random_networks(task: Task, family: str) -> list[Arch]:
    """Return random networks of a family that take the budget, in the union."""
    found = rivals(family_of(family), table_of(task.device, family), task.budget_ms, 0, RANDOM[family])
    return [make_arch(union(), arch.choices) for arch in found]


# ---- data


@cache
def images_of(spec: str, px: int = TRAINED_PX) -> ImageData:
    """Return the images of the experiments at a size."""
    return load_images(spec, RECIPE.images, resolution_px=px)


class Pixels(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """A split as a map-style Dataset."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.read(torch.arange(len(split))), split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index].contiguous(), int(self.labels[index])


def datasets_of(spec: str, px: int) -> Datasets:
    """Return the same images as a user would give them to a search."""
    data = images_of(spec, px)
    flip = spec.partition(":")[0] in FLIPPED
    train, heldout, test = (Pixels(split) for split in (data.train, data.heldout, data.test))
    return Datasets(train, heldout, test, classes=data.classes, name=data.name, flip=flip)


# ---- trainings and searches


def train(space: SearchSpace, arch: Arch, spec: str, trained: Cache) -> dict[str, Any]:
    """Train a network alone, at the size of images that goes with its resolution."""
    px = TRAINED_PX * space.input.resolution_px // DEPLOYED_PX
    data = images_of(spec, px)
    parts = parts_of(space, arch, spec)
    return train_once(
        lambda: build_subnet(space, arch, len(data.classes)), parts, data, RECIPE, TRAINING_SEED, trained
    )


def parts_of(space: SearchSpace, arch: Arch, spec: str) -> dict[str, Any]:
    """Return everything on which a training depends."""
    px = TRAINED_PX * space.input.resolution_px // DEPLOYED_PX
    parts = training_parts(space, arch, images_of(spec, px), RECIPE, TRAINING_SEED)
    return parts if px == TRAINED_PX else parts | {"px": px}


def search_parts(task: Task, arm: str, seed: int) -> dict[str, Any]:
    """Return everything on which a search depends."""
    return {
        "experiment": "union_quality",
        "space": union().digest,
        "task": [task.device, task.share, images_of(task.data).digest],
        "arm": arm,
        "seed": seed,
        "seconds": SECONDS,
        "finalists": 0 if arm == ALONE else FINALISTS,
        "layouts": [WIDTHS, RESOLUTIONS] if arm == LAYOUTS else [],
    }


def search(task: Task, arm: str, seed: int, searched: Cache) -> dict[str, Any]:
    """Search, and return the network that was found with its space."""
    parts = search_parts(task, arm, seed)
    if (known := searched.get(parts)) is not None:
        return known
    family = arm if arm in FAMILIES else UNION
    finalists = 0 if arm == ALONE else FINALISTS
    px = TRAINED_PX * max(RESOLUTIONS) // DEPLOYED_PX if arm == LAYOUTS else TRAINED_PX
    config = base_config("shared", seed)
    seconds = SECONDS if arm == ALONE else SECONDS / 2
    epochs = planned_epochs(task, family, config, seconds)
    settings: dict[str, Any] = {
        "warmup_epochs": epochs[0],
        "search_epochs": epochs[1],
        "finalists": finalists,
        "resolution_px": px,
    }
    if arm == LAYOUTS:
        settings |= {"width_multipliers": WIDTHS, "resolutions": RESOLUTIONS}
    fixed = {
        key: getattr(config, key)
        for key in ("batch_size", "learning_rate", "arch_learning_rate", "arch_every", "weights", "threads")
    }
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = qnas.run_search(
            family_of(family),
            {task.device: f"{task.budget_ms}ms"},
            data=datasets_of(task.data, px),
            out=Path(folder) / "run",
            random_networks=0,
            seed=seed,
            **fixed,
            **settings,
        )
    spent = time.process_time() - start
    facts = {
        "epochs": epochs,
        "spent_s": spent,
        "of_space": found.space.to_yaml(),
        "choices": found.arch.choices,
        "heldout_accuracy": found.heldout_accuracy,
        "latency_ms": found.latency_ms,
    }
    print(
        f"{task.data.partition(':')[0]} {task.device} {arm}, seed {seed}: {epochs} in {spent:.0f} s",
        flush=True,
    )
    return searched.put(parts, facts)


def planned_epochs(task: Task, family: str, config: SearchConfig, seconds: float) -> tuple[int, int]:
    """Return the epochs of a supernet that take some processor seconds."""
    space, data = family_of(family), images_of(task.data)
    limits = (latency_limit(table_of(task.device, family), task.budget_ms),)
    warm_up_s = epoch_seconds(space, limits, data, config)
    search_s = epoch_seconds(space, limits, data, config.override({"warmup_epochs": 0}))
    return plan_epochs(warm_up_s, search_s, seconds, WARM_UP_SHARE)


def network_of(row: Mapping[str, Any]) -> tuple[SearchSpace, Arch]:
    """Return the network of a search; in the union where it has its layout, so that it is trained once."""
    space = parse_space(row["of_space"], "the space of a search")
    arch = make_arch(space, tuple(row["choices"]))
    if space.with_resolution(DEPLOYED_PX).stages == union().stages and space.input == union().input:
        return union(), make_arch(union(), arch.choices)
    return space, arch


# ---- the table


@dataclass(frozen=True)
class Outcome:
    """A network with its accuracy when trained alone."""

    kind: str
    accuracy: float
    latency_ms: float
    macs: int
    params: int


def outcomes(task: Task, searched: Cache, trained: Cache) -> Iterator[Outcome]:
    """Yield what is known of a task: random networks first."""
    networks: list[tuple[str, SearchSpace, Arch]] = [
        (f"random {family}", union(), arch) for family in RANDOM for arch in random_networks(task, family)
    ]
    for arm in SEARCHES:
        for seed in SEEDS:
            row = searched.get(search_parts(task, arm, seed))
            if row is not None:
                networks.append((f"searched {arm}", *network_of(row)))
    for kind, space, arch in networks:
        row = trained.get(parts_of(space, arch, task.data))
        if row is not None:
            blocks = lower(space, arch)
            latency_ms = compute_table(load_device(task.device), space).latency_ms(arch.indices(space))
            yield Outcome(kind, row["accuracy"], latency_ms, count_macs(blocks), count_params(blocks))


def describe(task: Task, found: Sequence[Outcome]) -> str:
    """Return a task's table: gains are over the mean of random networks of the union."""
    random = [each.accuracy for each in found if each.kind == f"random {UNION}"]
    rows = []
    for kind in dict.fromkeys(each.kind for each in found):
        own = [each for each in found if each.kind == kind]
        accuracies = [each.accuracy for each in own]
        gain = f"{100 * (fmean(accuracies) - fmean(random)):+.1f}" if random else ""
        beaten = ""
        if kind.startswith("searched") and random:
            beaten = ", ".join(f"{sum(a > other for other in random)}" for a in accuracies)
        rows.append(
            [
                kind,
                str(len(own)),
                percent(*mean_and_sd(accuracies)),
                gain,
                beaten,
                f"{fmean(each.latency_ms for each in own):.3f}",
                f"{fmean(each.macs for each in own) / 1e6:.1f}",
                f"{fmean(each.params for each in own) / 1e3:.0f}",
            ]
        )
    header = [
        "network",
        "count",
        "accuracy",
        "gain",
        f"beaten of {len(random)}",
        "ms",
        "M MACs",
        "k parameters",
    ]
    name = task.data.partition(":")[0]
    title = f"### {name}, {task.device}, {task.budget_ms:.3f} ms ({task.share:g} of the range)"
    return f"{title}\n\n{markdown_table(header, rows)}"


HEAD = f"""## Quadratic blocks, inverted residuals and their union

`python benchmarks/union_quality.py`. {describe_recipe(RECIPE)} Searches take {SECONDS:.0f} s of processor
time. `gain` is in points over the mean of random networks of the union, `beaten` how many of these each
search's network beats. The head of the script says what is compared."""


def tasks_of(devices: Sequence[str], data: Sequence[str], shares: Sequence[float]) -> list[Task]:
    """Return the tasks: all shares on cpu, the first one on other devices, there on the first data set."""
    return [
        Task(device, share, spec)
        for device in devices
        for spec in (data if device == DEVICES[0] else data[:1])
        for share in (shares if device == DEVICES[0] else shares[:1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("--devices", nargs="+", default=[DEVICES[0]], choices=DEVICES)
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--parts", nargs="*", default=["random", "searches"], choices=["random", "searches"])
    parser.add_argument("--arms", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    trained, searched = (Cache(options.out / f"union_{name}.jsonl") for name in ("trainings", "searches"))
    tasks = tasks_of(options.devices, options.data, options.shares)
    for task in tasks:
        if "random" in options.parts:
            for family in RANDOM:
                for arch in random_networks(task, family):
                    train(union(), arch, task.data, trained)
        if "searches" in options.parts:
            for seed in options.seeds if task.device == DEVICES[0] else OTHERS_SEEDS:
                for arm in options.arms:
                    train(*network_of(search(task, arm, seed, searched)), task.data, trained)
    tables = [describe(task, found) for task in tasks if (found := list(outcomes(task, searched, trained)))]
    text = "\n\n".join([HEAD, host.cpu_name() + ".", *tables])
    print(text)
    if options.write:
        write_section(RESULTS, "union_quality", text)


if __name__ == "__main__":
    main()
