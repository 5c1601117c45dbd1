"""Pareto fronts of a finished search: the best networks by budget on each device, latency against accuracy.

Budgets over a device's whole range are solved exactly with the scores of the search. If several budgets lead
to the same network, the smallest is kept. A search learns most about networks near its own budget, so each
point is marked if it is far from that budget (`far_from_searched`).
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
from qnas.solver.limits import Limit, Limits, expected_amount, far_from_searched, near_searched
from qnas.solver.solve import CandidateIndices, Solution, solve_best
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.block_order import block_labels
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace

POINTS = 12  # budgets per device
POINT_K_BEST = 5  # networks per budget, to be ranked on held-out images


@dataclass(frozen=True)
class Solved:
    """The best networks within a budget, by descending score."""

    budget_ms: float
    solutions: tuple[Solution, ...]


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


def front_points(
    run: FinishedRun,
    solved: Sequence[Solved],
    accuracies: Mapping[CandidateIndices, Accuracy],
    own_ms: float | None,
) -> tuple[Point, ...]:
    """Select the best network for each budget, by accuracy, or by score if no accuracy is known.

    Of budgets that lead to the same network, the smallest is kept. If one of them is the search's own, the
    point is marked.
    """
    space, searched = run.space, run.searched
    labels, shares = block_labels(space), {network: of.share for network, of in accuracies.items()}
    points: dict[tuple[int, ...], Point] = {}
    for each in solved:
        best = min(each.solutions, key=lambda s: (-shares.get(s.indices, 0.0), s.rank))
        key = tuple(row[pick] for row, pick in zip(labels, best.indices, strict=True) if row[pick])
        own = each.budget_ms == own_ms
        if key in points:
            points[key] = replace(points[key], own_budget=points[key].own_budget or own)
            continue
        blocks = lower(space, arch_from_indices(space, best.indices))
        far = far_from_searched(searched.log_probabilities, best.limits, pressed=searched.pressed)
        points[key] = Point(
            each.budget_ms,
            best,
            count_macs(blocks),
            count_params(blocks),
            accuracies.get(best.indices),
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
) -> dict[str, Any]:
    """Return a device's entry in a pareto.json; `own_ms` is its budget in the search, if it had one.

    With the device, it has the front of the public networks that take as long.
    """
    log_probabilities, pressed = run.searched.log_probabilities, run.searched.pressed
    table = limit.table
    assert table is not None, "the limit is a device's"
    return {
        "device": limit.name,
        "fastest_ms": table.fastest_ms,  # over the space
        "slowest_ms": table.slowest_ms,
        "expected_ms": expected_amount(log_probabilities, limit),  # of a network drawn by the probabilities
        # range of budgets that are not far from the searched one; None: no upper end
        "trusted_ms": list(near_searched(log_probabilities, limit, pressed=pressed)),
        "own_budget_ms": own_ms,
        "own_latency_ms": limit.latency_ms(run.indices),  # of the network that the search derived
        "own_accuracy": run.found["derived"].get("heldout_accuracy"),
        "points": [_entry(run.space, limit, point) for point in points],
        "public": public_front(device, table.fastest_ms, table.slowest_ms),
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


def _entry(space: SearchSpace, limit: Limit, point: Point) -> dict[str, Any]:
    known = point.accuracy
    low, high = wilson(known.share, known.images) if known is not None else (None, None)
    interval = limit.interval(point.solution.indices)
    return {
        "device": limit.name,
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
