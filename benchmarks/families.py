"""Families of blocks at equal latency: their spaces, data, searches and trainings, of two scales.

A union space holds inverted residuals, star blocks and QuadraBlocks side by side; its families are

- quadratic: the candidates with a product (inverted residuals and QuadraBlocks of the factored neuron, star);
- inverted: inverted residuals as in MobileNetV2;
- union: all of them.

Networks of all families are networks of the union too, and are trained alone with one recipe and one seed. A
search of any family has about the same processor time of one thread, which other programs hardly change: the
epochs of its supernet are planned from some timed steps, and its finalists are trained as networks alone are.
Trainings and searches are lines of results.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import (
    TRAINED_PX,
    Cache,
    Recipe,
    base_config,
    epoch_seconds,
    load_images,
    plan_epochs,
    rivals,
    tiny_space,
    train_once,
    training_parts,
)

import qnas
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
from qnas.spaces.family import make_family, multiplied_widths
from qnas.spaces.space import Candidate, SearchSpace, load_space, parse_space

FAMILIES = {"inverted": ("mbconv",), "quadratic": ("mbconv_factored", "star", "quadra_factored")}
UNION, BASE = "union", "inverted"
LAYOUTS, ALONE = "union, layouts", "union, supernet alone"  # searches of the union
WIDTHS, RESOLUTIONS = (0.75, 1.0, 1.25), (0.75, 1.0, 1.25)  # multipliers of LAYOUTS
SUPERNET_SHARE = 1 / 3  # of a search's time where there are finalists, which take about the rest
WARM_UP_SHARE = 0.4  # of a supernet's epochs
RECIPE = Recipe(images=20_000, epochs=9, learning_rate=2e-3)
TRAINING_SEED = 0
FLIPPED = ("cifar10",)  # data sets whose images show the same mirrored


@dataclass(frozen=True)
class Scale:
    """A union space with its size of images in deployment, and the size here."""

    name: str  # the space is union-NAME
    deployed_px: int
    trained_px: int
    seconds: float  # of a search: processor time
    finalists: int

    def here(self, px: int) -> int:
        """Return the size of images here of networks that are deployed at `px`."""
        return self.trained_px * px // self.deployed_px


TINY = Scale("tiny", deployed_px=96, trained_px=TRAINED_PX, seconds=450.0, finalists=12)
# the last maps have 2 x 2 pixels
MOBILE = Scale("mobile", deployed_px=224, trained_px=48, seconds=2400.0, finalists=6)


@dataclass(frozen=True)
class Task:
    """A device with its budget, and the data."""

    device: str
    budget: float | str  # a share of the range of inverted residuals, or such as 30ms
    data: str
    scale: Scale = TINY

    @property
    def budget_ms(self) -> float:
        """The budget in ms."""
        if isinstance(self.budget, str):
            return float(self.budget.removesuffix("ms"))
        table = table_of(self.scale, self.device, BASE)
        return table.fastest_ms + self.budget * (table.slowest_ms - table.fastest_ms)


@cache
def union_of(scale: Scale) -> SearchSpace:
    """Return the union space, with latencies at its size of deployment."""
    name = f"union-{scale.name}"
    return tiny_space(name, scale.deployed_px) if scale.name == TINY.name else load_space(name)


@cache
def family_of(scale: Scale, name: str) -> SearchSpace:
    """Return the union, or the space of the candidates of one family."""
    union = union_of(scale)
    if name == UNION:
        return union
    kinds: dict[str, str] = {}  # by candidate
    for position, row in zip(union.positions, kinds_of(union), strict=True):
        kinds |= zip(position.names, row, strict=True)

    def kept(candidates: Sequence[Candidate]) -> list[Any]:
        return [
            each.model_dump(mode="json", by_alias=True)
            for each in candidates
            if not kinds[each.name] or kinds[each.name] in FAMILIES[name]
        ]

    content = union.model_dump(mode="json", by_alias=True, exclude_unset=True)
    content |= {"name": f"{name}-{scale.name}", "candidates": kept(union.candidates)}
    for written, stage in zip(content["stages"], union.stages, strict=True):
        if stage.candidates is not None:
            written["candidates"] = kept(stage.candidates)
    return SearchSpace.model_validate(content)


@cache
def table_of(scale: Scale, device: str, family: str = UNION) -> LatencyTable:
    """Return the latencies of a family on a device."""
    return compute_table(load_device(device), family_of(scale, family))


def random_networks(task: Task, family: str, count: int) -> list[tuple[SearchSpace, Arch]]:
    """Return random networks of a family that take the budget, each with its space.

    They are networks of the union; those of LAYOUTS are of random layouts, each in the union there.
    """
    union = union_of(task.scale)
    if family != LAYOUTS:
        table = table_of(task.scale, task.device, family)
        found = rivals(family_of(task.scale, family), table, task.budget_ms, 0, count)
        return [(union, make_arch(union, arch.choices)) for arch in found]
    layouts = make_family(union, _resolutions(task.scale), multiplied_widths(union, WIDTHS))
    networks = []
    for seed, at in enumerate(np.random.default_rng(0).permutation(len(layouts))):
        space = layouts.at(list(layouts.layouts())[at])
        table = compute_table(load_device(task.device), space)
        if table.fastest_ms <= task.budget_ms <= table.slowest_ms:
            networks += [(space, arch) for arch in rivals(space, table, task.budget_ms, seed, 1)]
        if len(networks) == count:
            break
    return networks


# ---- data


@cache
def images_of(spec: str, px: int) -> ImageData:
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


def train(task: Task, space: SearchSpace, arch: Arch, trained: Cache) -> dict[str, Any]:
    """Train a network alone, at the size of images that goes with its resolution."""
    data = images_of(task.data, task.scale.here(space.input.resolution_px))
    parts = parts_of(task, space, arch)
    return train_once(
        lambda: build_subnet(space, arch, len(data.classes)), parts, data, RECIPE, TRAINING_SEED, trained
    )


def parts_of(task: Task, space: SearchSpace, arch: Arch) -> dict[str, Any]:
    """Return everything on which a training depends."""
    px = task.scale.here(space.input.resolution_px)
    parts = training_parts(space, arch, images_of(task.data, px), RECIPE, TRAINING_SEED)
    return parts if px == TRAINED_PX else parts | {"px": px}


def search_parts(task: Task, arm: str, seed: int) -> dict[str, Any]:
    """Return everything on which a search depends."""
    return {
        "experiment": "union_quality",
        "space": union_of(task.scale).digest,
        "task": [task.device, task.budget, images_of(task.data, task.scale.trained_px).digest],
        "arm": arm,
        "seed": seed,
        "seconds": task.scale.seconds,
        "finalists": 0 if arm == ALONE else [task.scale.finalists, RECIPE.epochs, "scratch"],
        "layouts": [WIDTHS, _resolutions(task.scale)] if arm == LAYOUTS else [],
    }


def _resolutions(scale: Scale) -> list[int]:
    return [round(each * scale.deployed_px) for each in RESOLUTIONS]


def search(task: Task, arm: str, seed: int, searched: Cache) -> dict[str, Any]:
    """Search, and return the network that was found with its space."""
    parts = search_parts(task, arm, seed)
    if (known := searched.get(parts)) is not None:
        return known
    scale = task.scale
    family = arm if arm in FAMILIES else UNION
    px = scale.here(max(_resolutions(scale))) if arm == LAYOUTS else scale.trained_px
    config = base_config("shared", seed).override({"resolution_px": scale.trained_px})
    share = 1.0 if arm == ALONE else SUPERNET_SHARE
    epochs = planned_epochs(task, family, config, share * scale.seconds)
    settings: dict[str, Any] = {
        "warmup_epochs": epochs[0],
        "search_epochs": epochs[1],
        "resolution_px": px,
        "paths": "even",  # as all searches in results/ have them; presets draw them fairly
    }
    if arm != ALONE:
        settings |= {
            "finalists": scale.finalists,
            "finalist_epochs": RECIPE.epochs,
            "finalists_from": "scratch",  # as networks alone are trained
        }
    if arm == LAYOUTS:
        settings |= {"width_multipliers": WIDTHS, "resolutions": _resolutions(scale)}
    fixed = {
        key: getattr(config, key)
        for key in ("batch_size", "learning_rate", "arch_learning_rate", "arch_every", "weights", "threads")
    }
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if arm != ALONE:
            settings["finalist_recipe"] = recipe_file(Path(folder), px)
        found = qnas.run_search(
            family_of(scale, family),
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
    name = task.data.partition(":")[0]
    print(f"{name} {task.device} {arm}, seed {seed}: {epochs} in {spent:.0f} s", flush=True)
    return searched.put(parts, facts)


def recipe_file(folder: Path, px: int) -> str:
    """Write the recipe of trainings alone as a file for finalists, at a size of images; return its path."""
    content = asdict(RECIPE) | {"schema": "qnas.recipe/1", "resolution_px": px}
    del content["images"]
    path = folder / "alone.yaml"
    path.write_text(json.dumps(content))
    return str(path)


def planned_epochs(task: Task, family: str, config: SearchConfig, seconds: float) -> tuple[int, int]:
    """Return the epochs of a supernet that take some processor seconds."""
    space, data = family_of(task.scale, family), images_of(task.data, task.scale.trained_px)
    limits = (latency_limit(table_of(task.scale, task.device, family), task.budget_ms),)
    warm_up_s = epoch_seconds(space, limits, data, config)
    search_s = epoch_seconds(space, limits, data, config.override({"warmup_epochs": 0}))
    return plan_epochs(warm_up_s, search_s, seconds, WARM_UP_SHARE)


def network_of(scale: Scale, row: Mapping[str, Any]) -> tuple[SearchSpace, Arch]:
    """Return the network of a search; in the union where it has its layout, so that it is trained once."""
    space, union = parse_space(row["of_space"], "the space of a search"), union_of(scale)
    widths, own = ([stage.channels for stage in each.stages] for each in (space, union))
    if widths == own and space.input == union.input:
        space = union
    return space, make_arch(space, tuple(row["choices"]))
