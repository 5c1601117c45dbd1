"""QuadraNet's table III (arXiv 2311.17956) in shape: quadratic blocks and inverted residuals of one latency.

    python benchmarks/table_three.py --data cifar10:DIR [--write]

For each budget (BUDGETS), networks of union-mobile at 224 px are searched for among quadratic blocks, among
inverted residuals, and among both (families.py), with `qnas search --finalists` in the same processor time.
Budgets and latencies are those at 224 px. Supernets, finalists and networks are trained on images of 48 px,
which two cores can do. What is best there need not be best on ImageNet. The rows of the paper, which trained
for 300 epochs there, stand beside ours.

By table `gpu`, which is TensorRT at batch 1, the paper's 3 ms on the GPU hold every network of this space.
The budget there is two thirds of the range, as one of those on the CPU.

Every training and search is a line in results/, so that a stopped run goes on. --budgets and --seeds select
what is run, so that several processes can share the work; --write writes all that is known to RESULTS.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

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
    BASE,
    MOBILE,
    RECIPE,
    UNION,
    Task,
    network_of,
    parts_of,
    search,
    search_parts,
    table_of,
    train,
    union_of,
)

from qnas.common import host
from qnas.spaces.arch import Arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.training.loop import set_up_process

# By device: such as 30ms, or a share of the range of inverted residuals.
BUDGETS: dict[str, tuple[str, float | str]] = {
    "vpu": ("vpu", "30ms"),
    "gpu": ("gpu", 2 / 3),
    "cpu-third": ("cpu", 1 / 3),
    "cpu-two-thirds": ("cpu", 2 / 3),
}
SEEDS = (0, 1, 2)
ARMS = (BASE, "quadratic", UNION)
DEVICES = ("cpu", "vpu", "gpu")
# Of the paper, for a budget on each device: M MACs, ms on the CPU, the VPU and the GPU, top-1 of ImageNet.
PAPER = {
    "vpu": {BASE: (275, 379.1, 29.9, 1.7, 72.7), "quadratic": (312, 437.1, 29.9, 1.9, 73.2)},
    "gpu": {BASE: (1065, 1521, 146.1, 2.9, 74.4), "quadratic": (948, 1334, 117.5, 2.9, 76.7)},
    "cpu": {BASE: (333, 299.6, 53.1, 1.8, 72.4), "quadratic": (279, 299.8, 34.7, 2.1, 73.1)},
}


@dataclass(frozen=True)
class Found:
    """A network that a search found, with its accuracy when trained alone."""

    arch: Arch
    accuracy: float


def known(task: Task, arm: str, searched: Cache, trained: Cache) -> list[Found]:
    """Return the networks of an arm that have been searched for and trained."""
    found = []
    for seed in SEEDS:
        row = searched.get(search_parts(task, arm, seed))
        if row is None:
            continue
        space, arch = network_of(task.scale, row)
        training = trained.get(parts_of(task, space, arch))
        if training is not None:
            found.append(Found(arch, training["accuracy"]))
    return found


def row_of(arm: str, found: Sequence[Found]) -> list[str]:
    """Return the row of an arm: means over its networks."""
    space = union_of(MOBILE)
    blocks = [lower(space, each.arch) for each in found]
    latencies = [
        fmean(table_of(MOBILE, device).latency_ms(each.arch.indices(space)) for each in found)
        for device in DEVICES
    ]
    return [
        arm,
        f"{fmean(map(count_macs, blocks)) / 1e6:.0f}",
        f"{fmean(map(count_params, blocks)) / 1e6:.2f}",
        *(f"{latency:.2f}" for latency in latencies),
        percent(*mean_and_sd([each.accuracy for each in found])),
    ]


def paper_row(arm: str, figures: Sequence[float]) -> list[str]:
    """Return the row of the paper's network that goes with an arm."""
    macs, *latencies, accuracy = figures
    name = "ProxylessNAS" if arm == BASE else "QuadraNet"
    return [f"{name}, paper", f"{macs:g}", "-", *(f"{each:g}" for each in latencies), f"{accuracy}%"]


def verdict(means: dict[str, float], device: str) -> str:
    """Say in a sentence which family is ahead, and what the paper has."""
    paper = PAPER[device]
    gain = 100 * (means["quadratic"] - means[BASE])
    theirs = paper["quadratic"][-1] - paper[BASE][-1]
    best = max(means, key=lambda arm: means[arm])
    return (
        f"Quadratic blocks are {gain:+.1f} points beside inverted residuals (paper: {theirs:+.1f}); "
        f"`{best}` is ahead."
    )


def describe(task: Task, arms: dict[str, list[Found]]) -> str:
    """Return a budget's table: the arms that have networks, and the paper's rows."""
    arms = {arm: found for arm, found in arms.items() if found}
    rows = [row_of(arm, found) for arm, found in arms.items()]
    rows += [paper_row(arm, figures) for arm, figures in PAPER[task.device].items()]
    header = ["blocks", "M MACs", "M parameters", *(f"{device}, ms" for device in DEVICES), "accuracy"]
    title = f"### {task.device}, {task.budget_ms:.4g} ms"
    if not isinstance(task.budget, str):
        title += f" ({task.budget:.2g} of the range)"
    lines = [title, markdown_table(header, rows)]
    if {BASE, "quadratic"} <= arms.keys():
        means = {arm: fmean(each.accuracy for each in found) for arm, found in arms.items()}
        lines.append(verdict(means, task.device))
    return "\n\n".join(lines)


HEAD = f"""## QuadraNet's table III: networks searched for at one latency

`python benchmarks/table_three.py --data cifar10:DIR --write`. Networks of union-mobile, with latencies at
{MOBILE.deployed_px} px by the tables; searches of about {MOBILE.seconds:.0f} s of processor time and
trainings at {MOBILE.trained_px} px. {describe_recipe(RECIPE)} The paper's rows are ImageNet's, and its
milliseconds other devices' than those of our tables."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:DIR or fashion-mnist:DIR")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[SEEDS[0]], choices=SEEDS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write all tables into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    trained, searched = (Cache(options.out / f"union_{name}.jsonl") for name in ("trainings", "searches"))
    tables = []
    for name, (device, budget) in BUDGETS.items():
        task = Task(device, budget, options.data, MOBILE)
        for seed in options.seeds if name in options.budgets else ():
            for arm in ARMS:
                train(task, *network_of(task.scale, search(task, arm, seed, searched)), trained)
        arms = {arm: known(task, arm, searched, trained) for arm in ARMS}
        if any(arms.values()):
            tables.append(describe(task, arms))
            print(tables[-1], flush=True)
    if options.write:
        write_section(RESULTS, "table_three", "\n\n".join([HEAD, host.cpu_name() + ".", *tables]))


if __name__ == "__main__":
    main()
