"""What a search is worth to a user: its networks beside what else runs in the same time on the same device.

    python benchmarks/worth.py --data cifar10:DIR [--seeds 0 1 2] [--minutes 60] [--write]

The devices are `cpu`, as shipped, and `own`: this machine with onnxruntime on one thread, whose model is
fitted in the run to the times of NETWORKS networks (as in closed_loop.py, without a margin). Each has three
budgets at SHARES of the range of the default space, at PX pixels. For each budget and seed, these are trained
by one recipe (that of CIFAR-10 without stochastic depth, which other libraries' blocks would not take part
in), on the same images and for as many steps:

- searched: `qnas search`, `qnas train-subnet` from the supernet's weights, `qnas export`;
- searched, from scratch: the same network with new weights;
- random: a network of the same space that takes at least 97% of the budget;
- public: of the front of `qnas rivals` on FRONT, the network with the highest ImageNet top-1 that is within
  the budget at PX pixels, from timm. Its published weights are not used;
- scaled: the widest MobileNetV2 within the budget, from torchvision.

In a second training, the last three have the processor seconds that the search and its training took
together: epochs in proportion to what the first training took. Latencies are those of the device's model and,
for all networks together in interleaved rounds, of their ONNX files in onnxruntime on this machine. On `own`,
whether a public or a scaled network is within the budget is a matter of measurement: the model was fitted to
blocks that they do not have. Energy is processor seconds, and watt-hours of the whole machine where powercap
has a readable counter.

Each result is a line of results/worth.jsonl, so that a stopped run continues; --minutes starts nothing new
after that time. One process with one thread works on each budget, --processes of them at once. An hour of
two idle cores should do one seed of one data set, which has not been measured. The device is fitted and the
latencies are measured when no other process of the run works, and nothing else should then run on the
machine. Sizes, shares and the choice of networks were fixed before any accuracy was known.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from closed_loop import predict, times
from experiments import (
    OUT,
    RESULTS,
    WINDOW,
    Cache,
    cache_key,
    draw_networks,
    load_images,
    markdown_table,
    mean_and_sd,
    percent,
    write_section,
)
from numpy.typing import NDArray
from torch import nn
from torchvision.models import mobilenet_v2

import qnas
from qnas.common import host
from qnas.common.errors import QnasError
from qnas.common.files import write_bytes, write_text
from qnas.common.resources import DEFAULT_SPACE
from qnas.data.batches import batches
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import load_data
from qnas.deploy.export.tracing import trace_onnx
from qnas.deploy.measurement import Here, measure_sample, time_files
from qnas.deploy.sampling import CSV_FILE, choose_networks, write_sample
from qnas.deploy.timed_files import PLAIN
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import compute_table
from qnas.latency.fitting.measurements import read_measured
from qnas.latency.fitting.own_device import fit_own, own_device
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.space import SearchSpace, load_space
from qnas.training.loop import set_up_process
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.scoring import classify
from qnas.training.subnet_trainer import SubnetTrainer

DEVICES = ("cpu", "own")
SHARES = (0.2, 0.35, 0.5)  # the budgets, of the way from the fastest to the slowest network
# The 224 px of the default space would take a GPU. At 48 px its maps are 12, 6, 3 and 2 pixels wide, so that
# kernels still differ; at 32 px, its last blocks would see a single place.
PX, STORED_PX = 48, 32  # of the deployed networks; of the images as read, and of the search (preset `small`)
NETWORKS, REFERENCES = 60, 10  # timed for the model of this machine, and of these, timed again later
FRONT = {"cpu": "30ms"}  # public networks are from this front, which is about images of 224 px
WIDTHS = tuple(round(0.1 * i, 1) for i in range(1, 15))  # multiples of MobileNetV2's channels
TESTED = 10  # one of so many test images is tested on while networks train
BATCH = 64
WARM_UP = 2 / 3  # epochs of warm-up for each epoch of search, as in the preset `small`
ARMS = ("searched", "searched, from scratch", "random", "public", "scaled")
OTHERS = ARMS[3:]  # of other libraries
RIVALS = ARMS[2:]  # they have a second training
STEPS, SECONDS = "steps", "seconds"  # what a training has in common with that of the searched network
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Question:
    """All that every result depends on."""

    data: str
    digest: str
    images: int
    epochs: int
    search_epochs: int
    px: int = PX


@dataclass(frozen=True)
class Cell:
    """A budget on a device, and a seed."""

    device: str  # one of DEVICES
    share: float
    budget_ms: float
    seed: int


@dataclass(frozen=True)
class Candidate:
    """A network of another library, with its latency on a device."""

    name: str  # timm:NAME, or mobilenet_v2:WIDTH
    value: float  # the larger, the better: ImageNet top-1, or the width
    predicted_ms: float | None = None
    measured_ms: float | None = None  # on this machine at the speed that it had when its model was fitted
    problem: str = ""  # why there are no latencies

    @property
    def latency_ms(self) -> float:
        """What is held against a budget: the measurement where there is one; infinite without any."""
        known = self.predicted_ms if self.measured_ms is None else self.measured_ms
        return math.inf if known is None else known


class Images:
    """Labelled images as a map-style Dataset, which other processes can be sent."""

    def __init__(self, split: Split, step: int = 1) -> None:
        kept = torch.arange(0, len(split), step)
        self.pixels: NDArray[np.uint8] = split.read(kept).permute(0, 2, 3, 1).contiguous().numpy()
        self.labels: list[int] = split.labels[kept].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[NDArray[np.uint8], int]:
        return self.pixels[place], self.labels[place]


@dataclass(frozen=True)
class Data:
    """The images of a question."""

    name: str
    classes: tuple[str, ...]
    flip: bool
    train: Images
    heldout: Images
    few: Images  # test images
    test: Images  # all of them

    @classmethod
    def of(cls, data: ImageData) -> "Data":
        """Return the images of a data set."""
        train, heldout, test = Images(data.train), Images(data.heldout), Images(data.test)
        return cls(data.name, data.classes, data.train.flip, train, heldout, Images(data.test, TESTED), test)

    def given(self, *, whole: bool = False) -> qnas.Datasets:
        """Return the data as a user gives them, with a part of the test images or all."""
        test = self.test if whole else self.few
        return qnas.Datasets(
            self.train, self.heldout, test, classes=self.classes, name=self.name, flip=self.flip
        )


@dataclass(frozen=True)
class Job:
    """The trainings of one cell, for a process of their own."""

    question: Question
    cell: Cell
    data: Data
    rivals: Mapping[str, Candidate | None]  # public and scaled: the network, None if there is none
    out: Path
    work: Path
    deadline: float  # seconds of time.time()

    @property
    def device(self) -> str:
        """The device by its name or file."""
        own = device_file(self.work, len(self.data.classes))
        return str(own) if self.cell.device == "own" else self.cell.device

    @cached_property
    def space(self) -> SearchSpace:
        """The default space at the resolution and with the classes of the question."""
        return space_for(len(self.data.classes))

    @property
    def folder(self) -> Path:
        """Where the files of the cell are."""
        cell = self.cell
        name = f"{self.question.digest}-{cell.device}-{cell.budget_ms:.4g}ms-{cell.seed}"
        return self.work / name

    def file(self, arm: str) -> Path:
        """Return the ONNX file of an arm."""
        if arm == ARMS[0]:
            return self.folder / "searched" / "export" / "model.onnx"
        return self.folder / f"{arm}.onnx"

    def parts(self, arm: str, alike: str = STEPS) -> dict[str, Any]:
        """Return all on which a training depends."""
        other = self.rivals.get(arm)
        of_arm = {} if other is None else {"network": other.name}
        return {**asdict(self.question), **asdict(self.cell), "arm": arm, "alike": alike, **of_arm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:DIR, fashion-mnist:DIR or imagefolder:DIR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=DEVICES)
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=6, help="of a training")
    parser.add_argument("--search-epochs", type=int, default=6, help="besides two thirds as many of warm-up")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which nothing new is started")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/worth"), help="for files of networks")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {RESULTS.name}")
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    set_up_process(threads=1)
    found = load_images(options.data, options.images, resolution_px=STORED_PX)
    question = Question(found.name, found.digest, options.images, options.epochs, options.search_epochs)
    kept, data = Cache(options.out / "worth.jsonl"), Data.of(found)
    jobs = [
        job
        for name in options.devices
        for job in jobs_of(question, name, options.seeds, data, kept, options, deadline)
    ]
    if any(missing(job, kept) for job in jobs):
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(train_all, jobs))
        kept = Cache(options.out / "worth.jsonl")
    measure_all(jobs, kept)
    text = describe(jobs, kept, options)
    print(text)
    if options.write:
        write_section(RESULTS, f"worth {question.data}", text)


def space_for(classes: int) -> SearchSpace:
    """Return the default space at PX with so many classes."""
    return load_space(f"{DEFAULT_SPACE}-{PX}px").with_classes(classes)


# ---- devices and networks of other libraries


def device_file(work: Path, classes: int) -> Path:
    """Return the file of this machine's model, for networks of so many classes."""
    return work / f"own-{classes}" / "own.json"


def sample_file(work: Path, classes: int) -> Path:
    """Return the CSV of the networks to which this machine's model is fitted."""
    return device_file(work, classes).parent / "sample" / CSV_FILE


def known_device(name: str, classes: int, work: Path, kept: Cache) -> Device:
    """Return a device; the model of this machine is fitted unless a former run did."""
    if name != "own":
        return load_device(name)
    parts = {"part": "device", "cpu": host.cpu_name(), "px": PX, "networks": NETWORKS, "classes": classes}
    row = kept.get(parts) or kept.put(parts, fit_machine(space_for(classes), work))
    file = device_file(work, classes)
    write_text(file, row["device"])
    return load_device(file)


def fit_machine(space: SearchSpace, work: Path) -> dict[str, Any]:
    """Time networks of a space on this machine and fit its model to them."""
    file = sample_file(work, space.head.classes)
    if not file.exists():
        networks = choose_networks(space, compute_table(load_device("cpu"), space), NETWORKS, 0)
        write_sample(space, networks, file.parent, kind=PLAIN, seed=0)
    measure_sample(file, space, Here("onnxruntime", threads=1))
    rows = read_measured(file, space)
    fit = fit_own(space, [row.arch for row in rows], times(rows), str(file))
    own = own_device(
        fit, name="own", space=space, networks=len(rows), runtime=rows[0].runtime, day=date.today()
    )
    print(
        f"own: {fit.accuracy.within_10_pct:.0f}% within 10%, RMSPE {fit.accuracy.rmspe_pct:.1f}%", flush=True
    )
    facts = {"within_10_pct": fit.accuracy.within_10_pct, "rmspe_pct": fit.accuracy.rmspe_pct}
    return {"device": own.to_json(), **facts, "load": host.load()}


def candidate_values() -> dict[str, dict[str, float]]:
    """Return for the public and the scaled network those to choose from, each with its value."""
    front = qnas.rivals(FRONT).front
    public = {f"timm:{r.network.name}": r.network.imagenet_top1 for r in front}
    return {
        "public": {name: top1 for name, top1 in public.items() if top1 is not None},
        "scaled": {f"mobilenet_v2:{width}": width for width in WIDTHS},
    }


def build_other(name: str, classes: int) -> nn.Module:
    """Build a network of another library with new weights. Raises ImportError without timm."""
    library, _, which = name.partition(":")
    if library == "mobilenet_v2":
        return mobilenet_v2(width_mult=float(which), num_classes=classes)
    import timm

    return timm.create_model(which, pretrained=False, num_classes=classes)  # type: ignore[no-any-return]


def write_onnx(network: nn.Module, name: str, path: Path) -> Path:
    """Write a network as an ONNX file for one image, its branches merged where it has a form for that."""
    network = network.eval()
    if any(hasattr(module, "reparameterize") for module in network.modules()):
        from timm.utils.model import reparameterize_model

        network = reparameterize_model(network)
    model = trace_onnx(network, (3, PX, PX), name, batch=1)
    write_bytes(path, model.SerializeToString())
    return path


def other_file(name: str, classes: int, work: Path) -> Path:
    """Return the ONNX file of a network of another library, written once."""
    path = work / "others" / f"{name.replace(':', '-')}-{PX}px-{classes}.onnx"
    return path if path.is_file() else write_onnx(build_other(name, classes), name, path)


def known_candidates(
    arm: str, device: Device, name: str, classes: int, work: Path, kept: Cache
) -> list[Candidate]:
    """Return the networks of an arm with their latencies, or with the reason why they have none."""
    values = candidate_values()[arm]
    own = cache_key({"device": device.to_json()})
    parts = {"part": "candidates", "device": own, "px": PX, "classes": classes, "values": values}
    row = kept.get(parts)
    if row is None:
        found = price(values, device, name, classes, work)
        if any(each.problem.startswith("ModuleNotFoundError") for each in found):
            return found  # it may be installed until the next run
        row = kept.put(parts, {"candidates": [asdict(each) for each in found]})
    return [Candidate(**each) for each in row["candidates"]]


def price(
    values: Mapping[str, float], device: Device, name: str, classes: int, work: Path
) -> list[Candidate]:
    """Build networks of other libraries, and predict or also measure their latencies."""
    files, problems = {}, {}
    for each in values:
        try:
            files[each] = other_file(each, classes, work)
        except (ImportError, QnasError) as error:
            problems[each] = f"{type(error).__name__}: {error}"
    measured = measured_at_fit(files, space_for(classes), work) if name == "own" and files else {}
    found = []
    for each, value in values.items():
        if each in files:
            predicted_ms = qnas.predict(files[each], device).latency_ms
            found.append(Candidate(each, value, predicted_ms, measured.get(each)))
        else:
            found.append(Candidate(each, value, problem=problems[each]))
    return found


def measured_at_fit(files: Mapping[str, Path], space: SearchSpace, work: Path) -> dict[str, float]:
    """Time files here, at the speed that the machine had when its model was fitted."""
    timings, speed = timed_with_references(files, space, work)
    if speed is None:
        raise SystemExit(
            f"{sample_file(work, space.head.classes)}: no such file: use the former --work folder"
        )
    return {name: ms / speed for name, ms in timings.items()}


def timed_with_references(
    files: Mapping[str, Path], space: SearchSpace, work: Path
) -> tuple[dict[str, float], float | None]:
    """Time files, together with some to which the model was fitted.

    Returns their milliseconds, and how many times as long the latter take as they did then; None without
    them.
    """
    csv = sample_file(work, space.head.classes)
    rows = read_measured(csv, space)[:: NETWORKS // REFERENCES] if csv.is_file() else []
    references = {f"reference {row.name}": csv.parent / f"{row.name}.onnx" for row in rows}
    timings = time_files({**files, **references})
    ratios = [timings[f"reference {r.name}"].median_ms / r.latency_ms for r in rows if r.latency_ms]
    speed = statistics.median(ratios) if ratios else None
    return {name: timings[name].median_ms for name in files}, speed


def best_within(candidates: Sequence[Candidate], budget_ms: float) -> Candidate | None:
    """Return the candidate of the highest value within a budget; None if none is."""
    within = [each for each in candidates if not each.problem and each.latency_ms <= budget_ms]
    return max(within, key=lambda each: (each.value, -each.latency_ms), default=None)


def budgets_of(device: Device, space: SearchSpace) -> dict[float, float]:
    """Return the budgets in milliseconds by their shares of the space's range."""
    table = compute_table(device, space)
    return {s: round(table.fastest_ms + s * (table.slowest_ms - table.fastest_ms), 4) for s in SHARES}


def jobs_of(
    question: Question,
    name: str,
    seeds: Sequence[int],
    data: Data,
    kept: Cache,
    options: argparse.Namespace,
    deadline: float,
) -> Iterator[Job]:
    """Yield the cells of a device, those of the first seed first."""
    classes = len(data.classes)
    device = known_device(name, classes, options.work, kept)
    found = {arm: known_candidates(arm, device, name, classes, options.work, kept) for arm in OTHERS}
    for seed in seeds:
        for share, budget_ms in budgets_of(device, space_for(classes)).items():
            rivals = {arm: best_within(candidates, budget_ms) for arm, candidates in found.items()}
            cell = Cell(name, share, budget_ms, seed)
            yield Job(question, cell, data, rivals, options.out, options.work, deadline)


# ---- trainings


def core_seconds() -> float:
    """Return the processor seconds of this process and of those that it started and that have ended."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def energy_uj(folder: Path = POWERCAP) -> dict[str, tuple[int, int]]:
    """Return the energy counter of each processor package and where it starts again; none if not readable."""
    found = {}
    for package in sorted(folder.glob("intel-rapl:*")):
        if package.name.count(":") > 1:  # a part of a package
            continue
        try:
            count, most = (int((package / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            return {}
        found[package.name] = count, most
    return found


def watt_hours(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> float | None:
    """Return the energy between two readings, None if there were none. A counter may start again once."""
    if not before or before.keys() != after.keys():
        return None
    microjoules = sum((after[name][0] - count) % most for name, (count, most) in before.items())
    return microjoules / 3.6e9


@dataclass
class Spent:
    """What a piece of work took; filled in by `spending`."""

    core_s: float = 0.0
    wh: float | None = None


def spending(work: Callable[[], Any]) -> tuple[Any, Spent]:
    """Do a piece of work; return its result and what it took."""
    start, before = core_seconds(), energy_uj()
    result = work()
    return result, Spent(core_seconds() - start, watt_hours(before, energy_uj()))


def recipe_of(epochs: int) -> Recipe:
    """Return the recipe of all trainings: `cifar-short` without stochastic depth, at one size."""
    changes = {
        "epochs": epochs,
        "batch_size": BATCH,
        "resolution_px": PX,
        "start_resolution_px": PX,
        "stochastic_depth": 0.0,
    }
    return Recipe.load("cifar-short").override(changes)


def missing(job: Job, kept: Cache) -> list[tuple[str, str]]:
    """Return the trainings of a cell that are to be done, in their order."""
    wanted = [(arm, STEPS) for arm in ARMS] + [(arm, SECONDS) for arm in RIVALS]
    return [
        (arm, alike)
        for arm, alike in wanted
        if job.rivals.get(arm, "a network of the space") is not None
        and kept.get(job.parts(arm, alike)) is None
    ]


def train_all(job: Job) -> None:
    """Do the trainings of a cell that are missing, until the deadline."""
    set_up_process(threads=1)
    kept = Cache(job.out / "worth.jsonl")
    for arm, alike in missing(job, kept):
        if time.time() > job.deadline:
            return
        facts = search(job) if arm == ARMS[0] else train(job, arm, alike, kept)
        kept.put(job.parts(arm, alike), facts)
        cell = job.cell
        print(
            f"{cell.device}, {cell.budget_ms:.3f} ms, seed {cell.seed}: {arm}, as many {alike}: "
            f"{percent(facts['accuracy'])} in {facts['core_s']:.0f} s",
            flush=True,
        )


def warm_up_epochs(question: Question) -> int:
    """Return the epochs of a search before its own."""
    return max(1, round(WARM_UP * question.search_epochs))


def search(job: Job) -> dict[str, Any]:
    """Search, train and export as a user does."""
    cell, question, folder = job.cell, job.question, job.folder / "searched"
    given = job.data.given()
    found, searched = spending(
        lambda: qnas.run_search(
            job.space,
            budgets={job.device: f"{cell.budget_ms}ms"},
            data=given,
            preset="small",
            finalist_recipe="cifar-short",
            out=folder,
            force=True,
            warmup_epochs=warm_up_epochs(question),
            search_epochs=question.search_epochs,
            random_networks=0,
            threads=1,
            torch_device="cpu",
            seed=cell.seed,
        )
    )
    recipe = recipe_of(question.epochs)
    network, trained = spending(
        lambda: qnas.train_subnet(
            found, data=given, recipe=recipe, force=True, threads=1, torch_device="cpu", seed=cell.seed
        )
    )
    qnas.export(folder, "onnx", data=given, force=True)
    return {
        "accuracy": test_accuracy(network.build(), job.data),
        "network": list(found.arch.choices),
        "latency_ms": found.latency_ms,
        "epochs": question.epochs,
        "search_core_s": searched.core_s,
        "search_wh": searched.wh,
        "core_s": trained.core_s,
    }


def train(job: Job, arm: str, alike: str, kept: Cache) -> dict[str, Any]:
    """Train a network from scratch."""
    seed, epochs = job.cell.seed, job.question.epochs
    if alike == SECONDS:
        first, own = kept.get(job.parts(ARMS[0])), kept.get(job.parts(arm))
        assert first is not None, "the search comes first"
        assert own is not None, "the training of as many steps comes first"
        epochs = epochs_within(first["search_core_s"] + first["core_s"], own["core_s"], epochs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, latency_ms = build_arm(job, arm, kept)
        _, spent = spending(lambda: train_here(network, job.data, epochs, seed))
    if alike == STEPS:
        write_onnx(network, arm, job.file(arm))
    return {
        "accuracy": test_accuracy(network, job.data),
        "latency_ms": latency_ms,
        "epochs": epochs,
        "core_s": spent.core_s,
    }


def epochs_within(seconds: float, took: float, epochs: int) -> int:
    """Return the epochs for so many seconds, where `epochs` took `took`."""
    return max(1, round(epochs * seconds / took))


def build_arm(job: Job, arm: str, kept: Cache) -> tuple[nn.Module, float]:
    """Build the network of an arm, and return it with its predicted latency."""
    other = job.rivals.get(arm)
    if other is not None:
        assert other.predicted_ms is not None, other
        return build_other(other.name, len(job.data.classes)), other.predicted_ms
    table = compute_table(load_device(job.device), job.space)
    if arm == "random":
        budget_ms, rng = job.cell.budget_ms, np.random.default_rng(job.cell.seed)
        arch: Arch = draw_networks(job.space, table, WINDOW * budget_ms, budget_ms, 1, rng)[0]
    else:
        first = kept.get(job.parts(ARMS[0]))
        assert first is not None, "the search comes first"
        arch = make_arch(job.space, tuple(first["network"]))
    return build_subnet(job.space, arch, len(job.data.classes)), predict(table, job.space, arch)


def train_here(network: nn.Module, data: Data, epochs: int, seed: int) -> None:
    """Train any network as `qnas train-subnet` does."""
    config = TrainConfig(recipe=recipe_of(epochs), threads=1, torch_device="cpu", seed=seed)
    images = load_data(data.given(), resolution_px=PX, quiet=True)
    trainer = SubnetTrainer(network, images, config)
    while trainer.steps_done < trainer.total_steps:
        trainer.step()


def test_accuracy(network: nn.Module, data: Data) -> float:
    """Return the accuracy on all test images."""
    images = load_data(data.given(whole=True), resolution_px=PX, quiet=True)
    return classify(network.eval(), batches(images.test, 256)).score.accuracy


# ---- latencies on this machine


def latency_parts(jobs: Sequence[Job], kept: Cache) -> dict[str, Any]:
    """Return the networks that are timed together: those that are trained."""
    parts = (job.parts(arm) for job in jobs for arm in ARMS)
    trained = [cache_key(each) for each in parts if kept.get(each) is not None]
    return {"part": "latencies", "cpu": host.cpu_name(), "networks": trained}


def measure_all(jobs: Sequence[Job], kept: Cache) -> None:
    """Time the files of all trained networks together, unless a former run did."""
    parts = latency_parts(jobs, kept)
    if not parts["networks"] or kept.get(parts) is not None:
        return
    files = {
        latency_name(job, arm): job.file(arm)
        for job in jobs
        for arm in ARMS
        if kept.get(job.parts(arm)) is not None
    }
    lost = [str(path) for path in files.values() if not path.is_file()]
    if lost:
        raise SystemExit(f"{lost[0]}: no such file: use the --work folder of the run that wrote it")
    found, speed = timed_with_references(files, jobs[0].space, jobs[0].work)
    kept.put(parts, {"measured_ms": found, "speed": speed, "load": host.load()})


def latency_name(job: Job, arm: str) -> str:
    """Return the name of an arm's file among those of all cells."""
    return f"{job.cell.device} {job.cell.share} {job.cell.seed} {arm}"


# ---- tables


@dataclass(frozen=True)
class Row:
    """An arm at a budget: figures of each seed."""

    device: str
    share: float
    budget_ms: float
    arm: str
    networks: tuple[str, ...]  # of other libraries
    accuracies: Mapping[str, tuple[float, ...]]  # by STEPS and SECONDS; in the order of the seeds
    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]
    search_core_s: tuple[float, ...]
    core_s: Mapping[str, tuple[float, ...]]
    search_wh: tuple[float, ...]


def rows_of(jobs: Sequence[Job], kept: Cache) -> list[Row]:
    """Return the rows of all budgets, by device and budget."""
    timed = kept.get(latency_parts(jobs, kept))
    measured = timed["measured_ms"] if timed else {}
    return [row_of(cells, arm, kept, measured) for cells in grouped(jobs) for arm in ARMS]


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return the jobs by device and budget."""
    found: dict[tuple[str, float], list[Job]] = {}
    for job in jobs:
        found.setdefault((job.cell.device, job.cell.share), []).append(job)
    return list(found.values())


def row_of(jobs: Sequence[Job], arm: str, kept: Cache, measured: Mapping[str, float]) -> Row:
    """Return the row of an arm at one budget."""
    cell = jobs[0].cell
    done = {
        alike: [(job, row) for job in jobs if (row := kept.get(job.parts(arm, alike))) is not None]
        for alike in (STEPS, SECONDS)
    }
    rows = [row for _, row in done[STEPS]]
    names = (latency_name(job, arm) for job, _ in done[STEPS])
    return Row(
        cell.device,
        cell.share,
        cell.budget_ms,
        arm,
        tuple(dict.fromkeys(other.name for job in jobs if (other := job.rivals.get(arm)) is not None)),
        {alike: tuple(row["accuracy"] for _, row in found) for alike, found in done.items()},
        tuple(row["latency_ms"] for row in rows),
        tuple(measured[name] for name in names if name in measured),
        tuple(row["search_core_s"] for row in rows if "search_core_s" in row),
        {alike: tuple(row["core_s"] for _, row in found) for alike, found in done.items()},
        tuple(row["search_wh"] for row in rows if row.get("search_wh") is not None),
    )


def describe(jobs: Sequence[Job], kept: Cache, options: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    question, rows = jobs[0].question, rows_of(jobs, kept)
    seeds = sorted({job.cell.seed for job in jobs})
    parts = [f"## What a search is worth: {question.data}", command_line(options)]
    parts.append(describe_question(question, seeds))
    for device in dict.fromkeys(job.cell.device for job in jobs):
        parts += [f"### {device}", table_of([row for row in rows if row.device == device])]
        parts.append(describe_public(next(j for j in jobs if j.cell.device == device), kept))
        parts.append(
            "\n".join(rivals_line(cells[0]) for cells in grouped(jobs) if cells[0].cell.device == device)
        )
    timed = kept.get(latency_parts(jobs, kept))
    if timed:
        parts.append(describe_measuring(timed))
    return "\n\n".join([*filter(None, parts), verdict(rows)])


def command_line(options: argparse.Namespace) -> str:
    """Return the command of a run, without the place of its data."""
    kind, colon, _ = options.data.partition(":")
    words = ["python benchmarks/worth.py", "--data", f"{kind}{colon}{'DIR' if colon else ''}"]
    for name in ("seeds", "devices", "images", "epochs", "search_epochs"):
        value = getattr(options, name)
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return f"`{' '.join(words)} --write`"


def describe_question(question: Question, seeds: Sequence[int]) -> str:
    """Describe how the networks were searched and trained."""
    return (
        f"{DEFAULT_SPACE} at {question.px} px; {question.images} training images of {STORED_PX} px, on which "
        f"a search has {warm_up_epochs(question)} + {question.search_epochs} epochs and a training "
        f"{question.epochs}, by `cifar-short` without stochastic depth; accuracy on all test images; "
        f"seeds {', '.join(map(str, seeds))}; {host.cpu_name()}, one thread. `searched` goes on from "
        "the weights of its finalist, all others start from new ones. `seconds`: trained for the processor "
        "seconds that the search and its training took."
    )


def table_of(rows: Sequence[Row]) -> str:
    """Return the table of a device."""
    header = [
        "network",
        "budget, ms",
        "accuracy, same steps",
        "same seconds",
        "ms, predicted",
        "ms, measured here",
        "core-hours: search",
        "training",
        "search, Wh",
    ]
    return markdown_table(header, [cells_of(row) for row in rows])


def cells_of(row: Row) -> list[str]:
    """Return the cells of a row. An arm without a network, or not trained yet, says so."""
    name = row.arm + (f" ({', '.join(row.networks)})" if row.networks else "")
    budget = f"{row.budget_ms:.3f}"
    if not row.accuracies[STEPS]:
        why = "not trained yet" if row.networks or row.arm not in OTHERS else "none within the budget"
        return [name, budget, why, *[""] * 6]
    return [
        name,
        budget,
        percent(*mean_and_sd(row.accuracies[STEPS])),
        percent(*mean_and_sd(row.accuracies[SECONDS])) if row.accuracies[SECONDS] else "",
        shown(row.predicted_ms, ".3f"),
        shown(row.measured_ms, ".3f"),
        shown([s / 3600 for s in row.search_core_s], ".3f"),
        shown([s / 3600 for s in row.core_s[STEPS]], ".3f"),
        shown(row.search_wh, ".2f") or ("not readable" if row.search_core_s else ""),
    ]


def shown(values: Sequence[float], form: str) -> str:
    """Format the mean of some figures; nothing if there are none."""
    return format(statistics.fmean(values), form) if values else ""


def describe_public(job: Job, kept: Cache) -> str:
    """Say which public networks there were to choose from, or why there were none."""
    classes = len(job.data.classes)
    device = load_device(job.device)
    found = known_candidates("public", device, job.cell.device, classes, job.work, kept)
    asked = f"the front of `qnas rivals --device {next(iter(FRONT))} --budget {next(iter(FRONT.values()))}`"
    built = [each for each in found if not each.problem]
    if not built:
        return f"None of the {len(found)} networks of {asked} was built: {found[0].problem}."
    fastest = min(built, key=lambda each: each.latency_ms)
    failed = "".join(f" {each.name} was not built: {each.problem}." for each in found if each.problem)
    return (
        f"Public networks to choose from: {len(built)} of {asked}; the fastest at {PX} px is {fastest.name} "
        f"with {fastest.latency_ms:.3f} ms.{failed}"
    )


def rivals_line(job: Job) -> str:
    """Say what `qnas rivals` itself answers at a budget: networks at their ImageNet resolutions."""
    budget = f"{job.cell.budget_ms}ms"
    asked = f"- `qnas rivals --device {job.cell.device} --budget {budget}`: "
    try:
        found = qnas.rivals({job.device: budget})
    except QnasError as error:
        return f"{asked}{error}"
    first = found.networks[0].network
    return f"{asked}{len(found.networks)} networks, first {first.name} at {first.resolution_px} px"


def describe_measuring(timed: Mapping[str, Any]) -> str:
    """Say how the machine was when latencies were measured."""
    told = f"Latencies were measured together in interleaved rounds ({timed['load']})."
    if timed["speed"] is None:
        return told
    return f"{told} Networks of the fit then took {timed['speed']:.3f} of what they took for the fit."


@dataclass(frozen=True)
class Comparison:
    """The searched networks beside those of an arm, over budgets."""

    gains: tuple[float, ...]  # mean over seeds, for each budget

    def __str__(self) -> str:
        better = sum(gain > 0 for gain in self.gains)
        return f"{100 * statistics.fmean(self.gains):+.1f} points ({better} of {len(self.gains)} budgets)"

    @property
    def word(self) -> str:
        """`wins`, `loses`, or `neither` where the mean and most budgets disagree."""
        better = 2 * sum(gain > 0 for gain in self.gains) - len(self.gains)
        mean = statistics.fmean(self.gains)
        return "wins" if mean > 0 < better else "loses" if mean < 0 > better else "neither"


def compare(rows: Sequence[Row], arm: str, alike: str) -> Comparison | None:
    """Compare the searched networks, trained after the search, with an arm; None if nothing is known."""
    own = {(r.device, r.share): r.accuracies[STEPS] for r in rows if r.arm == ARMS[0]}
    gains = []
    for row in rows:
        ours, theirs = own[row.device, row.share], row.accuracies[alike]
        if row.arm == arm and ours and len(ours) == len(theirs):
            gains.append(statistics.fmean(ours) - statistics.fmean(theirs))
    return Comparison(tuple(gains)) if gains else None


def verdict(rows: Sequence[Row]) -> str:
    """Say what the figures mean for a user."""
    said: list[str] = []
    words: dict[str, list[str]] = {"wins": [], "loses": [], "neither": []}
    for arm in RIVALS:
        found = {alike: compare(rows, arm, alike) for alike in (STEPS, SECONDS)}
        for alike, comparison in found.items():
            if comparison is not None:
                words[comparison.word].append(f"the {arm} network at the same {alike}")
                said.append(f"{comparison} against the {arm} network at the same {alike}")
    if not said:
        return "For a user: not enough is trained yet to say anything."
    result = [
        f"{told} {listed(words[word])}"
        for word, told in (
            ("wins", "a search is more accurate than"),
            ("loses", "it loses to"),
            ("neither", "it is neither better nor worse than"),
        )
        if words[word]
    ]
    took = [s / 3600 for row in rows for s in row.search_core_s]
    seeds = max(len(row.accuracies[STEPS]) for row in rows)
    noise = "; with one seed, no spread is known" if seeds == 1 else ""
    text = "; ".join(result)
    return (
        f"**For a user:** at equal latency, {text}. The figures: {', '.join(said)}; a search took "
        f"{statistics.fmean(took):.3f} core-hours{noise}."
    )


def listed(names: Sequence[str]) -> str:
    """Join names with commas and `and`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


if __name__ == "__main__":
    main()
