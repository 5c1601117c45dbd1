"""The networks of least loss over a device's range of budgets, and the price of a millisecond."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from qnas.common.errors import InfeasibleBudgetError
from qnas.runs.finished_run import FinishedRun
from qnas.solver.limits import Limits, far_from_searched
from qnas.solver.solve import CandidateIndices, Scores, solve

BUDGETS = 40  # over the device's range, besides those near the search's own


NEAR = 100  # networks at most that the curve is followed by near it


@dataclass(frozen=True)
class CurvePoint:
    """The network of least loss for budgets from its own latency to `budget_ms`."""

    budget_ms: float
    latency_ms: float
    loss: float  # nats, less that of the network for the search's own budget
    far: bool  # from what was searched for, at both of these
    indices: CandidateIndices


def solve_within(run: FinishedRun, at: int, most_ms: float) -> CandidateIndices | None:
    """Return the network of highest score with at most this latency on a device, if there is one."""
    try:
        return solve(run.searched.scores, replace_limit(run.limits, at, most_ms)).indices
    except InfeasibleBudgetError:
        return None


def replace_limit(limits: Limits, at: int, most_ms: float) -> Limits:
    """Return the limits with another one in the place of one of them."""
    other = replace(limits[at], limit=most_ms, budget=most_ms * limits[at].budget / limits[at].limit)
    return (*limits[:at], other, *limits[at + 1 :])


def loss_of(scores: Scores, indices: CandidateIndices) -> float:
    """Return the loss of a network, minus the sum of its scores."""
    return -math.fsum(row[i] for row, i in zip(scores, indices, strict=True))


def trace_curve(run: FinishedRun, own: CandidateIndices, at: int, step_ms: float) -> tuple[CurvePoint, ...]:
    """Return the networks of least loss over the range of the limit `at`, a device's, by rising latency.

    A step around the search's own limit they are all there; elsewhere those of `BUDGETS` budgets.
    """
    limit, scores = run.limits[at], run.searched.scores
    low, high = limit.limit - step_ms, limit.limit + step_ms
    grid = np.geomspace(limit.least * (1 + 1e-9), limit.most * (1 + 1e-9), BUDGETS).tolist()
    solved: dict[CandidateIndices, float] = {}  # the largest limit that a network was found for

    def add(most_ms: float) -> float:
        network = solve_within(run, at, most_ms)
        if network is None:
            return -math.inf
        solved[network] = max(most_ms, solved.get(network, most_ms))
        return limit.amount(network)

    for most_ms in (*grid, limit.limit):
        add(most_ms)
    most_ms = high
    for _ in range(NEAR):
        most_ms = add(most_ms) * (1 - 1e-12)  # just below what was found, the next one
        if most_ms < low:
            break
    margin, own_loss = limit.budget / limit.limit, loss_of(scores, own)
    points = []
    for network, most_ms in solved.items():
        latency_ms, loss = limit.amount(network), loss_of(scores, network) - own_loss
        far = _is_far(run, at, latency_ms) and _is_far(run, at, most_ms)
        points.append(CurvePoint(margin * most_ms, latency_ms, loss, far, network))
    points.sort(key=lambda point: (point.latency_ms, point.loss))
    # solves are exact to rounding: what is no better than a faster one is the same by another placement
    kept: list[CurvePoint] = []
    for point in points:
        if not kept or point.loss < kept[-1].loss - 1e-12:
            kept.append(point)
    return tuple(kept)


def _is_far(run: FinishedRun, at: int, limit_ms: float) -> bool:
    within, searched = replace_limit(run.limits, at, limit_ms), run.searched
    return far_from_searched(searched.log_probabilities, within, pressed=searched.pressed) is not None


def price_at(curve: Sequence[CurvePoint], latency_ms: float) -> float:
    """Return by how much the curve's lower convex hull falls a millisecond, in nats, at a latency.

    0 beyond the curve's end: more latency buys nothing there.
    """
    hull: list[CurvePoint] = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    for before, after in pairwise(hull):
        if before.latency_ms <= latency_ms < after.latency_ms:
            return max(0.0, -_slope(before, after))
    return 0.0


def _slope(before: CurvePoint, after: CurvePoint) -> float:
    return (after.loss - before.loss) / max(after.latency_ms - before.latency_ms, 1e-12)
