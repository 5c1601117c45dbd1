"""What a search around a pretrained network is worth, beside what a user would do without one.

    python benchmarks/pretrained.py --data DIR --images 2000 --minutes 12 [--seeds 0 1 2] [--write]

DIR has images as train/CLASS and test/CLASS, such as CIFAR-10. For each seed, `--images` of the training
images are drawn, equally many of each class. The budget is half the latency of EfficientNet-Lite0 on `cpu`,
at `--px`, by default that of its pretraining. Every arm has the same wall-clock time for what it trains:

- searched: `qnas search --pretrained efficientnet-lite0` over resolutions from 4/7 to 6/7 of `--px`, and
  `qnas train-subnet`;
- whole: EfficientNet-Lite0 itself, fine-tuned; it takes twice the budget;
- smaller images: itself at the largest resolution (a multiple of 8) at which it is within the budget;
- smaller images, quadratic: the same with a product of two convolutions in every block;
- cut: at `--px`, its own kernels and blocks, with fewer hidden channels: of these, the network with the most
  MACs within the budget. Nobody searches;
- from scratch: the searched network, with new weights and the recipe for photographs.

Epochs are planned once for each question, with the first seed: nothing else may run on the machine until the
plan is printed. Steps of the networks are timed in turn, and the first search is timed whole: what it takes
besides its steps shortens the training after it, and no other arm. Later arms and seeds have the same epochs
on any machine: `--run-threads 1` runs them on one thread, so that several processes, of different seeds, take
the place of one. While they train, networks are tested on one of TESTED test images, and afterwards on all of
them. All arms of a seed have the same images. Plans and trainings are lines of results/pretrained.jsonl, so
that a stopped run goes on.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import OUT, RESULTS, markdown_table, mean_and_sd, percent, write_section

import qnas
from qnas.common import host
from qnas.data.batches import batches
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.pretrained.catalogue import load_pretrained, network_space
from qnas.nn.pretrained.derivation import own_arch
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import find_arch
from qnas.search.config import SearchConfig
from qnas.search.problem import FamilySearch
from qnas.search.searcher import Searcher
from qnas.solver.kinds import take
from qnas.solver.layouts import layouts_within, mean_limits
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import solve
from qnas.spaces.arch import Arch, arch_from_indices, make_arch
from qnas.spaces.family import SpaceFamily, make_family
from qnas.spaces.space import Candidate, SearchSpace, load_space
from qnas.training.loop import set_up_process
from qnas.training.optimizer import make_optimizer, weight_step
from qnas.training.scoring import classify, images_at_once
from qnas.training.supernet_weights import build_trained

NETWORK, DEVICE = "efficientnet-lite0", "cpu"
QUADRATIC = f"{NETWORK}-quadratic"
ARMS = ("searched", "whole", "smaller images", "smaller images, quadratic", "cut", "from scratch")
BUDGET_SHARE = 0.5  # of the latency of the whole network
SEARCH_SHARE = 0.25  # of the time of a searched network, for the steps of its search
PILOT_ROUNDS, PILOT_STEPS, WARM_UP_STEPS, BATCH = 3, 4, 2, 64
PX_STEP = 8
# the resolutions of a search: the lowest and the highest as shares of `--px`, and the step
LOWEST, HIGHEST, RESOLUTION_STEP = 4 / 7, 6 / 7, 16
# of fewer images than these, the classifier learns alone at first: its own epochs are short then
MANY_IMAGES = 20_000
TESTED = 40  # one of so many test images is tested on while networks train


@dataclass(frozen=True)
class Question:
    """Everything that a training depends on besides its arm and seed."""

    images: int
    px: int
    minutes: float
    threads: int


@dataclass(frozen=True)
class Plan:
    """The epochs of each arm: of its search, 0 for those without, and of its training."""

    question: Question
    epochs: Mapping[str, tuple[int, int]]
    search_seconds: float  # the first search, whole
    cpu: str


@dataclass(frozen=True)
class Answer:
    """The outcome of an arm."""

    question: Question
    arm: str
    seed: int
    accuracy: float
    latency_ms: float
    px: int
    macs: int
    epochs: tuple[int, int]  # of the search, of the training
    seconds: float
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """What an arm trains, and what it starts from."""

    space: SearchSpace
    arch: Arch
    settings: Mapping[str, Any]
    source: Any = None  # a finished search
    searched: int = 0  # epochs
    search_seconds: float = 0.0

    @property
    def latency_ms(self) -> float:
        """The latency on the device."""
        return latency_ms(self.space, self.arch)


class Arms:
    """The arms of one question and seed; what has been trained is kept in folders of `work`."""

    def __init__(self, question: Question, seed: int, full: Path, work: Path, threads: int) -> None:
        data = draw_folder(full, question.images, seed, work / "data")
        self.full = full
        self.question, self.seed, self.data, self.work = question, seed, f"imagefolder:{data}", work
        self.threads = threads
        low, high = (round(question.px * share / RESOLUTION_STEP) for share in (LOWEST, HIGHEST))
        self.resolutions = [RESOLUTION_STEP * number for number in range(low, high + 1)]
        self.space = space_at(NETWORK, question.px)
        self.budget_ms = BUDGET_SHARE * Network(self.space, self.own(self.space), {}).latency_ms

    def own(self, space: SearchSpace) -> Arch:
        """Return the whole network in a space around it."""
        return own_arch(space, network_space(NETWORK))

    def plan(self, searched: Network) -> Plan:
        """Plan the epochs of all arms by steps of their networks, which take turns."""
        networks = {arm: self.network(arm, searched) for arm in ARMS}
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(PILOT_ROUNDS):
            for arm, network in networks.items():
                times[arm].append(epoch_seconds(network.space, network.arch, self.question.images))
        epochs = {}
        for arm, network in networks.items():
            left = 60 * self.question.minutes - network.search_seconds
            epochs[arm] = network.searched, max(1, round(left / statistics.median(times[arm])))
        return Plan(self.question, epochs, searched.search_seconds, host.cpu_name())

    def network(self, arm: str, searched: Network | None) -> Network:
        """Return what an arm trains; `searched` is that of the first arm."""
        if arm == "searched":
            assert searched is not None
            return searched
        if arm == "from scratch":
            assert searched is not None, "the arm `searched` comes first"
            return Network(searched.space, searched.arch, {"recipe": "photos"})
        start = {"pretrained": NETWORK} | self._head_first()
        if arm == "cut":
            limits = self.limits(self.space)
            return Network(self.space, cut_arch(self.space, self.own(self.space), limits), start)
        if arm == "smaller images":
            return self._largest_within(NETWORK, self.own, start)
        if arm == "smaller images, quadratic":
            return self._largest_within(QUADRATIC, lambda space: as_products(space, self.own(space)), start)
        assert arm == "whole", arm
        return Network(self.space, self.own(self.space), start)

    def _head_first(self) -> dict[str, Any]:
        return {"head_epochs": 0} if self.question.images >= MANY_IMAGES else {}

    def limits(self, space: SearchSpace) -> Limits:
        """Return the limit on the latency."""
        return (latency_limit(compute_table(load_device(DEVICE), space), self.budget_ms),)

    def _largest_within(
        self, name: str, arch_in: Callable[[SearchSpace], Arch], settings: dict[str, Any]
    ) -> Network:
        px = self.question.px
        while True:
            space = space_at(name, px)
            network = Network(space, arch_in(space), settings)
            if network.latency_ms <= self.budget_ms:
                return network
            px -= PX_STEP

    def search(self, epochs: int | None) -> Network:
        """Search for this many epochs, or by the share of the time that searches have."""
        question = self.question
        settings: dict[str, Any] = {"resolution_px": max(self.resolutions), "seed": self.seed}
        if epochs is None:
            epochs = self._search_epochs(make_family(self.space, self.resolutions), settings)
        start = time.monotonic()
        found = qnas.run_search(
            self.space,
            resolutions=self.resolutions,
            budgets={DEVICE: f"{self.budget_ms}ms"},
            data=self.data,
            pretrained=NETWORK,
            out=self.work / "searched",
            force=True,
            random_networks=0,
            threads=self.threads,
            warmup_epochs=epochs - 1,
            search_epochs=1,
            head_epochs=0 if question.images >= MANY_IMAGES else epochs // 3,
            **settings,
        )
        weights = {"weights": "supernet"} | self._head_first()
        return Network(found.space, found.arch, weights, found, epochs, time.monotonic() - start)

    def _search_epochs(self, family: SpaceFamily, settings: dict[str, Any]) -> int:
        """Return the epochs of a search that take its share of the time, by some of its steps."""
        config = SearchConfig.load("pretrained").override(
            settings | {"warmup_epochs": 1, "search_epochs": 1, "head_epochs": 0}
        )
        data = qnas_images(self.data, family.largest)
        search = FamilySearch(family, self.limits, layouts_within(family, self.limits))
        limits = mean_limits([each.limits for each in search.within])
        network = load_pretrained(NETWORK)
        searcher = Searcher(family.largest, limits, data, config, family=search, pretrained=network)
        for _ in range(WARM_UP_STEPS):
            searcher.step()
        steps = PILOT_ROUNDS * PILOT_STEPS
        start = time.monotonic()
        for _ in range(steps):
            searcher.step()
        of_epoch = (time.monotonic() - start) / steps * searcher.schedule.steps_per_epoch
        return max(1, round(60 * self.question.minutes * SEARCH_SHARE / of_epoch))

    def train(self, arm: str, network: Network, epochs: int) -> Answer:
        """Train a network, and return its accuracy on all test images."""
        px = network.space.input.resolution_px
        start = time.monotonic()
        trained = qnas.train_subnet(
            network.source or (network.space, network.arch),
            data=self.data,
            out=self.work / f"{arm.replace(', ', '-').replace(' ', '-')}-trained",
            force=True,
            epochs=epochs,
            resolution_px=px,
            seed=self.seed,
            threads=self.threads,
            **network.settings,
        )
        seconds = network.search_seconds + time.monotonic() - start
        answer = Answer(
            self.question,
            arm,
            self.seed,
            test_accuracy(trained.folder, self.full),
            network.latency_ms,
            px,
            int(count_limit(network.space, "macs", 1e12).amount(network.arch.indices(network.space))),
            (network.searched, epochs),
            seconds,
            network.arch.choices,
        )
        print(
            f"seed {self.seed}, {arm}: {answer.accuracy:.2%}, {answer.latency_ms:.2f} ms at {px} px, "
            f"{network.searched} + {epochs} epochs, {seconds / 60:.1f} min",
            flush=True,
        )
        return answer

    def searched_before(self, answer: Answer) -> Network:
        """Return the network that an earlier run searched for and trained."""
        space = space_at(NETWORK, answer.px)
        return Network(space, make_arch(space, answer.choices), {})


def space_at(name: str, px: int) -> SearchSpace:
    """Return a shipped space at a resolution."""
    space = load_space(name)
    return space if px == space.input.resolution_px else load_space(f"{name}-{px}px")


def latency_ms(space: SearchSpace, arch: Arch) -> float:
    """Return a network's latency on the device."""
    return compute_table(load_device(DEVICE), space).latency_ms(arch.indices(space))


def as_products(space: SearchSpace, whole: Arch) -> Arch:
    """Return a network with a product of two convolutions in place of each depthwise convolution."""
    found = []
    for position, name in zip(space.positions, whole.choices, strict=True):
        parameters = position.candidate(name).parameters | {"neuron": "factored"}
        found.append(Candidate(block=position.candidate(name).block, **parameters).name)
    return make_arch(space, tuple(found))


def cut_arch(space: SearchSpace, whole: Arch, limits: Limits) -> Arch:
    """Return the network of a whole one's kernels and blocks with the most MACs within the limits."""
    places = tuple(
        tuple(
            i
            for i, c in enumerate(position.candidates)
            if c.is_within(position.candidate(name))
            and c.sizes["kernel"] == position.candidate(name).sizes["kernel"]
        )
        for position, name in zip(space.positions, whole.choices, strict=True)
    )
    macs = count_limit(space, "macs", 1e12).cells
    fewer = tuple(replace(limit, cells=take(limit.cells, places)) for limit in limits)
    found = solve(take(macs, places), fewer).indices
    return arch_from_indices(space, tuple(own[i] for own, i in zip(places, found, strict=True)))


def epoch_seconds(space: SearchSpace, arch: Arch, images: int) -> float:
    """Time some training steps of a network, and return the seconds of an epoch."""
    px, classes = space.input.resolution_px, 10
    network = build_subnet(space, arch, classes).train()
    optimizer = make_optimizer(network.parameters(), 1e-4, 0.05)
    batch, labels = torch.randn(BATCH, 3, px, px), torch.randint(classes, (BATCH,))
    for step in range(WARM_UP_STEPS + PILOT_STEPS):
        if step == WARM_UP_STEPS:
            start = time.monotonic()
        weight_step(network, optimizer, batch, labels, 0.1)
    return (time.monotonic() - start) / PILOT_STEPS * images / BATCH


def qnas_images(data: str, space: SearchSpace) -> ImageData:
    """Return the images of a folder at the size of a space, as a search loads them."""
    return load_data(
        parse_data_spec(data),
        resolution_px=space.input.resolution_px,
        normalisation=space.input.normalisation,
        quiet=True,
    )


def draw_folder(data: Path, images: int, seed: int, out: Path) -> Path:
    """Write a folder of so many training images, equally many of each class, and every tenth test image."""
    rng = np.random.default_rng(seed)
    classes = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
    shutil.rmtree(out, ignore_errors=True)
    for name in classes:
        files = sorted((data / "train" / name).iterdir())
        (out / "train" / name).mkdir(parents=True)
        for place in np.sort(rng.permutation(len(files))[: images // len(classes)]).tolist():
            os.link(files[place], out / "train" / name / files[place].name)
        (out / "test" / name).mkdir(parents=True)
        for file in sorted((data / "test" / name).iterdir())[::TESTED]:
            os.link(file, out / "test" / name / file.name)
    return out


def test_accuracy(folder: Path, data: Path) -> float:
    """Return the accuracy of a trained network on all test images."""
    found = find_arch(folder)
    images = qnas_images(f"imagefolder:{data}", found.space)
    network = build_trained(found, len(images.classes))
    device = torch.device("cpu")
    at_once = images_at_once(images.test, device)
    return classify(network, batches(images.test, at_once, device=device)).score.accuracy


class Answers:
    """The lines of a file of results: plans and answers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [line | {"question": Question(**line["question"])} for line in lines]

    def all(self) -> list[Answer]:
        """Return what has been trained so far."""
        return [
            Answer(**line | {"epochs": tuple(line["epochs"]), "choices": tuple(line["choices"])})
            for line in self._lines()
            if "arm" in line
        ]

    def plan(self, question: Question) -> Plan | None:
        """Return the plan of a question, None if there is none yet."""
        plans = [line for line in self._lines() if "arm" not in line and line["question"] == question]
        if not plans:
            return None
        epochs = {arm: (searched, trained) for arm, (searched, trained) in plans[0]["epochs"].items()}
        return Plan(**plans[0] | {"epochs": epochs})

    def find(self, question: Question, arm: str, seed: int) -> Answer | None:
        """Return an answer, None if it is not there."""
        wanted = question, arm, seed
        return next((a for a in self.all() if (a.question, a.arm, a.seed) == wanted), None)

    def add(self, line: Answer | Plan) -> None:
        """Write a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")


def describe(question: Question, answers: list[Answer]) -> str:
    """Return the section of a question."""
    own = [answer for answer in answers if answer.question == question]
    seeds = sorted({answer.seed for answer in own})
    rows = []
    base = {a.seed: a.accuracy for a in own if a.arm == "searched"}
    for arm in ARMS:
        found = [answer for answer in own if answer.arm == arm]
        if not found:
            continue
        gains = [answer.accuracy - base[answer.seed] for answer in found if answer.seed in base]
        gain = "" if arm == "searched" or not gains else f"{100 * statistics.fmean(gains):+.1f}"
        rows.append(
            [
                arm,
                percent(*mean_and_sd([answer.accuracy for answer in found])),
                gain,
                f"{statistics.fmean(a.latency_ms for a in found):.1f}",
                f"{statistics.fmean(a.macs for a in found) / 1e6:.0f}",
                str(found[0].px),
                f"{found[0].epochs[0]} + {found[0].epochs[1]}"
                if found[0].epochs[0]
                else str(found[0].epochs[1]),
            ]
        )
    titles = [
        "network",
        "test accuracy",
        "to searched",
        f"ms on {DEVICE}",
        "MACs, M",
        "px",
        "epochs",
    ]
    table = markdown_table(titles, rows)
    options = f"--images {question.images} --minutes {question.minutes:g} --px {question.px}"
    command = f"python benchmarks/pretrained.py --data DIR {options} --threads {question.threads} --write"
    return (
        f"### {question.images:,} training images, {question.minutes:g} minutes each\n\n"
        f"`{command}`, seeds {', '.join(map(str, seeds))}, {host.cpu_name()}.\n\n{table}"
    )


def answer_arms(arms: Arms, wanted: Sequence[str], kept: Answers) -> None:
    """Train the arms of a seed that have not been trained yet; the first one plans them all."""
    question, seed = arms.question, arms.seed
    plan = kept.plan(question)
    before = kept.find(question, ARMS[0], seed)
    if before is not None:
        searched = arms.searched_before(before)
    elif ARMS[0] in wanted:
        searched = arms.search(None if plan is None else plan.epochs[ARMS[0]][0])
    else:
        searched = None
    if plan is None:
        assert searched is not None, "the arm `searched` comes first"
        plan = arms.plan(searched)
        kept.add(plan)
        print(f"epochs of search and training: {dict(plan.epochs)}", flush=True)
    for arm in wanted:
        if kept.find(question, arm, seed) is None:
            kept.add(arms.train(arm, arms.network(arm, searched), plan.epochs[arm][1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/CLASS and test/CLASS")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=12.0, help="of each arm")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run-threads", type=int, help="of this process, once epochs are planned")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qnas-pretrained")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    question = Question(options.images, options.px, options.minutes, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = Answers(options.out / "pretrained.jsonl")
    threads = options.run_threads or options.threads
    if threads != options.threads and kept.plan(question) is None:
        parser.error(f"--run-threads {threads}: epochs are planned first, with all {options.threads} threads")
    set_up_process(threads)
    for seed in options.seeds:
        work = options.work / f"{question.images}-{question.minutes:g}-{question.px}-{seed}"
        answer_arms(Arms(question, seed, options.data, work, threads), options.arms, kept)
    answers = kept.all()
    questions = list(dict.fromkeys(answer.question for answer in answers))
    text = "\n\n".join(describe(each, answers) for each in questions)
    print(text)
    if options.write:
        write_section(RESULTS, "pretrained", f"## Around a pretrained network\n\n{HEAD}\n\n{text}")


HEAD = """EfficientNet-Lite0 with ImageNet weights, CIFAR-10 as photographs. Every network has the same time,
and all but `whole` half of its latency; the head of the script says what is compared."""


if __name__ == "__main__":
    main()
