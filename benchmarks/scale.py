"""How a search scales with resolution, width, candidates, processes and images, and what ImageNet takes.

    python benchmarks/scale.py [--parts steps processes images imagenet] [--million] [--write]

steps       Seconds a step of a search, by resolution (RESOLUTIONS), multiples of the widths (WIDTHS), and
            candidates of a position (CANDIDATES: 3 kernels times expansions, and identity). A step is a
            weight step, and a part of the architecture step that follows every few of them. Resolutions of a
            space run the same paths on the same weights. In the other two, the budget keeps paths alike: it
            is the middle of each width's range, and for all candidates that of the fewest. The
            probabilities are those of the largest entropy within it. Variants take turns within a round; a
            ratio is the median over rounds. With one CPU thread, times are processor times.
            --torch-device cuda measures on a GPU.
processes   Seconds a step under torchrun with 1, 2 and 4 gloo processes of one thread each, by the wall
            clock: strong scaling shares one batch, weak scaling has a batch for each. `of the ideal` is
            against what the cores allow, so that more processes than cores show what they cost, not a speed.
            The share of messages is the time in `World.average`, with the wait for the slowest process.
images      Sets of 10,000, 100,000, and with --million 1,000,000 small JPEGs (image_sets.py): seconds until
            training can begin, the first time and again with qnas's caches, memory, and images a second.
            Then JPEGs of PHOTO pixels at 224 px, for the arithmetic below.
imagenet    The arithmetic of projection.py for --gpus GPUs: what is measured, predicted and assumed.

Each measurement is a line of results/scale.jsonl, and is reused, so that a stopped run continues. Everything
without --million should take some ten minutes on two idle cores, which has not been measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from experiments import OUT, RESULTS, Cache, markdown_table, write_section
from image_sets import DIFFERENT, MAKERS, draw_images
from projection import (
    PX,
    Cluster,
    arithmetic,
    commands,
    cores_line,
    derived_costs,
    measured_costs,
    memory_line,
)
from search_steps import Times
from torch import Tensor

from qnas.common import host
from qnas.data.image_data import ImageData, Split
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.blocks import count_parameters
from qnas.nn.supernet import sample_path
from qnas.search.config import SearchConfig
from qnas.search.searcher import Searcher
from qnas.solver.limits import latency_limit
from qnas.spaces.family import make_family, multiplied_widths
from qnas.spaces.space import SearchSpace, check_space, load_space
from qnas.training.loop import set_up_process
from qnas.training.processes import World, joined, world_of_environment

PARTS = ("steps", "processes", "images", "imagenet")
SPACES = ("union-mobile", "quadranet-mobile")  # the first is the default of a search
RESOLUTIONS = (64, 96, 128, 160, 224)  # px
WIDTHS = (0.5, 0.75, 1.0, 1.5)
CANDIDATES = {7: (2, 4), 13: (1, 2, 4, 6), 25: tuple(range(1, 9)), 49: tuple(range(1, 17))}  # expansions
RANKS = (1, 2, 4)
BATCH, SMALL_PX, CLASSES = 8, 64, 10  # of steps; widths and candidates run at this resolution
PROCESS_BATCH, CYCLES, LAUNCHES = 32, 4, 3  # cycles of a launch that are timed, launches of a kind
ARCH_EVERY = 3  # weight steps for each architecture step: qnas's presets photos and small
IMAGES = (10_000, 100_000)
MILLION = 1_000_000
TINY, TINY_PX = (32, 32), 64
PHOTO, PHOTOS = (500, 375), 2000  # the usual size in ImageNet
DEVICE, ROUNDS = "cpu", 3
KINDS = ("weight", "arch", "forward")

Row = dict[str, Any]
Step = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    """A search whose steps are timed, at one resolution."""

    name: str
    searcher: Searcher
    resolution_px: int

    def steps(self, batch: int, paths: Tensor) -> dict[str, Step]:
        """Return its steps by kind; each draws its paths from this random state."""
        state = self.searcher.state
        device = state.problem.acceleration.device
        images, labels = random_batch(batch, self.resolution_px, device)

        def again(step: Step) -> Step:
            def run() -> object:
                state.generator.set_state(paths)
                return step()

            return run

        def forward() -> object:
            supernet = state.supernet.eval()
            route = sample_path(supernet.alpha.detach(), supernet.mask, state.generator)
            with torch.inference_mode(), state.problem.acceleration.autocast():
                found: Tensor = supernet(images, route)
            return float(found.sum())  # waits for a GPU

        steps: tuple[Step, ...] = (
            lambda: self.searcher._weight_step(images, labels),
            lambda: self.searcher._arch_step(images, labels),
            forward,
        )
        return {f"{self.name}, {kind}": again(step) for kind, step in zip(KINDS, steps, strict=True)}


@dataclass
class Messages:
    """The seconds and bytes of the messages between processes."""

    seconds: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class TimedWorld(World):
    """The processes of a run, with the time that messages take."""

    messages: Messages = field(default_factory=Messages)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the processes, and note what it takes."""
        start = time.perf_counter()
        super().average(tensors)
        if self.size > 1:
            self.messages.seconds += time.perf_counter() - start
            self.messages.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--spaces", nargs="+", default=SPACES, help="of the resolutions")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--torch-device", default="cpu", help="of the steps: cpu or cuda")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step")
    parser.add_argument("--million", action="store_true", help="also 1,000,000 images, which takes minutes")
    parser.add_argument("--gpus", type=int, default=Cluster.gpus, help="of the projection")
    parser.add_argument(
        "--gpu-batch", type=int, default=Cluster.batch, help="images a GPU, of a search's step"
    )
    parser.add_argument("--efficiency", type=float, default=Cluster.efficiency, help="of them: an assumption")
    parser.add_argument("--work", type=Path, help="folder for the sets of images; default: a temporary one")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--write", action="store_true", help=f"write a section of {RESULTS.name} for each part"
    )
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)  # a process of torchrun
    options = parser.parse_args()
    set_up_process(options.threads)
    if options.worker:
        work(json.loads(options.worker))
        return
    known = Cache(options.out / "scale.jsonl")
    for part in options.parts:
        text = PART_TEXTS[part](options, known)
        print(text, flush=True)
        if options.write:
            write_section(RESULTS, f"scale {part}", text)


def machine(torch_device: str = "cpu") -> str:
    """Return the name of the processor with its cores, or of the GPU."""
    if torch_device == "cuda":
        return torch.cuda.get_device_name()
    return f"{host.cpu_name()}, {os.cpu_count()} cores"


# ---- steps


def random_batch(batch: int, px: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return random images (B, 3, H, W), channels last in memory, and labels (B,)."""
    images = torch.randn(batch, 3, px, px, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (batch,), device=device)


def no_images(images: int) -> ImageData:
    """Return a set that a search can be made with. Its steps are given other images."""
    labels = torch.arange(images) % CLASSES

    def split(name: str) -> Split:
        pixels = torch.zeros(images, 3, 1, 1, dtype=torch.uint8)
        return Split(name, pixels, labels, (0.5,) * 3, (0.25,) * 3, flip=True)

    names = ("train", "heldout", "test", "train_and_heldout")
    return ImageData("none", tuple(map(str, range(CLASSES))), *map(split, names), 1, 3, "none")


def middle_ms(space: SearchSpace) -> float:
    """Return the middle of the range of a space's latencies."""
    table = compute_table(load_device(DEVICE), space)
    return (table.fastest_ms + table.slowest_ms) / 2


def make_searcher(
    space: SearchSpace, budget_ms: float, batch: int, torch_device: str = "cpu", world: World | None = None
) -> Searcher:
    """Return a search after its warm-up, with the probabilities of the largest entropy in the budget."""
    config = SearchConfig.load("photos").override(
        {
            "warmup_epochs": 0,
            "search_epochs": 1_000_000,  # keeps the temperature
            "batch_size": batch,
            "learning_rate": 1e-5,  # keeps the weights about the same
            "arch_learning_rate": 1e-6,  # and the probabilities
            "arch_every": ARCH_EVERY,
            "torch_device": torch_device,
        }
    )
    limit = latency_limit(compute_table(load_device(DEVICE), space), budget_ms)
    searcher = Searcher(space, (limit,), no_images(batch), config, world or World())
    supernet = searcher.state.supernet
    with torch.no_grad():
        supernet.alpha.copy_(searcher._weight_steps._even_logits.where(supernet.mask, torch.zeros(())))
    return searcher


def with_candidates(space: SearchSpace, expansions: Sequence[int]) -> SearchSpace:
    """Return a space whose quadratic candidates have these expansions."""
    content = space.written()
    for part in (content, *content["stages"]):
        kept = [each for each in part.get("candidates", ()) if each["block"] != "quadra"]
        if len(kept) < len(part.get("candidates", ())):
            kernels = sorted({each["kernel"] for each in part["candidates"] if each["block"] == "quadra"})
            own = [{"block": "quadra", "kernel": k, "expansion": e} for k in kernels for e in expansions]
            part["candidates"] = own + kept
    return check_space(content, space.name)


def with_width(space: SearchSpace, multiple: float) -> SearchSpace:
    """Return a space at a multiple of the widths of its stages."""
    return make_family(space, widths=multiplied_widths(space, [multiple])).largest


def resolution_variants(space: SearchSpace, batch: int, torch_device: str) -> list[Variant]:
    """Return one search of the space at all resolutions."""
    searcher = make_searcher(space, middle_ms(space), batch, torch_device)
    return [Variant(f"{px} px", searcher, px) for px in RESOLUTIONS]


def width_variants(space: SearchSpace, batch: int, torch_device: str) -> list[Variant]:
    """Return a search for each multiple of the widths, in the middle of its range."""
    spaces = {f"width x {by:g}": with_width(space, by) for by in WIDTHS}
    return [
        Variant(name, make_searcher(own, middle_ms(own), batch, torch_device), SMALL_PX)
        for name, own in spaces.items()
    ]


def candidate_variants(space: SearchSpace, batch: int, torch_device: str) -> list[Variant]:
    """Return a search for each number of candidates, with one budget: the middle of the fewest."""
    budget_ms = middle_ms(with_candidates(space, CANDIDATES[min(CANDIDATES)]))
    return [
        Variant(
            f"{count} candidates",
            make_searcher(with_candidates(space, expansions), budget_ms, batch, torch_device),
            SMALL_PX,
        )
        for count, expansions in CANDIDATES.items()
    ]


STUDIES: dict[str, Callable[[SearchSpace, int, str], list[Variant]]] = {
    "resolution": resolution_variants,
    "width": width_variants,
    "candidates": candidate_variants,
}


def time_variants(variants: Sequence[Variant], batch: int, rounds: int, clock: Callable[[], float]) -> Times:
    """Time the steps of all variants in turns, with other paths in each round."""
    times, generator = Times(), torch.Generator()
    for number in range(rounds):
        paths = generator.manual_seed(number).get_state()
        steps: dict[str, Step] = {}
        for variant in variants:
            steps |= variant.steps(batch, paths)
        times.take_turns(steps, clock)
    return times


def step_row(study: str, space_name: str, options: argparse.Namespace, known: Cache) -> Row:
    """Return the times of a study's variants, measured unless they are known."""
    parts = {
        "part": "steps",
        "study": study,
        "space": space_name,
        "machine": machine(options.torch_device),
        "torch": torch.__version__,
        "threads": options.threads,
        "batch": options.batch,
        "rounds": options.rounds,
    }
    if (row := known.get(parts)) is not None:
        return row
    variants = STUDIES[study](load_space(space_name), options.batch, options.torch_device)
    is_alone = options.threads == 1 and options.torch_device == "cpu"
    clock = time.thread_time if is_alone else time.perf_counter
    times = time_variants(variants, options.batch, options.rounds, clock)
    print(f"{study}, {space_name}: measured at a load of {host.load()}", file=sys.stderr, flush=True)
    found = {
        "seconds": times.rounds,
        "median_s": {name: statistics.median(values) for name, values in times.rounds.items()},
        "parameters": {each.name: count_parameters(each.searcher.state.supernet) for each in variants},
    }
    return known.put(parts, found)


def whole_steps(row: Row, name: str) -> list[float]:
    """Return the seconds a step of a variant in each round: a weight step and its part of the other."""
    both = (row["seconds"][f"{name}, {kind}"] for kind in ("weight", "arch"))
    return [weight + arch / ARCH_EVERY for weight, arch in zip(*both, strict=True)]


def ratio(row: Row, name: str, other: str) -> float:
    """Return the median over rounds of the ratio of two variants' seconds a step."""
    both = zip(whole_steps(row, name), whole_steps(row, other), strict=True)
    return statistics.median(own / others for own, others in both)


def step_cells(row: Row, base: str) -> Iterator[list[str]]:
    """Yield the cells of each variant."""
    for name, parameters in row["parameters"].items():
        median = {kind: row["median_s"][f"{name}, {kind}"] for kind in KINDS}
        yield [
            f"{row['space']}, {name}",
            f"{statistics.median(whole_steps(row, name)):.3g}",
            f"{ratio(row, name, base):.2f}",
            f"{median['weight'] / median['forward']:.2f}",
            f"{median['arch'] / median['forward']:.2f}",
            f"{parameters / 1e6:.1f}M",
        ]


BASES = {"resolution": f"{PX} px", "width": "width x 1", "candidates": f"{min(CANDIDATES)} candidates"}
TITLES = ["variant", "s a step", "ratio", "weight step / forward", "arch. step / forward", "parameters"]


def describe_steps(options: argparse.Namespace, known: Cache) -> str:
    """Measure the steps of searches, and return the section."""
    tables = []
    for study, base in BASES.items():
        spaces = options.spaces if study == "resolution" else options.spaces[:1]
        rows = [step_row(study, name, options, known) for name in spaces]
        cells = [cell for row in rows for cell in step_cells(row, base)]
        tables.append(f"{study.capitalize()} (ratios to {base}):\n\n{markdown_table(TITLES, cells)}")
    pixels = ", ".join(f"{(px / PX) ** 2:.2f} at {px}" for px in RESOLUTIONS)
    how = (
        f"`{command_line('steps', options)}` on {machine(options.torch_device)}, {options.threads} "
        f"thread(s), torch {torch.__version__}: batches of {options.batch} random images, an architecture "
        f"step after every {ARCH_EVERY} weight steps, {options.rounds} rounds. The head of the script says "
        f"what is compared. Widths and candidates run at {SMALL_PX} px. Pixels, as a share of those of "
        f"{PX} px: {pixels}."
    )
    return "\n\n".join(["## Scale: steps of a search", how, *tables])


# options that the figures of a part depend on, with their defaults
OWN_OPTIONS: dict[str, Row] = {
    "steps": {"spaces": SPACES, "rounds": ROUNDS, "threads": 1, "torch_device": "cpu", "batch": BATCH},
    "imagenet": {"gpus": Cluster.gpus, "efficiency": Cluster.efficiency, "gpu_batch": Cluster.batch},
}


def command_line(part: str, options: argparse.Namespace) -> str:
    """Return the command of a part with the options that are not the default."""
    words = ["python benchmarks/scale.py", "--parts", part]
    for name, default in OWN_OPTIONS.get(part, {}).items():
        if (value := getattr(options, name)) != default:
            given = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, given)]
    if part == "images" and options.million:
        words.append("--million")
    return " ".join([*words, "--write"])


# ---- processes


def launches() -> Iterator[tuple[str, int, int]]:
    """Yield the kind of scaling, the processes and the batch of all of them."""
    yield "one", 1, PROCESS_BATCH
    for ranks in RANKS[1:]:
        yield "strong", ranks, PROCESS_BATCH
        yield "weak", ranks, ranks * PROCESS_BATCH


def work(task: Row) -> None:
    """Take steps as one process of torchrun; the main one writes what they took."""
    space = load_space(task["space"])
    world = world_of_environment()
    timed = TimedWorld(world.rank, world.size, world.local_rank)
    with joined(timed):
        searcher = make_searcher(space, middle_ms(space), task["batch"], world=timed)
        batch = random_batch(task["batch"] // timed.size, SMALL_PX)
        cycles, messages = [], []
        for _ in range(1 + task["cycles"]):  # the first one warms up
            timed.messages.seconds = timed.messages.bytes = 0
            start = time.perf_counter()
            for _ in range(ARCH_EVERY):
                searcher._weight_step(*batch)
            searcher._arch_step(*batch)
            cycles.append((time.perf_counter() - start) / ARCH_EVERY)
            messages.append((timed.messages.seconds / ARCH_EVERY, timed.messages.bytes / ARCH_EVERY))
        timed.check_same(searcher.to_dict())
    if timed.is_main:
        found = {
            "step_s": cycles[1:],
            "message_s": [seconds for seconds, _ in messages[1:]],
            "message_bytes": statistics.median(count for _, count in messages[1:]),
        }
        Path(task["result"]).write_text(json.dumps(found), encoding="utf-8")


def launch(space: str, ranks: int, batch: int) -> Row:
    """Run a search's steps in processes of torchrun; return what they took, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        task = {"space": space, "batch": batch, "cycles": CYCLES, "result": str(result)}
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *(__file__, "--worker", json.dumps(task)),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        found: Row = json.loads(result.read_text(encoding="utf-8"))
        return found


def process_rows(known: Cache) -> list[Row]:
    """Return what each launch took, measured unless it is known; kinds take turns."""
    rows = []
    for number in range(LAUNCHES):
        for kind, ranks, batch in launches():
            parts = {
                "part": "processes",
                "space": SPACES[0],
                "machine": machine(),
                "torch": torch.__version__,
                "kind": kind,
                "ranks": ranks,
                "batch": batch,
                "launch": number,
            }
            row = known.get(parts)
            rows.append(known.put(parts, launch(SPACES[0], ranks, batch)) if row is None else row)
    return rows


def efficiency(kind: str, ranks: int, cores: int, one_s: float, step_s: float) -> tuple[float, float]:
    """Return the speed-up over one process, in images a second, and its share of the ideal.

    The ideal speed-up is the number of processes, or of cores where there are fewer.

    >>> efficiency("weak", 2, 8, 1.0, 1.25)
    (1.6, 0.8)
    >>> efficiency("strong", 4, 2, 1.0, 0.5)
    (2.0, 1.0)
    """
    faster = one_s / step_s * (ranks if kind == "weak" else 1)
    return faster, faster / min(ranks, cores)


def describe_processes(options: argparse.Namespace, known: Cache) -> str:
    """Measure searches of several processes, and return the section."""
    rows, cores = process_rows(known), os.cpu_count() or 1
    one = [row for row in rows if row["kind"] == "one" and "step_s" in row]
    cells = []
    for kind, ranks, batch in launches():
        own = [row for row in rows if (row["kind"], row["ranks"]) == (kind, ranks)]
        name = f"{ranks} of {kind} scaling" if ranks > 1 else "1"
        if not one or any("error" in row for row in own):
            error = next(
                (row["error"] for row in (*own, *rows) if "error" in row), "no figure of one process"
            )
            cells.append([name, str(batch), f"failed: {error}", *[""] * 4])
            continue
        alone = {row["launch"]: statistics.median(row["step_s"]) for row in one}
        pairs = [(alone[row["launch"]], statistics.median(row["step_s"])) for row in own]
        gains = [efficiency(kind, ranks, cores, *pair) for pair in pairs]
        share = statistics.median(
            statistics.median(row["message_s"]) / statistics.median(row["step_s"]) for row in own
        )
        cells.append(
            [
                name,
                str(batch),
                f"{statistics.median(step_s for _, step_s in pairs):.3g}",
                f"{statistics.median(gain for gain, _ in gains):.2f}",
                f"{statistics.median(part for _, part in gains):.0%}",
                f"{share:.0%}",
                f"{statistics.median(row['message_bytes'] for row in own) / 1e6:.1f}",
            ]
        )
    titles = ["processes", "batch", "s a step", "speed-up", "of the ideal", "share of messages", "MB a step"]
    how = (
        f"`{command_line('processes', options)}` on {machine()}, torch {torch.__version__}: steps of a "
        f"search in {SPACES[0]} at {SMALL_PX} px under torchrun, gloo, one thread each; {LAUNCHES} "
        f"launches that take turns, {CYCLES} architecture steps each. **There are {cores} cores**: more "
        "processes than that share them, and their rows show what processes cost, not what they gain."
    )
    return "\n\n".join(["## Scale: processes", how, markdown_table(titles, cells)])


# ---- images


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """Yield a folder for sets of images, which is empty and removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given) as folder:
        yield Path(folder)


def image_tasks(million: bool) -> Iterator[Row]:
    """Yield the sets to measure; those with a limit of 0 are decoded for each batch whatever their size."""
    counts = (*IMAGES, MILLION) if million else IMAGES
    tiny = {"size": TINY, "resolution_px": TINY_PX}
    for kind in MAKERS:
        for count in counts:
            yield {"kind": kind, "images": count, "limit": 0, **tiny}
    for count in IMAGES:
        yield {"kind": "shards", "images": count, "limit": None, **tiny}
    yield {"kind": "shards", "images": PHOTOS, "limit": 0, "size": PHOTO, "resolution_px": PX}


def image_row(task: Row, work_in: Path | None, known: Cache) -> Row:
    """Return what a set takes, measured unless it is known: a first start, and one with qnas's caches."""
    parts = {"part": "images", "machine": machine(), **task, "size": list(task["size"])}
    if (row := known.get(parts)) is not None:
        return row
    with work_folder(work_in) as folder:
        start = time.perf_counter()
        drawn = draw_images(min(DIFFERENT, task["images"]), task["size"])
        spec = MAKERS[task["kind"]](folder / "images", task["images"], drawn)
        made_s = time.perf_counter() - start
        words = [str(Path(__file__).with_name("image_sets.py")), spec]
        words += ["--resolution", str(task["resolution_px"])]
        words += [] if task["limit"] is None else ["--limit", str(task["limit"])]
        environment = os.environ | {"QNAS_HOME": str(folder / "home")}
        found: Row = {"made_s": made_s, "encoded_bytes": statistics.fmean(map(len, drawn))}
        for name in ("first", "again"):
            done = subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                return known.put(parts, {"error": done.stderr.strip().splitlines()[-1]})
            found[name] = json.loads(done.stdout)
    return known.put(parts, found)


def image_cells(row: Row) -> list[str]:
    """Return the cells of a set."""
    size = f"{row['size'][0]} x {row['size'][1]} to {row['resolution_px']} px"
    name = [f"{row['kind']}, {size}", f"{row['images']:,}"]
    if "error" in row:
        return [*name, f"failed: {row['error']}", *[""] * 6]
    first, again = row["first"], row["again"]
    return [
        *name,
        "in memory" if first["in_memory"] else "for each batch",
        f"{first['start_s']:.1f}",
        f"{again['start_s']:.1f}",
        f"{again['first_batch_s']:.2f}",
        f"{first['held_bytes'] / 1e6:,.0f}",
        f"{again['images_per_s']:,.0f}",
        f"{again['images_per_core_s']:,.0f}",
    ]


def describe_images(options: argparse.Namespace, known: Cache) -> str:
    """Measure sets of images, and return the section."""
    rows = [image_row(task, options.work, known) for task in image_tasks(options.million)]
    titles = ["set", "images", "decoded", "start, s", "again, s", "first batch, s", "MB", "images/s"]
    titles.append("images/s a core")
    how = (
        f"`{command_line('images', options)}` on {machine()}. Sets of JPEGs, of which {DIFFERENT:,} differ, "
        "linked or repeated within a shard, in the system's file cache. `start` is the first one, which "
        "lists the files and decodes each image once, to keep it or to find broken ones; `again` has qnas's "
        "caches. MB is the growth of the process's peak from before to the last batch. Batches of 128, "
        "augmented as in a search. A core's images are those a second of processor time."
    )
    return "\n\n".join(["## Scale: images", how, markdown_table(titles, [image_cells(row) for row in rows])])


# ---- ImageNet


def newest(known: Cache, **parts: Any) -> list[Row]:
    """Return the measured rows with these parts, the last one first."""
    return [row for row in reversed(known.matching(parts)) if "error" not in row]


def describe_imagenet(options: argparse.Namespace, known: Cache) -> str:
    """Return the section of the projection, from what is measured."""
    steps = newest(known, part="steps", study="resolution", space=SPACES[0])
    if not steps:
        return "## Scale: ImageNet\n\nNot computed: `--parts steps` was not run."
    on_gpu = [row for row in steps if "NVIDIA" in row["machine"]]
    costs = measured_costs(on_gpu[0]) if on_gpu else derived_costs(steps[0])
    cluster = Cluster(options.gpus, options.efficiency, options.gpu_batch)
    lines = [*arithmetic(costs, cluster, SPACES[0])]
    photos = newest(known, part="images", images=PHOTOS, size=list(PHOTO))
    lines += [cores_line(costs, cluster, row) for row in photos[:1]]
    shards = newest(known, part="images", kind="shards", limit=0, size=list(TINY))
    lines += [memory_line(max(shards, key=lambda row: row["images"]))] if shards else []
    search, train = commands(cluster, SPACES[0])
    head = (
        f"`{command_line('imagenet', options)}`: nothing of this has run. The arithmetic for ImageNet-1k on "
        f"{options.gpus} GPUs at {PX} px, with what is measured, predicted and assumed:"
    )
    listed = "\n".join(f"- {line}" for line in lines)
    end = f"The commands: `{search}`, then `{train}`."
    return f"## Scale: ImageNet on {options.gpus} GPUs\n\n{head}\n\n{listed}\n\n{end}"


PART_TEXTS: dict[str, Callable[[argparse.Namespace, Cache], str]] = {
    "steps": describe_steps,
    "processes": describe_processes,
    "images": describe_images,
    "imagenet": describe_imagenet,
}


if __name__ == "__main__":
    main()
