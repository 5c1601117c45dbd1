"""The rank correlation of supernet accuracy and accuracy after training alone, by weight sharing mode.

    python benchmarks/rank_correlation.py --data fashion-mnist:DIR --data cifar10:DIR [--write]

Networks of quadranet-tiny, spread over its latencies on cpu, are trained alone with one recipe. For each
weight sharing mode, a supernet is trained with uniform probabilities (a search that stays in its warm-up) for
the same time, and the same networks are scored on held-out images with its weights. The table has Kendall's
tau between these scores and the test accuracies of the networks trained alone.

Size alone ranks networks of different sizes at no cost. The table therefore also has the taus of latency and
MACs, and the tau within the better half of the networks. `one latency` are ten other networks from the middle
of the range; a search must be able to tell these apart. The row `another seed` is the
agreement of two seeds of training alone, an upper bound for what other rows can be expected to reach.

Existing results are reused, so a stopped run continues. --write writes the table to RESULTS.md. Two data sets
take two hours on one thread; --parts selects parts of it.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from experiments import (
    OUT,
    RESULTS,
    RIVALS,
    SEARCH_SEEDS,
    Cache,
    Interval,
    Recipe,
    base_config,
    blocks_of,
    cache_key,
    describe_recipe,
    epoch_seconds,
    known_training,
    load_images,
    markdown_table,
    middle_ms,
    percent,
    rank_interval,
    rivals,
    spread_networks,
    tiny_space,
    train_alone,
    upper_half,
    write_section,
)

from qnas.common import host
from qnas.common.files import write_json
from qnas.data.image_data import ImageData
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import LatencyTable
from qnas.nn import blocks
from qnas.search.evaluator import evaluator_of
from qnas.search.searcher import Searcher
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import Arch
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import set_up_process

RANKED_ARMS = ("independent", "shared", "nested", "nested-mixture")
PARTS = ("alone", "equal", "supernets", "ceiling")
SEEDS = {"alone": 0, "ceiling": 1}  # seeds of training alone
DRAW = 0  # seed of the networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--arms", nargs="+", default=list(RANKED_ARMS), choices=RANKED_ARMS)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training a supernet")
    parser.add_argument("--networks", type=int, default=24)
    parser.add_argument("--images", type=int, default=Recipe.images)
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="of training alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    space = tiny_space("quadranet-tiny")
    table = compute_table(load_device("cpu"), space)
    recipe = Recipe(images=options.images, epochs=options.epochs)
    spread = spread_networks(space, table, options.networks, DRAW)
    equal = [arch for seed in SEARCH_SEEDS for arch in rivals(space, table, middle_ms(table), seed)]
    trained, scored = Cache(options.out / "trainings.jsonl"), Cache(options.out / "supernets.jsonl")
    data = [load_images(spec, recipe.images) for spec in options.data]
    for part in options.parts:
        for images in data:
            if part == "supernets":
                for arm in options.arms:
                    score_networks(space, table, images, arm, [*spread, *equal], options.seconds, scored)
            elif part == "equal":
                for arch in equal[:RIVALS]:
                    train_alone(space, arch, images, recipe, SEARCH_SEEDS[0], trained)
            else:
                for arch in spread:
                    train_alone(space, arch, images, recipe, SEEDS[part], trained)

    found = []
    for images in data:
        rows = {
            arm: scored.get(supernet_parts(space, images, arm, [*spread, *equal], options.seconds))
            for arm in RANKED_ARMS
        }
        found.append(summarise(space, table, images, recipe, spread, equal, trained, rows))
    facts = {"cpu": host.cpu_name(), "recipe": asdict(recipe), "seconds": options.seconds}
    write_json(options.out / "rank_correlation.json", {**facts, "data": found})
    text = describe(facts, found)
    print(text)
    if options.write:
        write_section(RESULTS, "rank_correlation", text)


def supernet_parts(
    space: SearchSpace, data: ImageData, arm: str, networks: Sequence[Arch], seconds: float
) -> dict[str, Any]:
    """Return everything on which the scores of networks with a supernet's weights depend."""
    return {
        "space": space.digest,
        "data": data.digest,
        "images": len(data.train),
        "arm": arm,
        "start_taps": blocks.ENVELOPE_TAPS,
        "seconds": seconds,
        "networks": cache_key({"blocks": [blocks_of(space, arch) for arch in networks]}),
    }


def score_networks(
    space: SearchSpace,
    table: LatencyTable,
    data: ImageData,
    arm: str,
    networks: Sequence[Arch],
    seconds: float,
    cache: Cache,
) -> None:
    """Train a supernet with uniform probabilities for `seconds`, and score networks with its weights."""
    parts = supernet_parts(space, data, arm, networks, seconds)
    if cache.get(parts) is not None:
        return
    # the budget has no effect: paths are drawn by probabilities, which stay about uniform
    limits = (latency_limit(table, middle_ms(table)),)
    config = base_config(arm, seed=0)
    epochs = max(1, round(seconds / epoch_seconds(space, limits, data, config)))
    searcher = Searcher(
        space, limits, data, config.override({"warmup_epochs": epochs, "paths": "probabilities"})
    )
    start = time.process_time()
    while searcher.is_warming_up:
        searcher.step()
    spent = time.process_time() - start
    evaluator = evaluator_of(searcher.state)
    scores = [asdict(evaluator.classify(arch, data.heldout).score) for arch in networks]
    cache.put(parts, {"epochs": epochs, "trained_s": spent, "scores": scores})
    print(f"{data.name} {arm}: {epochs} epochs in {spent:.0f} s", flush=True)


def summarise(
    space: SearchSpace,
    table: LatencyTable,
    data: ImageData,
    recipe: Recipe,
    spread: Sequence[Arch],
    equal: Sequence[Arch],
    trained: Cache,
    supernets: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, Any]:
    """Return the taus and the accuracies of one data set."""

    def alone(networks: Sequence[Arch], seed: int) -> list[float] | None:
        """Return the accuracies of networks trained alone, or None if one is missing."""
        rows = [known_training(space, arch, data, recipe, seed, trained) for arch in networks]
        known = [float(row["accuracy"]) for row in rows if row is not None]
        return known if len(known) == len(networks) else None

    first, second = (alone(spread, seed) for seed in SEEDS.values())
    assert first is not None, "the networks are not trained yet: --parts alone"
    # a second seed halves the variance of the accuracies to compare with
    truth = first if second is None else [float(v) for v in np.mean([first, second], axis=0)]
    places: list[int] = []
    equal_truth: list[float] = []
    for i, seed in enumerate(SEARCH_SEEDS):
        known = alone(equal[i * RIVALS : (i + 1) * RIVALS], seed)
        if known is not None:
            places += range(len(spread) + i * RIVALS, len(spread) + (i + 1) * RIVALS)
            equal_truth += known
    better = upper_half(truth)

    def taus(values: Sequence[float]) -> dict[str, Any]:
        """Return the taus for figures of the spread networks, followed by those of one latency."""
        of_spread = values[: len(spread)]
        upper = rank_interval([of_spread[i] for i in better], [truth[i] for i in better])
        found = {"spread": asdict(rank_interval(of_spread, truth)), "upper": asdict(upper)}
        if places and len(values) > len(spread):
            found["equal"] = asdict(rank_interval([values[i] for i in places], equal_truth))
        return found

    rows = []
    for arm, row in supernets.items():
        if row is None:
            continue
        facts = {"epochs": row["epochs"], "trained_s": row["trained_s"]}
        for figure, sign in (("accuracy", 1), ("loss", -1)):
            name = f"supernet, {arm}, by {figure}"
            rows.append({"name": name, **facts, **taus([sign * s[figure] for s in row["scores"]])})
    latency = [table.latency_ms(arch.indices(space)) for arch in spread]
    macs = [float(count_macs(lower(space, arch))) for arch in [*spread, *equal]]
    rows += [{"name": "latency", **taus(latency)}, {"name": "MACs", **taus(macs)}]
    if second is not None:
        upper = rank_interval([second[i] for i in better], [first[i] for i in better])
        found = {"spread": asdict(rank_interval(second, first)), "upper": asdict(upper)}
        rows.append({"name": "another seed", **found})
    return {"data": data.name, "truth": truth, "equal_truth": equal_truth, "rows": rows}


def describe(facts: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of RESULTS.md."""
    parts = [f"## Rank correlation\n\n{describe_recipe(Recipe(**facts['recipe']))}"]
    for data in found:
        truth, equal = data["truth"], data["equal_truth"]
        line = f"{data['data']}: {len(truth)} networks spread over latencies, trained alone to "
        line += f"{percent(min(truth))} to {percent(max(truth))}"
        if equal:
            line += f"; {len(equal)} of one latency, to {percent(min(equal))} to {percent(max(equal))}"
        rows = []
        for row in data["rows"]:
            trained = f"{row['epochs']} in {row['trained_s']:.0f} s" if "epochs" in row else ""
            taus = (Interval(**row[g]) if g in row else None for g in ("spread", "upper", "equal"))
            rows.append([row["name"], trained, *("" if tau is None else str(tau) for tau in taus)])
        header = ["ranked by", "epochs", "all", "better half", "one latency"]
        parts.append(f"{line}.\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
