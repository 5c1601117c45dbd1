"""The exact solve: the best networks within all limits, and random networks of a latency.

A network's score is the sum of its candidates', the effects that were measured of them (`effects`) or
the logarithms of their probabilities, so it is a multiple-choice knapsack (REFERENCE: maximise sum x s
under sum x t <= T - fixed), which `knapsack` solves with proof. Where identities sit in a stage does not
change a network (`placement`): `solve_best` counts such placements once, as the one that scores highest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnas.common.errors import InfeasibleBudgetError
from qnas.latency.table import LatencyTable
from qnas.solver.knapsack import k_best
from qnas.solver.limits import Limit, Limits, check_limits, count_limit
from qnas.spaces.arch import arch_document, arch_from_indices
from qnas.spaces.block_order import Labels, block_labels
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace

SOLVER = "qnas.knapsack"
K_BEST = 20  # networks that are solved for, and told apart by how they do on held-out images
# An expected amount further than this from its limit is far from what was searched for. A search ends
# within 3% of its budget, and exchanging one block moves a network in the middle of a shipped space by at
# most 7 to 25%, by space and device: beyond that several blocks have to be other than what the
# probabilities favour, which were never learned apart at such a budget.
FAR = 0.25
BISECTIONS = 12  # of the range of MACs, for the network that MACs alone would choose

Scores = tuple[tuple[float, ...], ...]  # [position][candidate]
Indices = tuple[int, ...]  # a network: the candidate's number at each position


@dataclass(frozen=True)
class Solution:
    """A network and what is proven of it."""

    indices: Indices
    score: float  # sum of the chosen candidates' scores
    limits: Limits  # that it is within
    bound: float  # no network within the limits has a higher score than this
    solver: str
    rank: int = 1  # by score, from 1
    solved: int = 1  # networks that were solved for, of which it is one

    @property
    def latency_ms(self) -> float:
        """Return the latency on the first device."""
        return self.limits[0].amount(self.indices)


def solve(scores: Scores, limits: Limits) -> Solution:
    """Return the network with the highest total score that is within all limits.

    Its amounts, summed as `Limit.amount` sums them, are within every limit; its score is within 1e-9 of
    the scores' range of the best. Raises InfeasibleBudgetError when there is none.
    """
    every = tuple(tuple(range(1, 1 + len(row))) for row in scores)
    return _solutions(scores, limits, 1, every)[0]


def check_feasible(limits: Limits) -> None:
    """Raise InfeasibleBudgetError, with what is possible, if no network meets all the limits at once."""
    # the network that presses least on all limits together is looked for
    pressure = sum(np.concatenate([np.asarray(row) for row in limit.cells]) / limit.limit for limit in limits)
    ends = np.cumsum([len(row) for row in limits[0].cells])[:-1]
    solve(tuple(tuple((-part).tolist()) for part in np.split(np.asarray(pressure), ends)), limits)


def solve_best(space: SearchSpace, scores: Scores, limits: Limits, k: int = K_BEST) -> tuple[Solution, ...]:
    """Return the k best networks within all limits, best first; fewer where there are fewer.

    Each is another network: placements of identities that make the same one count once, with the score
    of the best. Raises InfeasibleBudgetError when there is none.
    """
    return _solutions(scores, limits, k, block_labels(space))


def _solutions(scores: Scores, limits: Limits, k: int, labels: Labels) -> tuple[Solution, ...]:
    check_limits(limits)
    found = k_best(scores, limits, k, labels)
    if not found.networks:
        wanted = " and ".join(f"{limit.name} {limit.describe(limit.budget)}" for limit in limits)
        raise InfeasibleBudgetError(
            f"found no network within {wanted} at once, though each is possible by itself: give more of one"
        )
    bound = max(found.scores[0], found.left_out)
    return tuple(
        Solution(network, score, limits, bound, SOLVER, rank, len(found.networks))
        for rank, (network, score) in enumerate(zip(found.networks, found.scores, strict=True), 1)
    )


def far_from_searched(scores: Scores, limits: Limits, *, pressed: bool) -> str | None:
    """Say whether limits are far from those that the probabilities were searched for.

    The amounts expected by the probabilities, whose logarithms the scores are, are compared with the
    limits; the one that is exceeded most, or reached most nearly, counts, as it is the one that a search
    holds at its limit. More than FAR above is far, and below where the search was `pressed` by a budget.
    """
    expected = [expected_amount(scores, limit) for limit in limits]
    over = [amount / min(limit.limit, limit.most) - 1 for amount, limit in zip(expected, limits, strict=True)]
    at = int(np.argmax(over))
    if not (over[at] > FAR or (pressed and over[at] < -FAR)):
        return None
    limit = limits[at]
    on = f" on {limit.name}" if limit.table is not None else ""
    off = f"{abs(over[at]):.0%} {'above' if over[at] > 0 else 'below'} what is allowed"
    return (
        f"this is far from what was searched for: its probabilities expect "
        f"{limit.describe(expected[at])}{on}, {off}; a search of its own would probably find a better network"
    )


def near_searched(log_probabilities: Scores, limit: Limit, *, pressed: bool) -> tuple[float, float | None]:
    """Return the budgets of one limit that are not far from what was searched for; None: no end above."""
    margin = limit.budget / limit.limit
    expected = margin * expected_amount(log_probabilities, limit)
    return expected / (1 + FAR), expected / (1 - FAR) if pressed else None


def expected_amount(log_probabilities: Scores, limit: Limit) -> float:
    """Return what a network drawn by these probabilities takes on average."""
    shares = (np.exp(row) for row in log_probabilities)
    cells = map(np.asarray, limit.cells)
    return limit.fixed + sum(float(share @ row) for share, row in zip(shares, cells, strict=True))


def macs_guided(space: SearchSpace, scores: Scores, limits: Limits) -> Solution | None:
    """Return what would be derived within these limits by somebody who knows MACs and no latency.

    The scores are solved under a limit on MACs in place of the devices'; of such limits the largest is
    taken, by bisection to a 4096th of the range, whose solution is within the devices' limits too.
    Where MACs order networks as the devices do, that is the derived network itself. The solution's
    limits and bound are those of the solve under MACs. None where no such limit leads to a network.
    """
    devices = [limit for limit in limits if limit.table is not None]
    asked = [limit for limit in limits if limit.table is None]
    macs = count_limit(space, "macs", math.inf)

    def solve_under(most: float) -> Solution | None:
        try:
            solution = solve(scores, (replace(macs, budget=most, limit=most), *asked))
        except InfeasibleBudgetError:
            return None
        return solution if all(d.amount(solution.indices) <= d.limit for d in devices) else None

    low, high = macs.least, macs.most
    best = solve_under(high)
    if best is not None:
        return best
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = solve_under(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return best or solve_under(macs.least)


def largest(space: SearchSpace, limits: Limits) -> Solution:
    """Return the network of the most MACs within all limits; its score is their number."""
    return solve(count_limit(space, "macs", math.inf).cells, limits)


def solution_document(space: SearchSpace, solution: Solution, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the arch.json of a solution, with the certificate that a reader can check.

    The prediction is the certificate's `fixed_ms` and `position_ms` together; it is at most
    `limit_ms`, the budget over 1 + margin. These and `budget_ms` are of the first device; `limits` has
    the same of each: `amount`, which is `fixed` and `positions` together, is at most `limit`.
    """
    arch = arch_from_indices(space, solution.indices)
    blocks = lower(space, arch)
    limit, table = solution.limits[0], solution.limits[0].table
    assert table is not None, "the first limit is a device's"
    return arch_document(
        space,
        arch,
        {
            "device": table.device,
            "table_digest": table.digest,
            "budget_ms": limit.budget,
            "margin": table.margin,
            "limit_ms": limit.limit,
            "latency_ms": solution.latency_ms,
            "latency_coverage": table.coverage(solution.indices),
            "macs": count_macs(blocks),
            "params": count_params(blocks),
            "limits": [_limit_entry(each, solution.indices) for each in solution.limits],
            "certificate": {
                "solver": solution.solver,
                "score": solution.score,
                "score_bound": solution.bound,
                "rank": solution.rank,
                "solved": solution.solved,
                "fixed_ms": table.fixed_ms,
                "position_ms": [row[i] for row, i in zip(table.ms, solution.indices, strict=True)],
                "fastest_ms": table.fastest_ms,
                "slowest_ms": table.slowest_ms,
            },
            **details,
        },
    )


def _limit_entry(limit: Limit, indices: tuple[int, ...]) -> dict[str, Any]:
    table = limit.table
    of_device = {} if table is None else {"table_digest": table.digest, "coverage": table.coverage(indices)}
    return {
        "name": limit.name,
        "unit": limit.unit,
        "budget": limit.budget,
        "limit": limit.limit,
        "amount": limit.amount(indices),
        "fixed": limit.fixed,
        "positions": [row[i] for row, i in zip(limit.cells, indices, strict=True)],
        "least": limit.least,
        "most": limit.most,
        **of_device,
    }


def sample_near(
    table: LatencyTable,
    low_ms: float,
    high_ms: float,
    n: int,
    rng: np.random.Generator,
    *,
    within: Limits = (),
    weights: Scores | None = None,
    bins: int = 4000,
) -> list[Indices]:
    """Draw networks whose latency lies in [low, high], all such networks about equally likely.

    With `weights` of the candidates each is as likely as the product of its candidates' weights. Counts
    the networks of every total by dynamic programming over latencies rounded to bins, then draws
    backwards through the counts; what rounding put outside the window, and what is over one of the
    limits `within`, is drawn again. Returns fewer than n, perhaps none, where such networks are rare.
    """
    room = high_ms - table.fixed_ms
    if room <= 0:
        return []
    width = room / bins
    steps = [np.rint(np.asarray(row) / width).astype(np.int64) for row in table.ms]
    # rounding moves a total by up to half a bin a position: networks at the window's ends too are met
    slack = len(steps) // 2 + 1
    last = bins + slack
    shares = [np.asarray(row) / sum(row) for row in weights or [[1.0] * len(row) for row in steps]]
    # ways[i][b]: share of the choices of positions i.. that take b bins together
    ways: list[NDArray[np.float64]] = [np.zeros(last + 1) for _ in range(len(steps) + 1)]
    ways[-1][0] = 1.0
    for i in range(len(steps) - 1, -1, -1):
        for step, share in zip(steps[i], shares[i], strict=True):
            if step <= last:
                ways[i][step:] += share * ways[i + 1][: last + 1 - step]
    first = max(0, math.floor((low_ms - table.fixed_ms) / width) - slack)
    start = ways[0][first:]
    if start.sum() <= 0:
        return []
    found: list[Indices] = []
    for _ in range((200 if within else 20) * n):
        left = first + int(rng.choice(len(start), p=start / start.sum()))
        indices = []
        for i, (row, share) in enumerate(zip(steps, shares, strict=True)):
            after = np.where(row <= left, share * ways[i + 1][np.maximum(left - row, 0)], 0.0)
            pick = int(rng.choice(len(row), p=after / after.sum()))
            indices.append(pick)
            left -= int(row[pick])
        if low_ms <= table.latency_ms(indices) <= high_ms and all(
            limit.amount(indices) <= limit.limit for limit in within
        ):
            found.append(tuple(indices))
            if len(found) == n:
                break
    return found
