"""Quadratic blocks, inverted residuals and both in one space, at equal latency: random networks and searches.

    python benchmarks/union_quality.py --data cifar10:DIR --data fashion-mnist:DIR [--write]

union-tiny holds inverted residuals, star blocks and QuadraBlocks side by side. families.py says what its
families of blocks are, and how networks are searched for and trained.

Budgets are SHARES of the way from the fastest to the slowest inverted residuals, with latencies at 96 px.
For each device, budget and data set there are random networks of each family that take at least 97% of the
budget, and searches of each family with `qnas search --finalists`: about a third of their processor time goes
to the supernet, the rest to the finalists. `union, supernet alone` spends it all on the supernet.
`union, layouts` searches over three widths of each stage and three resolutions as well. All networks are
trained alone with one recipe and one seed; the seeds of the table are those of the searches.

Every training and search is a line in results/, so that a stopped run goes on. --devices, --data, --seeds and
--parts select what is run, and --write writes all that is known to RESULTS.md.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from experiments import (
    OUT,
    RESULTS,
    Cache,
    describe_recipe,
    markdown_table,
    mean_and_sd,
    percent,
    write_section,
)
from families import (
    ALONE,
    LAYOUTS,
    RECIPE,
    UNION,
    Task,
    network_of,
    parts_of,
    random_networks,
    search,
    search_parts,
    train,
)

from qnas.common import host
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table, predict_blocks
from qnas.spaces.arch import Arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import set_up_process

DEVICES = ("cpu", "vpu", "gpu")
# Budgets, of the way from the fastest to the slowest inverted residuals: where some of the blocks fit, so
# that it matters which. On other devices than the first, the last one alone: on gpu, where few blocks fit, no
# inverted residuals take the other.
SHARES = (0.15, 0.3)
RANDOM = {UNION: 10, "quadratic": 5, "inverted": 5, LAYOUTS: 10}  # networks
SEARCHES = ("inverted", "quadratic", UNION, ALONE, LAYOUTS)
SEEDS, OTHERS_SEEDS = (0, 1, 2), (0,)


# ---- the table


@dataclass(frozen=True)
class Outcome:
    """A network with its accuracy when trained alone."""

    kind: str
    accuracy: float
    latency_ms: float
    macs: int
    params: int
    seconds: float | None = None  # of its search: processor time


def outcomes(task: Task, searched: Cache, trained: Cache) -> Iterator[Outcome]:
    """Yield what is known of a task: random networks first."""
    networks: list[tuple[str, float | None, SearchSpace, Arch]] = [
        (f"random {family}", None, space, arch)
        for family, count in RANDOM.items()
        for space, arch in random_networks(task, family, count)
    ]
    for arm in SEARCHES:
        for seed in SEEDS:
            row = searched.get(search_parts(task, arm, seed))
            if row is not None:
                networks.append((f"searched {arm}", row["spent_s"], *network_of(task.scale, row)))
    for kind, seconds, space, arch in networks:
        row = trained.get(parts_of(task, space, arch))
        if row is not None:
            blocks = lower(space, arch)
            latency_ms = compute_table(load_device(task.device), space).latency_ms(arch.indices(space))
            macs, params = count_macs(blocks), count_params(blocks)
            yield Outcome(kind, row["accuracy"], latency_ms, macs, params, seconds)


def describe(task: Task, found: Sequence[Outcome]) -> str:
    """Return a task's table: gains are over the mean of random networks of the union."""
    random = [each.accuracy for each in found if each.kind == f"random {UNION}"]
    rows = []
    for kind in dict.fromkeys(each.kind for each in found):
        own = [each for each in found if each.kind == kind]
        accuracies = [each.accuracy for each in own]
        seconds = [each.seconds for each in own if each.seconds is not None]
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
                f"{fmean(seconds):.0f}" if seconds else "",
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
        "s of search",
    ]
    name = task.data.partition(":")[0]
    title = f"### {name}, {task.device}, {task.budget_ms:.3f} ms ({task.budget:g} of the range)"
    return "\n\n".join([title, markdown_table(header, rows), *verdict(found)])


def verdict(found: Sequence[Outcome]) -> list[str]:
    """Say in a sentence what the table means for a user; nothing where there is nothing to compare."""
    by_kind: dict[str, list[float]] = {}
    for each in found:
        by_kind.setdefault(each.kind, []).append(each.accuracy)
    means = {kind: 100 * fmean(accuracies) for kind, accuracies in by_kind.items()}
    parts = []
    if {"random quadratic", "random inverted"} <= means.keys():
        ahead = means["random quadratic"] - means["random inverted"]
        parts.append(f"random quadratic networks are {ahead:+.1f} points beside random inverted residuals")
    searched = {family: means.get(f"searched {family}") for family in ("quadratic", "inverted", UNION)}
    if (of_union := searched.pop(UNION)) is not None:
        if f"random {UNION}" in means:
            random = 100 * np.array(by_kind[f"random {UNION}"])
            parts.append(
                f"a search of the union gains {of_union - random.mean():+.1f} over random ones, of which the "
                f"best of {len(random)} is {random.max() - random.mean():+.1f} from their mean"
            )
        known = {family: mean for family, mean in searched.items() if mean is not None}
        if known:
            better = max(known, key=lambda family: known[family])
            parts.append(f"it ends {of_union - known[better]:+.1f} beside one of the {better} blocks alone")
    return [f"For a user: {', and '.join(parts)}."] if parts else []


PARTS = {
    "1x1 convolutions": ("conv1x1",),
    "depthwise": ("dwconv",),
    "stem and transitions": ("conv", "patch"),
}


def describe_parts(task: Task) -> str:
    """Return a table of where the milliseconds of the random networks of each family go: means."""
    device = load_device(task.device)
    rows = []
    for family, count in RANDOM.items():
        spent: Counter[str] = Counter()
        blocks = macs = 0
        for space, arch in random_networks(task, family, count):
            lowered = lower(space, arch)
            macs += count_macs(lowered)
            blocks += sum(choice != "identity" for choice in arch.choices)
            for row in predict_blocks(device, lowered):
                part = next((name for name, kinds in PARTS.items() if row.kernel.kind in kinds), "others")
                spent[part] += row.latency_ms
            spent["others"] += device.network_ms
        cells = [f"{spent[part] / count:.3f}" for part in (*PARTS, "others")]
        rows.append([f"random {family}", f"{blocks / count:.1f}", f"{macs / count / 1e6:.1f}", *cells])
    header = ["network", "blocks", "M MACs", *(f"{part}, ms" for part in PARTS)]
    return markdown_table([*header, "products, sums, norms and others, ms"], rows)


HEAD = f"""## Quadratic blocks, inverted residuals and their union

`python benchmarks/union_quality.py`. {describe_recipe(RECIPE)} Seconds are
processor time. `gain` is in points over the mean of random networks of the union, `beaten` how many of these
each search's network beats. The head of the script says what is compared."""


def tasks_of(devices: Sequence[str], data: Sequence[str], shares: Sequence[float]) -> list[Task]:
    """Return the tasks: all shares on cpu, the last one on other devices, there on the first data set."""
    return [
        Task(device, share, spec)
        for device in devices
        for spec in (data if device == DEVICES[0] else data[:1])
        for share in (shares if device == DEVICES[0] else shares[-1:])
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
            for family, count in RANDOM.items():
                for space, arch in random_networks(task, family, count):
                    train(task, space, arch, trained)
        if "searches" in options.parts:
            for seed in options.seeds if task.device == DEVICES[0] else OTHERS_SEEDS:
                for arm in options.arms:
                    row = search(task, arm, seed, searched)
                    train(task, *network_of(task.scale, row), trained)
    tables = []
    for task in tasks:
        if found := list(outcomes(task, searched, trained)):
            tables += [
                describe(task, found),
                *([describe_parts(task)] if task.data == options.data[0] else []),
            ]
    text = "\n\n".join([HEAD, host.cpu_name() + ".", *tables])
    print(text)
    if options.write:
        write_section(RESULTS, "union_quality", text)


if __name__ == "__main__":
    main()
