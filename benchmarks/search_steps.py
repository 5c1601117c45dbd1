"""The cost of a search step, as a ratio to a training step of one network of the space.

    python benchmarks/search_steps.py [--threads 1] [--rounds 12] [--spaces NAME ...] [--json FILE]

Steps run at 32 px with batch size 64 on the CPU. Each round draws a path with equal probabilities, and all
forms take turns on it. A ratio is the median over rounds of a form's time divided by that of the network with
the same choices in the same round (the largest network for nested weights). Gated steps draw their own pairs;
their ratio is that of the sums over all rounds. With one thread, times are processor times, which other
programs disturb less. Each form runs once on a path before it is timed, so that no time includes making an
optimiser's state.

    sampled     weight step of a path, independent weights
    shared      the same with shared weights: the default
    nested      weight step of the whole mixture with nested weights
    all paths   weight step of the mixture of all candidates with independent weights (DARTS)
    two-path    architecture step of pairs of candidates, with independent and with shared weights
    all-paths   architecture step with gates of all candidates
    exact       architecture step with nested weights
    sandwich    weight step of a sandwich, shared weights: the largest network, two drawn paths, the smallest
    n           weight step of a path with n candidates at each position; the three spaces share the path

At the end, a weight step in union-mobile, whose positions have 31 candidates of five kinds, is compared with
one of the same path where there are its 7 inverted residuals alone, with independent and with shared weights.

Memory is the peak of tensors during a step, relative to its start, by torch's profiler. The pipeline's share
is the share of a step that is spent waiting for the batch. PASS and MISS say whether a bar is met; the exit
status is 1 if a bar is missed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# set before torch is imported, whose profiler would log a missing GPU as an error
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
import yaml
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qnas.common.files import write_text
from qnas.common.host import cpu_name
from qnas.common.resources import stems
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.blocks import count_parameters
from qnas.nn.mixed_block import Mixture, Route
from qnas.nn.modes import WeightsMode
from qnas.nn.subnet import build_subnet
from qnas.nn.supernet import Supernet, sample_path
from qnas.search.config import SearchConfig
from qnas.search.searcher import Searcher
from qnas.solver.limits import latency_limit
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.space import SearchSpace, load_space, parse_space
from qnas.training.loop import set_up_process, stream
from qnas.training.optimizer import PathAdamW, make_optimizer, weight_step

SPACES = ("quadranet-small", "quadranet-mobile")
UNION = "union-mobile"
RESOLUTION_PX, BATCH, CLASSES = 32, 64, 10
REPEATS = 3  # repeats of a form on a path, of which the median is used
# by number of candidates, with three kernels and identity
EXPANSIONS = {7: [2, 4], 13: [1, 2, 3, 4], 25: [1, 2, 3, 4, 5, 6, 7, 8]}

BARS = {
    "sampled / network": 1.10,
    "shared / network": 1.10,
    "two-path / network": 2.20,
    "two-path, shared / network": 2.20,
    "nested / largest network": 1.25,
    "sampled memory / (network's + parameters)": 1.10,
    "shared memory / (network's + parameters)": 1.10,
    "13 candidates / 7": 1.05,
    "25 candidates / 7": 1.05,
    "31 candidates of five kinds, independent / 7 of one": 1.05,
    "31 candidates of five kinds, shared / 7 of one": 1.05,
    "pipeline share, digits": 0.05,
    "pipeline share, 50,000 images as CIFAR-10's": 0.05,
}

Step = Callable[[], object]
Clock = Callable[[], float]


@dataclass
class Times:
    """The seconds of each form, one value per round."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def take_turns(self, steps: dict[str, Step], clock: Clock) -> None:
        """Run each step once, then time all steps in turns, and store the median of each."""
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(REPEATS):
            for name in steps if repeat % 2 else reversed(steps):
                start = clock()
                steps[name]()
                seconds[name].append(clock() - start)
        for name, found in seconds.items():
            self.rounds.setdefault(name, []).append(statistics.median(found))

    def ratio(self, form: str, other: str) -> float:
        """Return the median over rounds of the ratio of two forms' times in the same round."""
        pairs = zip(self.rounds[form], self.rounds[other], strict=True)
        return statistics.median(own / others for own, others in pairs)

    def ratio_of_sums(self, form: str, other: str) -> float:
        """Return the ratio of two forms' total times over all rounds."""
        return sum(self.rounds[form]) / sum(self.rounds[other])

    def ms(self, form: str) -> float:
        """Return the median milliseconds over rounds."""
        return 1e3 * statistics.median(self.rounds[form])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--spaces", nargs="+", default=SPACES, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    options = parser.parse_args()
    set_up_process(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(f"{cpu_name()}, threads {options.threads}, torch {torch.__version__}")
    results = []
    for name in options.spaces:
        space = load_space(name)
        found = {
            "space": name,
            **measure_steps(space, options.rounds, clock),
            **measure_candidates(space, options.rounds, clock),
            **measure_pipeline(space, clock),
        }
        print_result(found)
        results.append(found)
    results.append({"space": UNION, **measure_kinds(options.rounds, clock)})
    print_kinds(results[-1])
    if options.json is not None:
        document = {
            "schema": "qnas.benchmark.search_steps/1",
            "cpu": cpu_name(),
            "threads": options.threads,
            "torch": torch.__version__,
            "bars": BARS,
            "spaces": results,
        }
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    sys.exit(any(found["ratios"].get(bar, 0) > most for found in results for bar, most in BARS.items()))


# ---- steps


def measure_steps(space: SearchSpace, rounds: int, clock: Clock) -> dict[str, Any]:
    """Return milliseconds, ratios and memory of the steps of a search."""
    images, labels = random_batch()
    generator = torch.Generator().manual_seed(0)
    searchers = {
        "two-path": searcher_of(space, "independent", "two-path"),
        "all-paths": searcher_of(space, "independent", "all-paths"),
        "exact": searcher_of(space, "nested", "exact"),
        "two-path, shared": searcher_of(space, "shared", "two-path"),
    }
    sandwich = searcher_of(space, "shared", "two-path", weight_steps="sandwich")
    independent, nested, shared = (
        searchers[name].state for name in ("two-path", "exact", "two-path, shared")
    )
    most = max(len(position.candidates) for position in space.positions)
    equal = [Mixture(torch.full((len(p.candidates),), 1 / len(p.candidates))) for p in space.positions]
    largest = trainer_of(
        network_of(space, [largest_candidate(space, i) for i in range(len(space.positions))])
    )
    times = Times()
    memory: dict[str, list[float]] = {"sampled": [], "shared": [], "network": []}
    for _ in range(rounds):
        path = sample_path(torch.zeros(len(space.positions), most), independent.supernet.mask, generator)
        network = trainer_of(network_of(space, path))
        steps: dict[str, Step] = {
            "network": lambda network=network: network(images, labels),
            "largest network": lambda: largest(images, labels),
            "sampled": step_of(independent.supernet, path, independent.weight_optimizer, images, labels),
            "shared": step_of(shared.supernet, path, shared.weight_optimizer, images, labels),
            "nested": step_of(
                nested.supernet, mixture_of(nested.supernet), nested.weight_optimizer, images, labels
            ),
            "all paths": step_of(independent.supernet, equal, independent.weight_optimizer, images, labels),
            "sandwich": lambda: sandwich._weight_step(images, labels),
            **{form: lambda form=form: searchers[form]._arch_step(images, labels) for form in searchers},
        }
        times.take_turns(steps, clock)
        for form, peaks in memory.items():
            peaks.append(peak_bytes(steps[form]))
    parameters = {
        form: 4 * sum(weight.numel() for weight in state.supernet.weights)
        for form, state in (("sampled", independent), ("shared", shared))
    }
    ratios = {
        f"{form} / network": times.ratio(form, "network") for form in ("sampled", "shared", "all paths")
    }
    ratios |= {
        f"{form} / network": times.ratio_of_sums(form, "network")
        for form in ("two-path", "two-path, shared", "all-paths", "sandwich")
    }
    ratios |= {
        f"{form} / largest network": times.ratio(form, "largest network") for form in ("nested", "exact")
    }
    ratios |= {
        f"{form} memory / (network's + parameters)": statistics.median(
            (own + held) / (network + held)
            for own, network in zip(memory[form], memory["network"], strict=True)
        )
        for form, held in parameters.items()
    }
    return {
        "rounds": rounds,
        "parameters": parameters["sampled"] // 4,
        "ms": {form: times.ms(form) for form in times.rounds},
        "peak_mb": {form: statistics.median(peaks) / 1e6 for form, peaks in memory.items()},
        "ratios": ratios,
    }


def random_batch() -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, RESOLUTION_PX, RESOLUTION_PX).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (BATCH,))


def searcher_of(space: SearchSpace, weights: Any, gradient: Any, **changes: Any) -> Searcher:
    """Return a search after its warm-up."""
    config = SearchConfig(
        preset="benchmark",
        resolution_px=RESOLUTION_PX,
        warmup_epochs=0,
        search_epochs=1000,  # keeps the temperature at its start
        batch_size=BATCH,
        learning_rate=1e-3,
        arch_learning_rate=1e-3,  # keeps the probabilities about equal
        arch_every=1,
        weights=weights,
        gradient=gradient,
        **changes,
    )
    table = compute_table(load_device("cpu"), space)
    budget = latency_limit(table, 0.5 * (table.fastest_ms + table.slowest_ms))
    return Searcher(space, (budget,), digits(), config)


def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=RESOLUTION_PX, quiet=True)


def network_of(space: SearchSpace, path: Sequence[Route]) -> nn.Module:
    indices = tuple(route for route in path if isinstance(route, int))
    return build_subnet(space, arch_from_indices(space, indices), CLASSES).train()


def largest_candidate(space: SearchSpace, position: int) -> int:
    candidates = space.positions[position].candidates
    return max(range(len(candidates)), key=lambda i: tuple(candidates[i].sizes.values()))


def trainer_of(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    optimizer = make_optimizer(network.parameters(), 1e-3, 0.01)
    return lambda images, labels: weight_step(network, optimizer, images, labels, 0.1)


def step_of(
    supernet: Supernet, routes: Sequence[Route], optimizer: PathAdamW, images: Tensor, labels: Tensor
) -> Step:
    supernet.train()
    return lambda: weight_step(lambda x: supernet(x, routes), optimizer, images, labels, 0.1)


def mixture_of(supernet: Supernet) -> list[Route]:
    with torch.no_grad():
        return supernet.mixture()


def peak_bytes(step: Step) -> int:
    """Return the peak of the bytes that tensors hold during a step, relative to its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = sorted(allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most


def allocations(events: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Yield (nanoseconds, bytes) of each allocation; bytes are negative if memory is freed."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


# ---- more candidates


def measure_candidates(space: SearchSpace, rounds: int, clock: Clock) -> dict[str, Any]:
    """Return the cost of a path if positions have 7, 13 and 25 candidates."""
    spaces = {str(count): with_expansions(space, values) for count, values in EXPANSIONS.items()}
    times, parameters = time_one_path(spaces, "independent", rounds, clock)
    fewest = str(min(EXPANSIONS))
    return {
        "candidates": {
            count: {"parameters": parameters[count], "ms": times.ms(count)} for count in times.rounds
        },
        "candidate_ratios": {
            f"{count} candidates / {fewest}": times.ratio(count, fewest)
            for count in times.rounds
            if count != fewest
        },
    }


def time_one_path(
    spaces: dict[str, SearchSpace], weights: WeightsMode, rounds: int, clock: Clock
) -> tuple[Times, dict[str, int]]:
    """Time weight steps of paths that all spaces share, drawn in the first; return the parameters as well."""
    images, labels = random_batch()
    generator = torch.Generator().manual_seed(0)
    supernets = {name: Supernet(space, CLASSES, generator, weights) for name, space in spaces.items()}
    optimizers = {name: make_optimizer(supernet.weights, 1e-3, 0.01) for name, supernet in supernets.items()}
    first = next(iter(spaces))
    times = Times()
    for _ in range(rounds):
        path = sample_path(torch.zeros(supernets[first].mask.shape), supernets[first].mask, generator)
        names = [
            position.names[route]
            for position, route in zip(spaces[first].positions, path, strict=True)
            if isinstance(route, int)
        ]
        times.take_turns(
            {
                name: step_of(
                    supernet,
                    [p.names.index(choice) for p, choice in zip(spaces[name].positions, names, strict=True)],
                    optimizers[name],
                    images,
                    labels,
                )
                for name, supernet in supernets.items()
            },
            clock,
        )
    return times, {name: count_parameters(supernet) for name, supernet in supernets.items()}


def measure_kinds(rounds: int, clock: Clock) -> dict[str, Any]:
    """Return the cost of a path of inverted residuals beside candidates of four other kinds."""
    union = load_space(UNION)
    spaces = {"7 of one": with_inverted_residuals(union), "31 candidates of five kinds": union}
    found: dict[str, Any] = {"rounds": rounds, "ms": {}, "parameters": {}, "ratios": {}}
    few, many = spaces
    modes: tuple[WeightsMode, ...] = ("independent", "shared")
    for weights in modes:
        times, parameters = time_one_path(spaces, weights, rounds, clock)
        found["ms"][weights] = {name: times.ms(name) for name in spaces}
        found["parameters"][weights] = parameters
        found["ratios"][f"{many}, {weights} / {few}"] = times.ratio(many, few)
    return found


def with_inverted_residuals(space: SearchSpace) -> SearchSpace:
    """Return the space with its ordinary inverted residuals and identities alone."""
    document = yaml.safe_load(stems("search_spaces", ".yaml")[space.name].read_text(encoding="utf-8"))
    for holder in (document, *document["stages"]):
        if "candidates" in holder:
            kept = [each for each in holder["candidates"] if each["block"] in ("mbconv", "identity")]
            holder["candidates"] = [
                {name: value for name, value in each.items() if name != "neuron"} for each in kept
            ]
    return parse_space(yaml.safe_dump(document), space.name)


def with_expansions(space: SearchSpace, expansions: list[int]) -> SearchSpace:
    """Return the space with these expansions for each quadratic candidate."""
    document = yaml.safe_load(stems("search_spaces", ".yaml")[space.name].read_text(encoding="utf-8"))
    for holder in (document, *document["stages"]):
        for candidate in holder.get("candidates", ()):
            if candidate["block"] == "quadra":
                candidate["expansion"] = expansions
    return parse_space(yaml.safe_dump(document), space.name)


# ---- the pipeline


def measure_pipeline(space: SearchSpace, clock: Clock, steps: int = 60) -> dict[str, Any]:
    """Return the share of a weight step that is spent waiting for the batch."""
    shares = {}
    for name, split in (("digits", digits().train), ("50,000 images as CIFAR-10's", like_cifar10())):
        batch_size = SearchConfig.load("digits" if name == "digits" else "small").batch_size
        supernet = Supernet(space, CLASSES, torch.Generator().manual_seed(0)).train()
        optimizer = make_optimizer(supernet.weights, 1e-3, 0.01)
        generator = torch.Generator().manual_seed(1)
        pipeline = stream(split, batch_size, 0, 0, augment=True)
        waited = trained = 0.0
        for i in range(steps):
            path = sample_path(supernet.alpha.detach(), supernet.mask, generator)
            start = clock()
            images, labels = next(pipeline)
            middle = clock()
            step_of(supernet, path, optimizer, images, labels)()
            if i >= 5:  # the first steps are warm-ups
                waited, trained = waited + middle - start, trained + clock() - middle
        shares[f"pipeline share, {name}"] = waited / (waited + trained)
    return {"pipeline": shares}


def like_cifar10() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator)
    return Split("train", images.permute(0, 3, 1, 2), labels, (0.5,) * 3, (0.25,) * 3, flip=True)


# ---- output


def print_result(found: dict[str, Any]) -> None:
    found["ratios"] |= found.pop("candidate_ratios") | found.pop("pipeline")
    ratios = found["ratios"]
    print(f"\n{found['space']}, {found['parameters'] / 1e6:.2f}M parameters")
    for form, ms in found["ms"].items():
        shown = [
            f"{value:5.2f} of {name.split(' / ')[1]}"
            for name, value in ratios.items()
            if name.split(" / ")[0] == form
        ]
        print(f"  {form:>16} {ms:8.2f} ms  {', '.join(shown)}")
    for count, row in found["candidates"].items():
        print(f"  {count:>5} candidates {row['ms']:8.2f} ms  {row['parameters'] / 1e6:.2f}M parameters")
    for form, megabytes in found["peak_mb"].items():
        print(f"  {form + ', peak':>16} {megabytes:8.2f} MB")
    print_bars(ratios)


def print_kinds(found: dict[str, Any]) -> None:
    print(f"\n{found['space']}")
    for weights, ms in found["ms"].items():
        for name, value in ms.items():
            parameters = found["parameters"][weights][name]
            print(f"  {weights:>12}, {name}: {value:.2f} ms  {parameters / 1e6:.2f}M parameters")
    print_bars(found["ratios"])


def print_bars(ratios: dict[str, float]) -> None:
    for bar, most in BARS.items():
        if bar in ratios:
            print(f"  {'PASS' if ratios[bar] <= most else 'MISS'} {bar}: {ratios[bar]:.3f}, bar {most:.2f}")


if __name__ == "__main__":
    main()
