"""The networks of least loss over a device's range of budgets, and the price of a millisecond."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from qnas.common.errors import InfeasibleBudgetError
from qnas.runs.finished_run import FinishedRun
from qnas.solver.limits import Limit, Limits, far_from_searched
from qnas.solver.solve import CandidateIndices, solve

BUDGETS = 40  # budgets over the device's range, in addition to those near the search's budget
LEAST_MS = 1e-9  # where a table's fastest network takes no time
NEAR = 100  # most steps from network to network near the search's budget


@dataclass(frozen=True)
class CurvePoint:
    """The network of least loss for budgets from its own latency to `budget_ms`."""

    budget_ms: float
    latency_ms: float
    loss: float  # nats, relative to the network for the search's budget
    far: bool  # whether both budgets are far from what was searched for
    indices: CandidateIndices


def replace_limit(limits: Limits, at: int, most_ms: float) -> Limits:
    """Return the limits with limit number `at` changed to `most_ms`."""
    other = replace(limits[at], limit=most_ms, budget=most_ms * limits[at].budget / limits[at].limit)
    return (*limits[:at], other, *limits[at + 1 :])


@dataclass(frozen=True)
class OtherBudgets:
    """A finished search that is solved with other budgets for one device."""

    run: FinishedRun
    at: int  # index of the device's limit
    own: CandidateIndices  # the network of least loss within the search's limits

    @property
    def limit(self) -> Limit:
        """The device's limit."""
        return self.run.limits[self.at]

    def solve(self, most_ms: float) -> CandidateIndices | None:
        """Return the network with the highest score within this latency, or None if there is none."""
        try:
            return solve(self.run.searched.scores, replace_limit(self.run.limits, self.at, most_ms)).indices
        except InfeasibleBudgetError:
            return None

    def loss(self, indices: CandidateIndices) -> float:
        """Return the loss of a network relative to `own`, in nats. Scores are negative losses."""
        scores = self.run.searched.scores
        of, own = (math.fsum(r[i] for r, i in zip(scores, n, strict=True)) for n in (indices, self.own))
        return own - of

    def trace(self, step_ms: float) -> tuple[CurvePoint, ...]:
        """Return the networks of least loss over the range of the limit, by rising latency.

        Within a step of the search's limit, all of them are included; elsewhere, those for `BUDGETS` budgets.
        """
        limit = self.limit
        least, most = (max(end * (1 + 1e-9), LEAST_MS) for end in (limit.least, limit.most))
        grid = np.geomspace(least, most, BUDGETS).tolist()
        solved: dict[CandidateIndices, float] = {}  # the largest limit for which each network was found

        def add(most_ms: float) -> float:
            network = self.solve(most_ms)
            if network is None:
                return -math.inf
            solved[network] = max(most_ms, solved.get(network, most_ms))
            return limit.amount(network)

        for most_ms in (*grid, limit.limit):
            add(most_ms)
        most_ms = limit.limit + step_ms
        for _ in range(NEAR):
            most_ms = add(most_ms) * (1 - 1e-12)  # just below the latency found, for the next network
            if most_ms < limit.limit - step_ms:
                break
        margin = limit.budget / limit.limit
        points = []
        for network, most_ms in solved.items():
            latency_ms = limit.amount(network)
            far = self._is_far(latency_ms) and self._is_far(most_ms)
            points.append(CurvePoint(margin * most_ms, latency_ms, self.loss(network), far, network))
        # a network no better than a faster one is, up to rounding, the same network with other placements
        kept: list[CurvePoint] = []
        for point in sorted(points, key=lambda point: (point.latency_ms, point.loss)):
            if not kept or point.loss < kept[-1].loss - 1e-12:
                kept.append(point)
        return tuple(kept)

    def _is_far(self, limit_ms: float) -> bool:
        within, searched = replace_limit(self.run.limits, self.at, limit_ms), self.run.searched
        return far_from_searched(searched.log_probabilities, within, pressed=searched.pressed) is not None


def price_at(curve: Sequence[CurvePoint], latency_ms: float) -> float:
    """Return by how many nats per millisecond the curve's lower convex hull falls at a latency.

    0 beyond the end of the curve, where more latency gains nothing.
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
