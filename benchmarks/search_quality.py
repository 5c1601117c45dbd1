"""The quality of a search: its networks compared with others of the same latency.

    python benchmarks/search_quality.py --data fashion-mnist:DIR --data cifar10:DIR [--write]

For each data set and seed, quadranet-tiny is searched with each weight sharing mode, for the same time and
within the same budget on cpu: a fifth of the way from the fastest to the slowest network. The derived
networks are trained alone from scratch with one recipe, and so are

- 10 random networks that take at least 97% of the budget;
- the choice by MACs: the same effects, solved under the largest limit on MACs whose solution is within
  the budget;
- the network with the most MACs within the budget, which needs no search;
- the network that a search of proxyless-tiny (inverted residuals with the same layout) derives within
  the same budget after as many epochs (the comparison of QuadraNet's Table III).

From each search, two networks are trained: the network of least loss by the measured effects of its
candidates, and the network selected among the best of these on held-out images with the supernet's weights,
screened and re-ranked (`re-ranked`), which is the result of qnas search. With shared weights, the most
accurate of the ranked networks is trained as well, whatever its size. The supernets also score the random
networks. Existing results are reused, so a stopped run continues, and --write writes the results so far to
RESULTS.md. Two data sets and three seeds take four hours on one thread; --parts, --arms and --seeds select
parts of it. --share sets another budget, which gets its own section in RESULTS.md.

All networks are trained with one seed, and so with the same order of images, shifts and flips. Effects of
these that are common to all networks do not enter a gain. The seeds in the results are those of the searches.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from experiments import (
    ARMS,
    OUT,
    RESULTS,
    RIVALS,
    SEARCH_SEEDS,
    Cache,
    Recipe,
    base_config,
    describe_recipe,
    epoch_seconds,
    known_training,
    load_images,
    markdown_table,
    mean_and_sd,
    percent,
    plan_epochs,
    rivals,
    tiny_space,
    train_alone,
    write_section,
)
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, rankdata

from qnas.common import host
from qnas.common.files import write_json
from qnas.data.image_data import ImageData
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import LatencyTable
from qnas.nn import blocks
from qnas.search.config import SearchConfig
from qnas.search.evaluator import evaluator_of
from qnas.search.searcher import Searcher
from qnas.search.selection import STANDARD_ERRORS, ranking_document, select
from qnas.solver.limits import Limits, latency_limit
from qnas.solver.solve import CandidateIndices, largest, macs_guided, solve, solve_best
from qnas.spaces.arch import Arch, arch_from_indices, make_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import set_up_process

# Image size of the latencies. At 32 px, all blocks of such a narrow network cost about the same, and networks
# of one latency hardly differ. At 96 px, a 7x7 kernel costs twice as much as a 3x3 kernel, and the first
# stage up to four times as much as the last, as in the shipped spaces at 224 px.
DEPLOYED_PX = 96
# Share of the way from the fastest to the slowest network. At half of it, there was nothing to find: five
# blocks of any kind reached the same accuracy, since larger networks gain nothing on 20,000 images. With
# three or four blocks, each block matters.
BUDGET_SHARE = 0.2
PARTS = ("random", "searches", "noise", "baselines")
WARM_UP_SHARE = 0.4  # share of a search's epochs
SEARCH_ARMS = ("shared", "shared-by-probabilities", "independent", "nested")
# Long enough for networks of one latency to differ by more than two trainings of one network, which the 900
# steps of rank_correlation.py are not.
RECIPE = Recipe(images=20_000, epochs=9, learning_rate=2e-3)
TRAINING_SEED = 0
# Number of random networks that are also trained with other seeds, to measure the noise.
REPEATED = 4
OTHER_SEEDS = (1, 2)
TRAINED_SEEDS = (TRAINING_SEED, *OTHER_SEEDS)
BASELINE_ARM = "shared"  # for proxyless-tiny, with as many epochs as for quadranet-tiny


@dataclass(frozen=True)
class Setting:
    """A space with its latencies and limits."""

    space: SearchSpace
    table: LatencyTable
    limits: Limits


@dataclass(frozen=True)
class Contender:
    """A network to train alone, and its origin."""

    part: str
    arm: str | None  # of the search of quadranet-tiny, if it is from one
    kind: str
    setting: Setting
    arch: Arch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="fashion-mnist:DIR or cifar10:DIR")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEARCH_SEEDS))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--arms", nargs="+", default=list(SEARCH_ARMS), choices=ARMS)
    parser.add_argument("--seconds", type=float, default=200.0, help="of a search")
    parser.add_argument(
        "--share", type=float, default=BUDGET_SHARE, help="the budget, of the way from fastest to slowest"
    )
    parser.add_argument("--images", type=int, default=RECIPE.images)
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="of training alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    set_up_process(threads=1)
    recipe = replace(RECIPE, images=options.images, epochs=options.epochs)
    quadra = tiny_setting("quadranet-tiny", share=options.share)
    proxyless = tiny_setting("proxyless-tiny", quadra.limits[0].budget)
    trained, searched = Cache(options.out / "trainings.jsonl"), Cache(options.out / "searches.jsonl")
    data = [load_images(spec, recipe.images) for spec in options.data]
    for part in options.parts:
        if part == "noise":
            for arch, seed, images in product(random_networks(quadra)[:REPEATED], OTHER_SEEDS, data):
                train_alone(quadra.space, arch, images, recipe, seed, trained)
            continue
        for seed, images in product(options.seeds if part != "random" else [0], data):
            if part == "searches":
                for arm in options.arms:
                    search(quadra, images, arm, seed, options.seconds, searched)
            if part == "baselines":
                search(quadra, images, BASELINE_ARM, seed, options.seconds, searched)
                like = known_search(quadra, images, BASELINE_ARM, seed, options.seconds, searched)
                assert like is not None
                search(proxyless, images, BASELINE_ARM, seed, options.seconds, searched, like["epochs"])
            for each in contenders(quadra, proxyless, images, seed, options.seconds, searched):
                if each.part == part and each.arm in (None, *options.arms):
                    train_alone(each.setting.space, each.arch, images, recipe, TRAINING_SEED, trained)
    found = [
        summarise(quadra, proxyless, images, recipe, options.seconds, searched, trained) for images in data
    ]
    facts = {
        "cpu": host.cpu_name(),
        "recipe": asdict(recipe),
        "seconds": options.seconds,
        "share": options.share,
        "budget_ms": quadra.limits[0].budget,
    }
    section = "search_quality" if options.share == BUDGET_SHARE else f"search_quality_{options.share:g}"
    write_json(options.out / f"{section}.json", {**facts, "data": found})
    text = describe(facts, found)
    print(text)
    if options.write:
        write_section(RESULTS, section, text)


def tiny_setting(name: str, budget_ms: float | None = None, share: float = BUDGET_SHARE) -> Setting:
    """Return one of the experiments' spaces on cpu with a budget, by default a share of its range."""
    space = tiny_space(name, DEPLOYED_PX)
    table = compute_table(load_device("cpu"), space)
    own_ms = table.fastest_ms + share * (table.slowest_ms - table.fastest_ms)
    return Setting(space, table, (latency_limit(table, budget_ms or own_ms),))


def random_networks(quadra: Setting) -> list[Arch]:
    """Return the networks of the budget's latency with which all searches are compared."""
    return rivals(quadra.space, quadra.table, quadra.limits[0].budget, seed=0)


# ---- searches


def search_parts(setting: Setting, data: ImageData, arm: str, seed: int, seconds: float) -> dict[str, Any]:
    """Return everything on which the result of a search depends."""
    return {
        "space": setting.space.digest,
        "budget_ms": setting.limits[0].budget,
        "data": data.digest,
        "images": len(data.train),
        "arm": arm,
        "config": ARMS[arm],
        "start_taps": blocks.ENVELOPE_TAPS,
        "standard_errors": STANDARD_ERRORS,
        "seconds": seconds,
        "seed": seed,
    }


def known_search(
    setting: Setting, data: ImageData, arm: str, seed: int, seconds: float, cache: Cache
) -> dict[str, Any] | None:
    """Return the result of a search, or None if it is not done yet."""
    return cache.get(search_parts(setting, data, arm, seed, seconds))


def search(
    setting: Setting,
    data: ImageData,
    arm: str,
    seed: int,
    seconds: float,
    cache: Cache,
    epochs: tuple[int, int] | None = None,
) -> None:
    """Search for `seconds`, or for `epochs` of warm-up and search, and store the result."""
    if known_search(setting, data, arm, seed, seconds, cache) is not None:
        return
    space, limits = setting.space, setting.limits
    config = base_config(arm, seed)
    if epochs is None:
        warm_up_s = epoch_seconds(space, limits, data, config)
        search_s = epoch_seconds(space, limits, data, config.override({"warmup_epochs": 0}))
        epochs = plan_epochs(warm_up_s, search_s, seconds, WARM_UP_SHARE)
    config = config.override({"warmup_epochs": epochs[0], "search_epochs": epochs[1]})
    searcher = Searcher(space, limits, data, config)
    start = time.process_time()
    while searcher.steps_done < searcher.total_steps:
        row = searcher.step()
    searched_s = time.process_time() - start
    facts = {"epochs": epochs, "searched_s": searched_s, "last_loss": row["loss"]}
    found = cache.put(search_parts(setting, data, arm, seed, seconds), facts | derive(setting, searcher))
    took = f"{epochs} epochs in {searched_s:.0f} + {found['derived_s']:.0f} s"
    print(f"{data.name} {space.name} {arm}, seed {seed}: {took}", flush=True)


def derive(setting: Setting, searcher: Searcher) -> dict[str, Any]:
    """Return the networks derived from a trained supernet, and its scores of the random networks."""
    space, heldout = setting.space, searcher.problem.data.heldout
    start = time.process_time()
    state, evaluator = searcher.state, evaluator_of(searcher.state)
    figures = state.figures()
    selection = select(state)
    effects, ranked = selection.effects, selection.ranking
    derived_s = time.process_time() - start
    scores = selection.scores
    by_macs = macs_guided(space, scores, setting.limits)
    return {
        "derived_s": derived_s,
        "expected_ms": float(state.expected[0]),
        "entropy": figures["entropy"],
        "identity_share": figures["identity_share"],
        "ranked": ranking_document(ranked),
        "random_heldout": [
            evaluator.classify(arch, heldout).score.accuracy for arch in random_networks(setting)
        ],
        "by_macs": by_macs and arch_from_indices(space, by_macs.indices).choices,
        "most_probable": arch_from_indices(
            space, solve(state.log_probabilities, searcher.problem.limits).indices
        ).choices,
        "log_probabilities": state.log_probabilities,
        "effects": effects and asdict(effects),
    }


def contenders(
    quadra: Setting, proxyless: Setting, data: ImageData, seed: int, seconds: float, searched: Cache
) -> Iterator[Contender]:
    """Yield the networks of a seed from the searches that are done.

    Networks that need no search belong to seed 0.
    """
    space = quadra.space
    if seed == 0:
        for arch in random_networks(quadra):
            yield Contender("random", None, "random", quadra, arch)
        most = largest(space, quadra.limits)
        yield Contender("baselines", None, "most MACs", quadra, arch_from_indices(space, most.indices))
    for part, setting, arms in (("searches", quadra, list(ARMS)), ("baselines", proxyless, [BASELINE_ARM])):
        for arm in arms:
            row = known_search(setting, data, arm, seed, seconds, searched)
            if row is None:
                continue
            ranked = row["ranked"]
            chosen = {
                "by effects": arch_from_indices(setting.space, first_by_effects(setting, row)).choices,
                "re-ranked": ranked[0]["choices"],
            }
            if setting is quadra and arm == SearchConfig.model_fields["weights"].default:
                best = max(ranked, key=lambda entry: entry["heldout_accuracy"])
                chosen["by accuracy"] = best["choices"]
            if setting is quadra and row["by_macs"]:
                chosen["by MACs"] = row["by_macs"]
            name = arm if setting is quadra else setting.space.name
            of_arm = arm if setting is quadra else None
            for how, choices in chosen.items():
                arch = make_arch(setting.space, tuple(choices))
                yield Contender(part, of_arm, f"{name}, {how}", setting, arch)


def first_by_effects(setting: Setting, row: Mapping[str, Any]) -> CandidateIndices:
    """Return the network of least loss by a search's effects, or by its probabilities if there are none."""
    scores = row["log_probabilities"]
    if row["effects"]:
        scores = [[-nats for nats in candidates] for candidates in row["effects"]["nats"]]
    return solve_best(setting.space, tuple(map(tuple, scores)), setting.limits, 1)[0].indices


# ---- figures


def summarise(
    quadra: Setting,
    proxyless: Setting,
    data: ImageData,
    recipe: Recipe,
    seconds: float,
    searched: Cache,
    trained: Cache,
) -> dict[str, Any]:
    """Return the results so far of one data set, by kind and seed."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for seed in SEARCH_SEEDS:
        for each in contenders(quadra, proxyless, data, seed, seconds, searched):
            space = each.setting.space
            row = known_training(space, each.arch, data, recipe, TRAINING_SEED, trained)
            if row is None:
                continue
            lowered = lower(space, each.arch)
            figures = {
                "accuracy": row["accuracy"],
                "latency_ms": each.setting.table.latency_ms(each.arch.indices(space)),
                "macs": count_macs(lowered),
                "params": count_params(lowered),
            }
            kinds.setdefault(each.kind, []).append(figures)
    known: dict[str, list[dict[str, Any]]] = {}  # by arm, for each seed
    alone = [row["accuracy"] for row in kinds.get("random", [])]
    for arm, seed in product(ARMS, SEARCH_SEEDS):
        row = known_search(quadra, data, arm, seed, seconds, searched)
        if row is not None and len(alone) == RIVALS:
            explained = row["effects"]["explained"] if row["effects"] else 0.0
            facts = {"seen": row["random_heldout"], "explained": explained}
            known.setdefault(arm, []).append(facts)
    sizes = [row["params"] for row in kinds.get("random", [])]
    again = [
        [known_training(quadra.space, arch, data, recipe, seed, trained) for seed in TRAINED_SEEDS]
        for arch in random_networks(quadra)[:REPEATED]
    ]
    rows = [[row["accuracy"] for row in rows if row] for rows in again if None not in rows]
    return {
        "data": data.name,
        "kinds": kinds,
        "repeated": rows,
        "in_supernet": known,
        "alone": alone,
        "params": sizes,
    }


def describe(facts: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of RESULTS.md."""
    parts = [
        f"## Search quality at {facts['share']:g} of the range of latencies",
        f"{describe_recipe(Recipe(**facts['recipe']))} Searches take {facts['seconds']:.0f} s; the budget is "
        f"{facts['budget_ms']:.2f} ms, {facts['share']:g} of the way from the fastest network to the "
        "slowest. The figures are means and standard deviations over seeds of the search, or over the random "
        "networks. `gain` is the difference to the mean of the random networks; `beaten` is how many of them "
        "are less accurate. `qnas search` returns `shared, re-ranked`. `spread` is the standard deviation of "
        "the random networks' held-out accuracies with the supernet's weights. `tau` is Kendall's tau of "
        "these and the accuracies of the same networks trained alone; `tau with size` uses the sum of two "
        "ranks instead, by the supernet and by parameters. `explained` is the share of the variance between "
        "networks' losses that the sum of measured effects predicts for networks that it was not fitted to.",
    ]
    for data in found:
        rows = [describe_kind(kind, data) for kind in data["kinds"] if kind != "random"]
        header = ["network", "seeds", "accuracy", "gain, points", "beaten", "ms", "M MACs", "k parameters"]
        parts.append(f"### {data['data']}")
        parts.append(describe_noise(data))
        parts.append(markdown_table(header, [*describe_random(data), *(row for row in rows if row)]))
        if data["in_supernet"]:
            header = ["in the supernets", "seeds", "spread, points", "tau", "tau with size", "explained"]
            known = [describe_known(*each, data) for each in data["in_supernet"].items()]
            tau = f"{kendalltau(data['params'], data['alone']).statistic:.2f}"
            parts.append(markdown_table(header, [*known, ["parameters alone", "", "", tau, "", ""]]))
    return "\n\n".join(parts)


def describe_noise(data: Mapping[str, Any]) -> str:
    """Describe how much of the differences between networks of one latency is not noise."""
    random = data["kinds"].get("random", [])
    if len(data["repeated"]) < 2 or len(random) < RIVALS:
        return "How much two trainings of one network differ is not known yet."
    noise = 100 * interaction_sd(np.array(data["repeated"]))
    accuracies = sorted(row["accuracy"] for row in random)
    spread = 100 * statistics.stdev(accuracies)
    return (
        f"Two trainings of one network with different seeds differ by {noise:.1f} points, once the effect "
        f"that a seed has on every network is removed (standard deviation; {len(data['repeated'])} networks, "
        f"{len(TRAINED_SEEDS)} seeds). Random networks of the budget's latency, each trained once with the "
        f"same seed, differ by {spread:.1f} points, of which about "
        f"{math.sqrt(max(spread**2 - noise**2, 0)):.1f} come from the networks themselves. Without the "
        f"least accurate network they differ by {100 * statistics.stdev(accuracies[1:]):.1f} points."
    )


def interaction_sd(table: NDArray[np.float64]) -> float:
    """Return the standard deviation of a (networks, seeds) table without the effects of both."""
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return float(np.sqrt((rest**2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1))))


def describe_random(data: Mapping[str, Any]) -> list[list[str]]:
    """Return rows with the random networks' mean, median and best; none until all are trained."""
    rows = data["kinds"].get("random", [])
    if len(rows) < RIVALS:
        return []
    accuracies = [row["accuracy"] for row in rows]
    mean, sd = mean_and_sd(accuracies)
    median = statistics.median(accuracies)  # robust to a single outlier
    best = max(rows, key=lambda row: row["accuracy"])
    return [
        [f"{RIVALS} random, mean", "", percent(mean, sd), "", "", *sizes(rows)],
        [f"{RIVALS} random, median", "", percent(median), points([median - mean]), "", "", "", ""],
        [
            f"{RIVALS} random, best",
            "",
            percent(best["accuracy"]),
            points([best["accuracy"] - mean]),
            "",
            *sizes([best]),
        ],
    ]


def describe_kind(kind: str, data: Mapping[str, Any]) -> list[str]:
    """Return the row of a kind of network; empty until the random networks are trained."""
    rows, others = data["kinds"][kind], [row["accuracy"] for row in data["kinds"].get("random", [])]
    if len(others) < RIVALS:
        return []
    own = [row["accuracy"] for row in rows]
    gains = [accuracy - statistics.fmean(others) for accuracy in own]
    beaten = statistics.fmean(sum(accuracy > other for other in others) for accuracy in own)
    accuracy = percent(*mean_and_sd(own))
    return [kind, str(len(rows)), accuracy, points(gains), f"{beaten:.1f} of {RIVALS}", *sizes(rows)]


def describe_known(arm: str, by_seed: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[str]:
    """Return the row of an arm: the spread and the order of networks of one latency in its supernet."""
    spread = statistics.fmean(statistics.stdev(row["seen"]) for row in by_seed)
    sizes = rankdata(data["params"])
    seen = [row["seen"] for row in by_seed]
    with_size = [rankdata(accuracies) + sizes for accuracies in seen]
    orders = [taus(found, data["alone"]) for found in (seen, with_size)]
    explained = statistics.fmean(row["explained"] for row in by_seed)
    return [arm, str(len(by_seed)), f"{100 * spread:.1f}", *orders, f"{explained:.2f}"]


def taus(orders: Sequence[ArrayLike], alone: Sequence[float]) -> str:
    """Format Kendall's tau of several orders of networks with the accuracies of training alone."""
    mean, sd = mean_and_sd([kendalltau(order, alone).statistic for order in orders])
    return f"{mean:.2f}" + ("" if math.isnan(sd) else f" ± {sd:.2f}")


def points(gains: Sequence[float]) -> str:
    """Format differences of accuracies in percentage points: `+0.8 ± 0.3`."""
    mean, sd = mean_and_sd(gains)
    return f"{100 * mean:+.1f}" + ("" if math.isnan(sd) else f" ± {100 * sd:.1f}")


def sizes(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return mean latency, MACs and parameters."""
    ms, macs, params = (
        statistics.fmean(row[key] for row in rows) for key in ("latency_ms", "macs", "params")
    )
    return [f"{ms:.2f}", f"{macs / 1e6:.2f}", f"{params / 1e3:.0f}"]


if __name__ == "__main__":
    main()
