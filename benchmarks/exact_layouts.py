"""The exact solve over resolutions and widths beside other ways to choose among layouts: gaps and seconds.

    python benchmarks/exact_layouts.py [--seeds 3] [--families 3] [--write]

A layout is an input resolution and a width for each stage (`qnas.solver.layouts`). The families are those
of shipped spaces at multiples of their widths, each stage by itself. The limit is latency on `cpu`, at a
quarter, a half and three quarters of the range of all layouts. Scores are additive: of candidates, with
falling returns in their MACs and noise; and of resolutions and widths, with falling returns and noise too.
Compared are

- exact: the solver, with proof for all layouts, the 20 best;
- each by itself: every layout solved exactly, which is the same without a bound (of small families only);
- one multiplier: the best network of the layouts whose stages all have the same multiple, as MobileNet's and
  once-for-all's widths, at any resolution;
- largest first: the best network of the largest layout that has one within the budget;
- evolution: as in exact_solve.py, with the resolution and the widths as further genes.

The gap is the score that a network lacks to the exact one, as a share of the range of the exact solves of all
budgets of the family. Seconds are processor seconds. They contain the latency tables that a way needs, which
are most of them, and which none gets from another.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from exact_solve import GENERATIONS, KEPT, MUTATION, PARENTS, POPULATION
from experiments import RESULTS, markdown_table, write_section

from qnas.common import host
from qnas.common.errors import InfeasibleBudgetError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.solver.layouts import FamilyScores, solve_family
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import CandidateIndices, Scores, solve
from qnas.spaces.family import Layout, SpaceFamily, make_family, multiplied_widths
from qnas.spaces.space import SearchSpace, load_space

FAMILIES: tuple[tuple[str, tuple[int, ...], tuple[float, ...]], ...] = (
    ("proxyless-mobile", (160, 224), (0.75, 1)),
    ("union-mobile", (128, 160, 192, 224), (0.75, 1)),
    ("union-mobile", (128, 160, 192, 224), (0.5, 0.75, 1)),
)
MOST_ALONE = 300  # layouts that are solved one by one
SHARES = (0.25, 0.5, 0.75)
NOISE = 0.3
DEVICE = "cpu"
MOST_DRAWS = 2_000

Found = tuple[float, Layout] | None


@dataclass
class Instance:
    """A family with scores and a budget. Tables are computed when a way needs them, and are not shared."""

    family: SpaceFamily
    scores: FamilyScores
    multiples: Mapping[tuple[int, ...], float]  # of the widths that have one multiplier
    budget_ms: float

    def __post_init__(self) -> None:
        self._limits: dict[str, Limits] = {}

    def fresh(self) -> "Instance":
        """Return the instance without its tables."""
        return Instance(self.family, self.scores, self.multiples, self.budget_ms)

    def limits_of(self, space: SearchSpace) -> Limits:
        """Return the limit on networks of a space."""
        if space.name not in self._limits:
            table = compute_table(load_device(DEVICE), space)
            self._limits[space.name] = (latency_limit(table, self.budget_ms),)
        return self._limits[space.name]

    def best_at(self, layout: Layout) -> Found:
        """Return the score of the best network of a layout, None where none is within the budget."""
        space = self.family.at(layout)
        try:
            found = solve(self.scores.candidates(space), self.limits_of(space))
        except InfeasibleBudgetError:
            return None
        return self.scores.constant(layout) + found.score, layout


def best_of(found: Sequence[Found]) -> Found:
    """Return the best of some networks."""
    return max((each for each in found if each is not None), default=None)


def exact(instance: Instance) -> Found:
    """Return the best network of the k best over all layouts."""
    first = solve_family(instance.family, instance.scores, instance.limits_of, KEPT).networks[0]
    return first.score, first.layout


def each_by_itself(instance: Instance) -> Found:
    """Return the best of the best networks of all layouts."""
    return best_of([instance.best_at(layout) for layout in instance.family.layouts()])


def one_multiplier(instance: Instance) -> Found:
    """Return the best network of the layouts with one multiplier."""
    sizes = product(instance.family.resolutions_px, instance.multiples)
    return best_of([instance.best_at(Layout(px, widths)) for px, widths in sizes])


def largest_first(instance: Instance) -> Found:
    """Return the best network of the largest layout that has one, by MACs of its largest network."""

    def size(layout: Layout) -> float:
        return layout.resolution_px**2 * float(np.mean(layout.channels)) ** 2

    for layout in sorted(instance.family.layouts(), key=size, reverse=True):
        if (found := instance.best_at(layout)) is not None:
            return found
    return None


def evolution(instance: Instance) -> Found:
    """Return the best network of an evolutionary search over layouts and candidates."""
    rng = np.random.default_rng(0)
    family = instance.family
    genes = [family.resolutions_px, *family.widths]
    counts = [*map(len, genes), *(len(p.candidates) for p in family.largest.positions)]
    rows: dict[Layout, tuple[SearchSpace, Scores]] = {}

    def judged(picks: Sequence[int]) -> tuple[float, Layout] | None:
        values = [row[i] for row, i in zip(genes, picks, strict=False)]
        layout, network = Layout(values[0], tuple(values[1:])), tuple(picks[len(genes) :])
        if layout not in rows:
            space = family.at(layout)
            rows[layout] = space, instance.scores.candidates(space)
        space, scores = rows[layout]
        (limit,) = instance.limits_of(space)
        if limit.amount(network) > limit.limit:
            return None
        own = sum(row[i] for row, i in zip(scores, network, strict=True))
        return instance.scores.constant(layout) + own, layout

    population: list[tuple[float, Layout, CandidateIndices]] = []
    for _ in range(MOST_DRAWS):
        picks = tuple(int(rng.integers(n)) for n in counts)
        if (found := judged(picks)) is not None:
            population.append((*found, picks))
        if len(population) == POPULATION:
            break
    if not population:
        return None
    for _ in range(GENERATIONS):
        population.sort(key=lambda each: each[0], reverse=True)
        parents = population[: max(2, round(PARENTS * POPULATION))]
        population = list(parents)
        for _ in range(100 * POPULATION):
            if len(population) == POPULATION:
                break
            first, second = (parents[int(rng.integers(len(parents)))][2] for _ in range(2))
            crosses = bool(rng.random() < 0.5)
            chance = 0.5 if crosses else MUTATION
            child = tuple(
                (b if crosses else int(rng.integers(n))) if rng.random() < chance else a
                for a, b, n in zip(first, second, counts, strict=True)
            )
            if (found := judged(child)) is not None:
                population.append((*found, child))
    best = max(population, key=lambda each: each[0])
    return best[0], best[1]


WAYS: dict[str, Callable[[Instance], Found]] = {
    "exact, 20 best": exact,
    "each by itself": each_by_itself,
    "one multiplier": one_multiplier,
    "largest first": largest_first,
    "evolution": evolution,
}


def draw_scores(family: SpaceFamily, seed: int) -> FamilyScores:
    """Draw additive scores of candidates, resolutions and widths."""
    rng = np.random.default_rng([len(family), seed])
    macs = count_limit(family.largest, "macs", 1.0).cells
    rows = []
    for row in macs:
        gains = np.sqrt(np.array(row) / max(*row, 1.0)) * rng.uniform(0.3, 1)
        rows.append(tuple((gains + NOISE * gains.max() * rng.normal(size=len(gains))).tolist()))

    def worth(values: Sequence[int], scale: float) -> dict[int, float]:
        gains = scale * np.log2(np.array(values) / min(values))
        noise = NOISE * max(float(gains.max()), 0.0) * rng.normal(size=len(values))
        return dict(zip(values, (gains + noise).tolist(), strict=True))

    found = tuple(rows)
    resolutions = worth(family.resolutions_px, 2.0)
    return FamilyScores(lambda space: found, resolutions, tuple(worth(row, 0.5) for row in family.widths))


def family_of(name: str, resolutions_px: Sequence[int], multipliers: Sequence[float]) -> SpaceFamily:
    """Return a shipped space's family at these resolutions and multiples of its widths."""
    space = load_space(name)
    return make_family(space, resolutions_px, multiplied_widths(space, multipliers))


def instances(
    name: str, resolutions_px: Sequence[int], multipliers: Sequence[float], seed: int
) -> list[Instance]:
    """Return the instances of a family with drawn scores, one for each budget."""
    family, space = family_of(name, resolutions_px, multipliers), load_space(name)
    scores = draw_scores(family, seed)
    alike = {
        tuple(
            row[0] if len(row) == 1 else own
            for row, (own,) in zip(family.widths, multiplied_widths(space, [by]), strict=True)
        ): by
        for by in multipliers
    }
    ends = (Layout(end(resolutions_px), tuple(map(end, family.widths))) for end in (min, max))
    tables = [compute_table(load_device(DEVICE), family.at(layout)) for layout in ends]
    least, most = tables[0].fastest_ms, tables[1].slowest_ms
    return [Instance(family, scores, alike, least + share * (most - least)) for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--families", type=int, default=len(FAMILIES), help="how many, smallest first")
    parser.add_argument("--write", action="store_true", help=f"write the table into {RESULTS.name}")
    options = parser.parse_args()
    rows = []
    for name, resolutions_px, multipliers in FAMILIES[: options.families]:
        found: dict[str, list[tuple[float | None, float]]] = {way: [] for way in WAYS}
        for seed in range(options.seeds):
            own = instances(name, resolutions_px, multipliers, seed)
            best = [
                solve_family(each.family, each.scores, each.limits_of, 1).networks[0].score for each in own
            ]
            span = max(best) - min(best)
            for instance, top in zip(own, best, strict=True):
                for way, choose in WAYS.items():
                    if way == "each by itself" and len(instance.family) > MOST_ALONE:
                        continue
                    fresh, start = instance.fresh(), time.process_time()
                    chosen = choose(fresh)
                    seconds = time.process_time() - start
                    found[way].append((None if chosen is None else (top - chosen[0]) / span, seconds))
        count = len(instance.family)
        for way, outcomes in found.items():
            if not outcomes:
                continue
            gaps = [gap for gap, _ in outcomes if gap is not None]
            rows.append(
                [
                    f"{name}, {len(resolutions_px)} x {count // len(resolutions_px)} = {count:,}",
                    way,
                    str(len(outcomes) - len(gaps)),
                    f"{statistics.median(gaps):.2%}" if gaps else "",
                    f"{max(gaps):.2%}" if gaps else "",
                    f"{statistics.median(seconds for _, seconds in outcomes):.3g}",
                    f"{max(seconds for _, seconds in outcomes):.3g}",
                ]
            )
            print(" | ".join(rows[-1]), flush=True)
    titles = ["family, layouts", "way", "found nothing", "median gap", "largest gap", "median s", "longest s"]
    if options.write:
        changed = {"seeds": options.seeds, "families": options.families}
        default = {"seeds": 3, "families": len(FAMILIES)}
        given = "".join(f" --{key} {value}" for key, value in changed.items() if value != default[key])
        text = (
            f"## The exact solve over resolutions and widths\n\n`python benchmarks/exact_layouts.py{given} "
            f"--write`, on one thread of {host.cpu_name()}; {TEXT}\n\n{markdown_table(titles, rows)}"
        )
        write_section(RESULTS, "exact_layouts", text)


TEXT = """the head of the script says what is compared.
For a user: the solve over all layouts has the best network and the proof, and needs the tables of few
layouts."""


if __name__ == "__main__":
    main()
