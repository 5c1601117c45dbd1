"""The ranks of networks within a kind of block and between kinds, by how a supernet's weight steps are taken.

    python benchmarks/kind_ranks.py --data cifar10:DIR [--space union-tiny] [--write]

For each kind of block of a space, networks of this kind alone are drawn with latencies on cpu from 0.6 of the
budget to the budget. This is the middle of the space's range, or less where a kind is faster: 0.9 of its
slowest network. The networks are trained alone with one recipe. For each way of taking weight steps (`ARMS`),
supernets are trained for the same processor time within the budget, as a search does in its warm-up, and the
same networks are scored with their weights on held-out images. The table has

- the epochs that the time sufficed for, and the mean accuracy of the networks with the supernet's weights;
- Kendall's tau between the supernet's accuracies and those of training alone, over pairs of networks of one
  kind, and over pairs of different kinds: a bias for a kind lowers the second alone;
- the bias itself: the standard deviation over kinds of the mean difference of both accuracies, in points.

Figures are means over seeds, with standard deviations. Existing results are reused, so a stopped run
continues. --write writes the table to RESULTS.md.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from experiments import (
    OUT,
    RESULTS,
    Cache,
    Recipe,
    base_config,
    blocks_of,
    cache_key,
    describe_recipe,
    epoch_seconds,
    load_images,
    markdown_table,
    mean_and_sd,
    middle_ms,
    percent,
    tiny_space,
    train_alone,
    write_section,
)
from scipy.stats import kendalltau

from qnas.common import host
from qnas.common.files import write_json
from qnas.data.image_data import ImageData
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import LatencyTable
from qnas.search.evaluator import evaluator_of
from qnas.search.searcher import Searcher
from qnas.solver.distributions import sample_near
from qnas.solver.kinds import kinds_of, names_of, places_of, take
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.space import SearchSpace
from qnas.training.loop import set_up_process

ARMS: dict[str, dict[str, Any]] = {
    "path": {},
    "fair": {"paths": "fair"},
    "sandwich": {"weight_steps": "sandwich"},
    "sandwich, 1 path": {"weight_steps": "sandwich", "step_paths": 1},
    "fair sandwich": {"weight_steps": "sandwich", "paths": "fair"},
    "fair sandwich, 1 path": {"weight_steps": "sandwich", "step_paths": 1, "paths": "fair"},
}
FASTEST = 0.6  # share of the budget that networks take at least
DRAW = 0  # seed of the networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="cifar10:DIR, for instance")
    parser.add_argument("--space", default="union-tiny", help="one of benchmarks/spaces")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=120.0, help="of training a supernet")
    parser.add_argument("--networks", type=int, default=4, help="of each kind")
    parser.add_argument("--images", type=int, default=Recipe.images)
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="of training alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    space = tiny_space(options.space)
    table = compute_table(load_device("cpu"), space)
    recipe = Recipe(images=options.images, epochs=options.epochs)
    budget_ms = common_budget_ms(space, table)
    networks = networks_by_kind(space, table, budget_ms, options.networks)
    archs = [arch for own in networks.values() for arch in own]
    kinds = [name for name, own in networks.items() for _ in own]
    trained, scored = Cache(options.out / "trainings.jsonl"), Cache(options.out / "kind_supernets.jsonl")
    found = []
    for spec in options.data:
        data = load_images(spec, recipe.images)
        alone = [train_alone(space, arch, data, recipe, DRAW, trained)["accuracy"] for arch in archs]
        rows = {
            arm: [
                score(space, table, budget_ms, data, arm, seed, archs, options.seconds, scored)
                for seed in options.seeds
            ]
            for arm in options.arms
        }
        found.append({"data": data.name, "kinds": kinds, "alone": alone, "arms": rows})
    facts = {
        "cpu": host.cpu_name(),
        "space": space.name,
        "budget_ms": budget_ms,
        "recipe": asdict(recipe),
        "seconds": options.seconds,
    }
    write_json(options.out / f"kind_ranks_{space.name}.json", {**facts, "data": found})
    text = describe(facts, found)
    print(text)
    if options.write:
        write_section(RESULTS, f"kind_ranks {space.name}", text)


def common_budget_ms(space: SearchSpace, table: LatencyTable) -> float:
    """Return a budget that networks of every kind can use, in ms."""
    kinds = kinds_of(space)
    slowest = [
        table.fixed_ms + sum(map(max, take(table.ms, places_of(kinds, [name])))) for name in names_of(kinds)
    ]
    return min(middle_ms(table), 0.9 * min(slowest))


def networks_by_kind(
    space: SearchSpace, table: LatencyTable, budget_ms: float, count: int
) -> dict[str, list[Arch]]:
    """Draw `count` different networks of each kind of block alone, within the latencies that are compared."""
    kinds, found = kinds_of(space), {}
    for name in names_of(kinds):
        allowed = places_of(kinds, [name])
        weights = tuple(
            tuple(float(j in places) for j in range(len(row)))
            for row, places in zip(table.ms, allowed, strict=True)
        )
        rng = np.random.default_rng(DRAW)
        drawn: dict[str, Arch] = {}
        for indices in sample_near(table, FASTEST * budget_ms, budget_ms, 20 * count, rng, weights=weights):
            arch = arch_from_indices(space, indices)
            drawn.setdefault(str(blocks_of(space, arch)), arch)
        assert len(drawn) >= count, f"{len(drawn)} networks of {name}, wanted {count}"
        found[name] = list(drawn.values())[:count]
    return found


def score(
    space: SearchSpace,
    table: LatencyTable,
    budget_ms: float,
    data: ImageData,
    arm: str,
    seed: int,
    networks: Sequence[Arch],
    seconds: float,
    cache: Cache,
) -> dict[str, Any]:
    """Train a supernet within the budget for `seconds`, and return the accuracies of networks with it."""
    parts = {
        "space": space.digest,
        "data": data.digest,
        "images": len(data.train),
        "arm": ARMS[arm],
        "seed": seed,
        "seconds": seconds,
        "budget_ms": budget_ms,
        "networks": cache_key({"blocks": [blocks_of(space, arch) for arch in networks]}),
    }
    known: dict[str, Any] | None = cache.get(parts)
    if known is not None:
        return known
    limits = (latency_limit(table, budget_ms),)
    config = base_config("shared", seed).override(ARMS[arm])
    epochs = max(1, round(seconds / epoch_seconds(space, limits, data, config)))
    searcher = Searcher(space, limits, data, config.override({"warmup_epochs": epochs}))
    start = time.process_time()
    while searcher.is_warming_up:
        searcher.step()
    spent = time.process_time() - start
    evaluator = evaluator_of(searcher.state)
    accuracies = [evaluator.classify(arch, data.heldout).score.accuracy for arch in networks]
    print(
        f"{data.name}, {arm}, seed {seed}: {epochs} epochs in {spent:.0f} s, "
        f"{percent(statistics.fmean(accuracies))}",
        flush=True,
    )
    return cache.put(parts, {"epochs": epochs, "trained_s": spent, "accuracies": accuracies})


def pair_tau(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str], *, same: bool
) -> float | None:
    """Return Kendall's tau-b over the pairs of one group, or of different groups; None without such pairs.

    Over all pairs it is scipy's `kendalltau`.
    """
    pairs = [(i, j) for i, j in combinations(range(len(groups)), 2) if (groups[i] == groups[j]) == same]
    signs = [np.sign([values[i] - values[j] for i, j in pairs]) for values in (first, second)]
    decided = [float(np.abs(each).sum()) for each in signs]
    if not all(decided):
        return None
    return float((signs[0] * signs[1]).sum()) / (decided[0] * decided[1]) ** 0.5


def kind_bias(supernet: Sequence[float], alone: Sequence[float], kinds: Sequence[str]) -> float | None:
    """Return the deviation over kinds of the mean difference of both accuracies; None for a single kind."""
    names = list(dict.fromkeys(kinds))
    means = [
        statistics.fmean(a - b for a, b, kind in zip(supernet, alone, kinds, strict=True) if kind == name)
        for name in names
    ]
    return statistics.stdev(means) if len(means) > 1 else None


def describe(facts: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of RESULTS.md."""
    parts = [
        f"## Ranks within and between kinds, {facts['space']}\n\n"
        f"{describe_recipe(Recipe(**facts['recipe']))} Supernets: {facts['seconds']:.0f} s of one thread "
        f"each; budget {facts['budget_ms']:.2f} ms."
    ]
    for data in found:
        alone, kinds = data["alone"], data["kinds"]
        line = f"{data['data']}: {len(alone)} networks, trained alone to {percent(min(alone))} to "
        line += f"{percent(max(alone))}"
        names = list(dict.fromkeys(kinds))
        if len(names) > 1:
            own = {name: [a for a, k in zip(alone, kinds, strict=True) if k == name] for name in names}
            means = [f"{name} {percent(statistics.fmean(values))}" for name, values in own.items()]
            line += f"; means {', '.join(means)}"
        rows = [describe_arm(arm, runs, alone, kinds) for arm, runs in data["arms"].items()]
        header = ["weight steps", "seeds", "epochs", "accuracy", "all", "in a kind", "between kinds", "bias"]
        parts.append(f"{line}.\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts)


def describe_arm(
    arm: str, runs: Sequence[Mapping[str, Any]], alone: Sequence[float], kinds: Sequence[str]
) -> list[str]:
    """Return the row of a way of taking weight steps."""

    def mean(values: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
        known = [scale * value for value in values if value is not None]
        if not known:
            return ""
        middle, sd = mean_and_sd(known)
        return f"{middle:.{digits}f}" + ("" if len(known) == 1 else f" ± {sd:.{digits}f}")

    seen = [run["accuracies"] for run in runs]
    return [
        arm,
        str(len(runs)),
        mean([run["epochs"] for run in runs], 0),
        mean([statistics.fmean(own) for own in seen], 1, 100) + "%",
        mean([float(kendalltau(own, alone).statistic) for own in seen], 2),
        mean([pair_tau(own, alone, kinds, same=True) for own in seen], 2),
        mean([pair_tau(own, alone, kinds, same=False) for own in seen], 2),
        mean([kind_bias(own, alone, kinds) for own in seen], 1, 100),
    ]


if __name__ == "__main__":
    main()
