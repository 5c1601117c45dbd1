"""Pareto fronts of a finished search: the best networks by budget on each device, latency against accuracy.

Budgets over a device's whole range are solved exactly with the scores of the search. If several budgets lead
to the same network, the smallest is kept. After a search over several resolutions, each budget is solved over
all of them, and a point has the space at its own. A search learns most about networks near its own budget, so
each point is marked if it is far from that budget (`far_from_searched`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qnas.common.errors import InfeasibleBudgetError
from qnas.common.files import csv_text
from qnas.common.intervals import wilson
from qnas.latency.device import Device
from qnas.runs.budget_curve import LEAST_MS
from qnas.runs.finished_run import FinishedRun
from qnas.runs.public_front import public_front
from qnas.solver.layouts import LimitsOf, mean_limits, solve_family
from qnas.solver.limits import Limit, Limits, expected_amount, far_from_searched, near_searched
from qnas.solver.solve import Solution, solve_best
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.block_order import block_labels
from qnas.spaces.family import Layout
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace

POINTS = 12  # budgets per device
POINT_K_BEST = 5  # networks per budget, to be ranked on held-out images


@dataclass(frozen=True)
class Solved:
    """The best networks within a budget, by descending score."""

    budget_ms: float
    solutions: tuple[Solution, ...]
    # the limits on the means over the layouts of a family, which the search's probabilities are compared with
    over_layouts: Limits | None = None


@dataclass(frozen=True)
class Accuracy:
    """The supernet accuracy of a network on a number of held-out images."""

    share: float
    images: int
    balanced: float | None = None  # the mean recall of the classes


@dataclass(frozen=True)
class Point:
    """The best network within some budget."""

    budget_ms: float  # the smallest such budget that was solved
    solution: Solution
    space: SearchSpace
    macs: int
    params: int
    accuracy: Accuracy | None  # None: not ranked on images, but best by the search's scores
    on_front: bool  # whether no faster network on the device is as good
    far: bool  # whether far from what was searched for
    own_budget: bool  # whether it is the best within the search's own budget

    @property
    def latency_ms(self) -> float:
        """The latency on the device."""
        return self.solution.latency_ms


def spread_budgets(limit: Limit, n: int, own_ms: float | None) -> list[float]:
    """Return n geometrically spaced budgets over the range of the networks, and the search's own."""
    margin = limit.budget / limit.limit
    # slightly larger, so that the networks at the ends are within them despite rounding
    least, most = ((1 + 1e-9) * margin * max(end, LEAST_MS) for end in (limit.least, limit.most))
    budgets = set(np.geomspace(least, most, n).tolist())
    return sorted(budgets | ({own_ms} if own_ms is not None else set()))


def solve_budgets(
    run: FinishedRun, limit: Limit, others: Limits, budgets_ms: Iterable[float], k: int
) -> tuple[Solved, ...]:
    """Return the k best networks within each budget, which replaces the limit's own, and the other limits.

    Budgets that no network meets are left out. Raises InfeasibleBudgetError if none is left.
    """
    found, refused = [], None
    for budget_ms in budgets_ms:
        share = budget_ms / limit.budget
        within = (replace(limit, budget=budget_ms, limit=share * limit.limit), *others)
        try:
            found.append(Solved(budget_ms, solve_best(run.space, run.searched.scores, within, k)))
        except InfeasibleBudgetError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return tuple(found)


def solve_layouts(
    run: FinishedRun, at: Mapping[Layout, Limits], budgets_ms: Iterable[float], k: int
) -> tuple[Solved, ...]:
    """Return the k best networks of all layouts within each budget, by score and rank in the family.

    `at` has the limits at each layout, whose first one gets the budget in place of its own. Budgets that no
    network meets are left out.
    """
    assert run.family is not None
    family, scores, found = run.family.family, run.family.scores(run.searched.scores), []
    searched = [layout for layout in at if run.family.entry(layout)["trained_px"] is not None]
    for budget_ms in budgets_ms:
        within = {
            family.name_of(layout): (
                replace(first, budget=budget_ms, limit=budget_ms / first.budget * first.limit),
                *others,
            )
            for layout, (first, *others) in at.items()
        }
        try:
            solved = solve_family(family, scores, _known(within), k)
        except InfeasibleBudgetError:
            continue
        solutions = tuple(replace(e.solution, score=e.score, rank=e.rank) for e in solved.networks)
        means = mean_limits([within[family.name_of(layout)] for layout in searched])
        found.append(Solved(budget_ms, solutions, means))
    return tuple(found)


def _known(limits: Mapping[str, Limits]) -> LimitsOf:
    return lambda space: limits[space.name]


def space_of(run: FinishedRun, solution: Solution) -> SearchSpace:
    """Return the space of a solution: the run's, or that at its layout."""
    table = solution.limits[0].table
    if run.family is None or table is None or table.space == run.space.name:
        return run.space
    return run.family.family.at(run.family.layout_named(table.space))


def network_key(run: FinishedRun, solution: Solution) -> Any:
    """Return what accuracies are known by: the network, and the layout that it is at if there are several."""
    return solution.indices if run.family is None else (space_of(run, solution).name, solution.indices)


def front_points(
    run: FinishedRun,
    solved: Sequence[Solved],
    accuracies: Mapping[Any, Accuracy],
    own_ms: float | None,
) -> tuple[Point, ...]:
    """Select the best network for each budget, by accuracy, or by score if no accuracy is known.

    `accuracies` are by `network_key`. Of budgets that lead to the same network, the smallest is kept. If one
    of them is the search's own, the point is marked.
    """
    searched = run.searched
    labels, shares = block_labels(run.space), {network: of.share for network, of in accuracies.items()}
    points: dict[tuple[Any, ...], Point] = {}
    for each in solved:
        best = min(each.solutions, key=lambda s: (-shares.get(network_key(run, s), 0.0), s.rank))
        space = space_of(run, best)
        blocks_of = (row[pick] for row, pick in zip(labels, best.indices, strict=True) if row[pick])
        key = space.name, *blocks_of
        own = each.budget_ms == own_ms
        if key in points:
            points[key] = replace(points[key], own_budget=points[key].own_budget or own)
            continue
        blocks = lower(space, arch_from_indices(space, best.indices))
        limits = best.limits if each.over_layouts is None else each.over_layouts
        far = far_from_searched(searched.log_probabilities, limits, pressed=searched.pressed)
        points[key] = Point(
            each.budget_ms,
            best,
            space,
            count_macs(blocks),
            count_params(blocks),
            accuracies.get(network_key(run, best)),
            on_front=True,
            far=far is not None,
            own_budget=own,
        )
    return _mark_front(sorted(points.values(), key=lambda point: point.latency_ms))


def _mark_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """Mark the points that are better than all faster ones. Points are sorted by latency."""
    marked, best = [], float("-inf")
    for point in points:
        good = point.accuracy.share if point.accuracy is not None else point.solution.score
        marked.append(replace(point, on_front=good > best))
        best = max(best, good)
    return tuple(marked)


def front_document(
    run: FinishedRun,
    limit: Limit,
    points: Sequence[Point],
    own_ms: float | None,
    device: Device | None = None,
    layouts: Mapping[Layout, Limits] | None = None,
) -> dict[str, Any]:
    """Return a device's entry in a pareto.json; `own_ms` is its budget in the search, if it had one.

    With the device, it has the front of the public networks that take as long. `layouts` are the device's
    limits at the layouts of a family, first in each; `limit` is that at the run's own.
    """
    log_probabilities, pressed = run.searched.log_probabilities, run.searched.pressed
    table = limit.table
    assert table is not None, "the limit is a device's"
    fastest_ms, slowest_ms, searched = table.fastest_ms, table.slowest_ms, limit
    if layouts is not None and run.family is not None:
        tables = [first.table for first, *_ in layouts.values() if first.table is not None]
        fastest_ms, slowest_ms = min(t.fastest_ms for t in tables), max(t.slowest_ms for t in tables)
        trained = [of for at, of in layouts.items() if run.family.entry(at)["trained_px"] is not None]
        searched = mean_limits(trained)[0]
    return {
        "device": limit.name,
        "fastest_ms": fastest_ms,  # over the space, or over all layouts
        "slowest_ms": slowest_ms,
        "expected_ms": expected_amount(log_probabilities, searched),  # of a network drawn by these
        # range of budgets that are not far from the searched one; None: no upper end
        "trusted_ms": list(near_searched(log_probabilities, searched, pressed=pressed)),
        "own_budget_ms": own_ms,
        "own_latency_ms": limit.latency_ms(run.indices),  # of the network that the search derived
        "own_accuracy": run.found["derived"].get("heldout_accuracy"),
        "points": [_entry(point, with_space=layouts is not None) for point in points],
        "public": public_front(device, fastest_ms, slowest_ms),
        # of the upper ends that the budgets bound, as in the search
        **({"confidence": limit.confidence} if limit.confidence is not None else {}),
    }


def fronts_document(
    space: SearchSpace, fronts: Sequence[Mapping[str, Any]], details: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of a pareto.json; `fronts` are the devices' entries (`front_document`)."""
    return {
        "schema": "qnas.pareto/1",
        "space": space.name,
        "space_digest": space.digest,
        "resolution_px": space.input.resolution_px,  # that the latencies hold for
        **details,
        "devices": list(fronts),
    }


def _entry(point: Point, *, with_space: bool) -> dict[str, Any]:
    space, limit = point.space, point.solution.limits[0]
    known = point.accuracy
    low, high = wilson(known.share, known.images) if known is not None else (None, None)
    interval = limit.interval(point.solution.indices)
    return {
        "device": limit.name,
        **({"space": space.name, "resolution_px": space.input.resolution_px} if with_space else {}),
        "budget_ms": point.budget_ms,
        "latency_ms": point.latency_ms,
        "low_ms": interval.low_ms if interval is not None else None,
        "high_ms": interval.high_ms if interval is not None else None,
        "level": interval.level if interval is not None else None,
        "heldout_accuracy": known.share if known is not None else None,
        "heldout_low": low,
        "heldout_high": high,
        "heldout_balanced_accuracy": known.balanced if known is not None else None,
        "score": point.solution.score,
        "macs": point.macs,
        "params": point.params,
        "on_front": point.on_front,
        "far": point.far,
        "own_budget": point.own_budget,
        "choices": list(arch_from_indices(space, point.solution.indices).choices),
    }


def fronts_csv(document: Mapping[str, Any]) -> str:
    """Return the points of a pareto.json as CSV, one per line, with choices separated by spaces."""
    points = [point for front in document["devices"] for point in front["points"]]
    return csv_text(points[0], ({**point, "choices": " ".join(point["choices"])} for point in points))
