"""What a search around a pretrained network is worth, beside what a user would do without one.

    python benchmarks/pretrained.py --data DIR --images 2000 --minutes 12 [--seeds 0 1 2] [--write]

DIR has images as train/CLASS and test/CLASS, such as CIFAR-10. For each seed, `--images` of the training
images are drawn, equally many of each class. The budget is half the latency of EfficientNet-Lite0 on `cpu`,
at `--px`, by default that of its pretraining. Every arm has the same wall-clock time for what it trains:

- searched: `qnas search --pretrained efficientnet-lite0` over resolutions from 4/7 to 6/7 of `--px`, and
  `qnas train-subnet`, half of the time each;
- searched, quadratic: the same in efficientnet-lite0-quadratic, which has quadratic candidates as well;
- whole: EfficientNet-Lite0 itself, fine-tuned; it takes twice the budget;
- smaller images: itself at the largest resolution (a multiple of 8) at which it is within the budget;
- cut: at `--px`, its own kernels and blocks, with fewer hidden channels: of these, the network with the most
  MACs within the budget. Nobody searches;
- from scratch: the searched network, with new weights and the recipe for photographs.

Epochs are planned from some timed steps. What a search takes besides them shortens the training after it,
and no other arm. While they train, networks are tested on every tenth test image, and afterwards on all of
them. All arms of a seed have the same images. Each training is a line of results/pretrained.jsonl, so that a
stopped run goes on. Nothing else may run on the machine meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
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
from qnas.spaces.space import SearchSpace, load_space
from qnas.training.loop import set_up_process
from qnas.training.optimizer import make_optimizer, weight_step
from qnas.training.scoring import classify
from qnas.training.supernet_weights import build_trained

NETWORK, DEVICE = "efficientnet-lite0", "cpu"
SPACES = {"searched": NETWORK, "searched, quadratic": f"{NETWORK}-quadratic"}
ARMS = (*SPACES, "whole", "smaller images", "cut", "from scratch")
BUDGET_SHARE = 0.5  # of the latency of the whole network
SEARCH_SHARE = 0.5  # of the time of a searched network
AFTER_STEPS = 1.25  # a search with its measurements and its ranking, in multiples of its steps
PILOT_STEPS, WARM_UP_STEPS, BATCH = 6, 2, 64
PX_STEP = 8
# the resolutions of a search: the lowest and the highest as shares of `--px`, and the step
LOWEST, HIGHEST, RESOLUTION_STEP = 4 / 7, 6 / 7, 16
TESTED = 10  # one of so many test images is tested on while networks train


@dataclass(frozen=True)
class Question:
    """Everything that a training depends on besides its arm and seed."""

    images: int
    px: int
    minutes: float
    threads: int


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


class Arms:
    """The arms of one question and seed; what has been trained is kept in folders of `work`."""

    def __init__(self, question: Question, seed: int, full: Path, work: Path) -> None:
        data = draw_folder(full, question.images, seed, work / "data")
        self.full = full
        self.question, self.seed, self.data, self.work = question, seed, f"imagefolder:{data}", work
        low, high = (round(question.px * share / RESOLUTION_STEP) for share in (LOWEST, HIGHEST))
        self.resolutions = [RESOLUTION_STEP * number for number in range(low, high + 1)]
        self.space = space_at(NETWORK, question.px)
        whole = own_arch(self.space, network_space(NETWORK))
        self.whole, self.whole_ms = whole, latency_ms(self.space, whole)
        self.budget_ms = BUDGET_SHARE * self.whole_ms

    def run(self, arm: str, searched: Answer | None) -> Answer:
        """Train an arm from its start to its test accuracy; `searched` is the answer of the first one."""
        if arm in SPACES:
            return self._searched(arm)
        if arm == "from scratch":
            assert searched is not None, "the arm `searched` comes first"
            return self._trained(arm, self.space, make_arch(self.space, searched.choices), recipe="photos")
        own = {
            "whole": lambda: (self.space, self.whole),
            "smaller images": self._smaller,
            "cut": lambda: (self.space, cut_arch(self.space, self.whole, self.limits(self.space))),
        }
        return self._trained(arm, *own[arm](), pretrained=NETWORK)

    def limits(self, space: SearchSpace) -> Limits:
        """Return the limit on the latency."""
        return (latency_limit(compute_table(load_device(DEVICE), space), self.budget_ms),)

    def _smaller(self) -> tuple[SearchSpace, Arch]:
        px = self.question.px
        while latency_ms(space_at(NETWORK, px), self.whole) > self.budget_ms:
            px -= PX_STEP
        return space_at(NETWORK, px), self.whole

    def _searched(self, arm: str) -> Answer:
        question, folder = self.question, self.work / arm.replace(", ", "-")
        space = space_at(SPACES[arm], question.px)
        start = time.monotonic()
        settings: dict[str, Any] = {"resolution_px": max(self.resolutions), "seed": self.seed}
        epochs = self._search_epochs(make_family(space, self.resolutions), settings)
        found = qnas.run_search(
            space,
            resolutions=self.resolutions,
            budgets={DEVICE: f"{self.budget_ms}ms"},
            data=self.data,
            pretrained=NETWORK,
            out=folder,
            force=True,
            random_networks=0,
            threads=question.threads,
            warmup_epochs=epochs - epochs // 2,
            search_epochs=max(1, epochs // 2),
            **settings,
        )
        spent = time.monotonic() - start
        return self._trained(arm, found.space, found.arch, source=found, spent=spent, searched=epochs)

    def _search_epochs(self, family: SpaceFamily, settings: dict[str, Any]) -> int:
        """Return the epochs of a search that take its share of the time, by some steps of both phases."""
        config = SearchConfig.load("pretrained").override(settings | {"warmup_epochs": 0})
        data = qnas_images(self.data, family.largest)
        search = FamilySearch(family, self.limits, layouts_within(family, self.limits))
        limits = mean_limits([each.limits for each in search.within])
        network = load_pretrained(NETWORK)
        searcher = Searcher(family.largest, limits, data, config, family=search, pretrained=network)
        steps = config.arch_every * PILOT_STEPS
        for _ in range(config.arch_every):
            searcher.step()
        start = time.monotonic()
        for _ in range(steps):
            searcher.step()
        of_epoch = (time.monotonic() - start) / steps * searcher.schedule.steps_per_epoch
        share = 60 * self.question.minutes * SEARCH_SHARE / AFTER_STEPS
        return max(2, round(share / of_epoch))

    def _trained(
        self,
        arm: str,
        space: SearchSpace,
        arch: Arch,
        *,
        source: Any = None,
        spent: float = 0.0,
        searched: int = 0,
        **settings: Any,
    ) -> Answer:
        """Train a network in the time that is left."""
        question, px = self.question, space.input.resolution_px
        start = time.monotonic()
        left = 60 * question.minutes - spent
        epochs = max(2, int(left / epoch_seconds(space, arch, question.images)))
        trained = qnas.train_subnet(
            source or (space, arch),
            data=self.data,
            out=self.work / f"{arm.replace(', ', '-')}-trained",
            force=True,
            epochs=epochs,
            resolution_px=px,
            seed=self.seed,
            threads=question.threads,
            **({"weights": "supernet"} if source is not None else {}),
            **settings,
        )
        seconds = spent + time.monotonic() - start
        answer = Answer(
            question,
            arm,
            self.seed,
            test_accuracy(trained.folder, self.full),
            latency_ms(space, arch),
            px,
            int(count_limit(space, "macs", 1e12).amount(arch.indices(space))),
            (searched, epochs),
            seconds,
            arch.choices,
        )
        print(
            f"seed {self.seed}, {arm}: {trained.accuracy:.2%}, {answer.latency_ms:.2f} ms, "
            f"{searched} + {epochs} epochs, {seconds / 60:.1f} min",
            flush=True,
        )
        return answer


def space_at(name: str, px: int) -> SearchSpace:
    """Return a shipped space at a resolution."""
    space = load_space(name)
    return space if px == space.input.resolution_px else load_space(f"{name}-{px}px")


def latency_ms(space: SearchSpace, arch: Arch) -> float:
    """Return a network's latency on the device."""
    return compute_table(load_device(DEVICE), space).latency_ms(arch.indices(space))


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
    return classify(network, batches(images.test, 256, device=torch.device("cpu"))).score.accuracy


class Answers:
    """The lines of a file of results."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[Answer]:
        """Return what has been trained so far."""
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [
            Answer(
                **{
                    **line,
                    "question": Question(**line["question"]),
                    "epochs": tuple(line["epochs"]),
                    "choices": tuple(line["choices"]),
                }
            )
            for line in lines
        ]

    def find(self, question: Question, arm: str, seed: int) -> Answer | None:
        """Return an answer, None if it is not there."""
        wanted = question, arm, seed
        return next((a for a in self.all() if (a.question, a.arm, a.seed) == wanted), None)

    def add(self, answer: Answer) -> None:
        """Write an answer."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(answer)) + "\n")


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
                ", ".join(
                    f"{a.epochs[0]} + {a.epochs[1]}" if a.epochs[0] else str(a.epochs[1]) for a in found
                ),
                f"{statistics.fmean(a.seconds for a in found) / 60:.1f}",
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
        "minutes",
    ]
    table = markdown_table(titles, rows)
    options = f"--images {question.images} --minutes {question.minutes:g} --px {question.px}"
    command = f"python benchmarks/pretrained.py --data DIR {options} --threads {question.threads} --write"
    return (
        f"### {question.images:,} training images, {question.minutes:g} minutes each\n\n"
        f"`{command}`, seeds {', '.join(map(str, seeds))}, {host.cpu_name()}.\n\n{table}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/CLASS and test/CLASS")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=12.0, help="of each arm")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qnas-pretrained")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=options.threads)
    question = Question(options.images, options.px, options.minutes, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = Answers(options.out / "pretrained.jsonl")
    for seed in options.seeds:
        work = options.work / f"{question.images}-{question.minutes:g}-{question.px}-{seed}"
        arms = Arms(question, seed, options.data, work)
        for arm in options.arms:
            searched = kept.find(question, ARMS[0], seed)
            if kept.find(question, arm, seed) is None:
                kept.add(arms.run(arm, searched))
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
