"""The exact solve: the most probable network within the budget, and random networks of a latency.

The choices are separable, so it is a multiple-choice knapsack (REFERENCE: maximise sum x log p under
sum x t <= T - fixed), solved by the mixed-integer solver HiGHS through scipy. Whatever the solver's
tolerance, a network is returned only if its latency, summed as the table sums it, is within budget.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from qnas.arch import arch_document, arch_from_indices
from qnas.errors import CheckpointError, InfeasibleBudgetError
from qnas.files import read_json
from qnas.latency.table import LatencyTable
from qnas.limits import Limits, check_limits
from qnas.lower import count_macs, count_params, lower
from qnas.space import SearchSpace

SEARCH_FILE = "search.json"  # of a run: what the search ended with
SOLVER = "scipy.optimize.milp (HiGHS)"
MAX_CUTS = 50  # networks over the budget by less than the solver's tolerance, before giving up

Scores = tuple[tuple[float, ...], ...]  # [position][candidate]


@dataclass(frozen=True)
class Solution:
    """A network and what is proven of it."""

    indices: tuple[int, ...]  # the candidate's number at each position
    score: float  # sum of the chosen candidates' scores
    limits: Limits  # that it is within
    bound: float  # no network within the budget has a higher score than this
    solver: str

    @property
    def latency_ms(self) -> float:
        """Return the latency on the first device."""
        return self.limits[0].amount(self.indices)


def solve(scores: Scores, limits: Limits) -> Solution:
    """Return the network with the highest total score that is within all limits.

    Raises InfeasibleBudgetError when there is none.
    """
    check_limits(limits)
    sizes = [len(row) for row in scores]
    gain = np.concatenate([np.asarray(row) for row in scores])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    one_each = np.zeros((len(sizes), len(gain)))
    for i in range(len(sizes)):
        one_each[i, starts[i] : starts[i + 1]] = 1
    constraints = [
        LinearConstraint(one_each, 1, 1),
        *(
            LinearConstraint(np.concatenate(limit.cells)[None], -np.inf, limit.limit - limit.fixed)
            for limit in limits
        ),
    ]
    for _ in range(MAX_CUTS):
        result = milp(
            -gain,
            integrality=np.ones_like(gain),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            break
        indices = tuple(int(np.argmax(result.x[a:b])) for a, b in pairwise(starts))
        score = math.fsum(row[i] for row, i in zip(scores, indices, strict=True))
        if all(limit.amount(indices) <= limit.limit for limit in limits):
            bound = max(score, -float(result.mip_dual_bound))
            return Solution(indices, score, limits, bound, SOLVER)
        # over by less than the solver's tolerance: forbid this very network and solve again
        chosen = np.zeros_like(gain)
        chosen[starts[:-1] + np.asarray(indices)] = 1
        constraints.append(LinearConstraint(chosen[None], -np.inf, len(indices) - 1))
    wanted = ", ".join(f"{limit.name} {limit.describe(limit.budget)}" for limit in limits)
    raise InfeasibleBudgetError(f"the solver found no network within {wanted}: give a little more")


def read_scores(folder: Path, space: SearchSpace) -> Scores:
    """Return the log probabilities that a finished search ended with.

    Raises CheckpointError where the folder holds none for this space.
    """
    path = folder / SEARCH_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {SEARCH_FILE} here: not the folder of a finished search")
    rows = read_json(path, CheckpointError).get("log_probabilities")
    sizes = [len(position.candidates) for position in space.positions]
    if (
        not isinstance(rows, list)
        or [len(row) if isinstance(row, list) else -1 for row in rows] != sizes
        or not all(isinstance(value, float | int) for row in rows for value in row)
    ):
        raise CheckpointError(
            f"{path}: no log_probabilities for each candidate of space {space.name}: search again"
        )
    return tuple(tuple(map(float, row)) for row in rows)


def solution_document(space: SearchSpace, solution: Solution, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the arch.json of a solution, with the certificate that a reader can check.

    The prediction is the certificate's `fixed_ms` and `position_ms` together; it is at most
    `limit_ms`, the budget over 1 + margin.
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
            "certificate": {
                "solver": solution.solver,
                "score": solution.score,
                "score_bound": solution.bound,
                "fixed_ms": table.fixed_ms,
                "position_ms": [row[i] for row, i in zip(table.ms, solution.indices, strict=True)],
                "fastest_ms": table.fastest_ms,
                "slowest_ms": table.slowest_ms,
            },
            **details,
        },
    )


def sample_near(
    table: LatencyTable, low_ms: float, high_ms: float, n: int, rng: np.random.Generator, *, bins: int = 4000
) -> list[tuple[int, ...]]:
    """Draw networks whose latency lies in [low, high], all such networks about equally likely.

    Counts the networks of every total by dynamic programming over latencies rounded to bins, then
    draws backwards through the counts; what rounding put outside the window is drawn again. Returns
    fewer than n, perhaps none, where such networks are rare.
    """
    room = high_ms - table.fixed_ms
    if room <= 0:
        return []
    width = room / bins
    steps = [np.rint(np.asarray(row) / width).astype(np.int64) for row in table.ms]
    # rounding moves a total by up to half a bin a position: networks at the window's ends too are met
    slack = len(steps) // 2 + 1
    last = bins + slack
    # ways[i][b]: share of the choices of positions i.. that take b bins together
    ways: list[NDArray[np.float64]] = [np.zeros(last + 1) for _ in range(len(steps) + 1)]
    ways[-1][0] = 1.0
    for i in range(len(steps) - 1, -1, -1):
        for step in steps[i]:
            if step <= last:
                ways[i][step:] += ways[i + 1][: last + 1 - step] / len(steps[i])
    first = max(0, math.floor((low_ms - table.fixed_ms) / width) - slack)
    start = ways[0][first:]
    if start.sum() <= 0:
        return []
    found: list[tuple[int, ...]] = []
    for _ in range(20 * n):
        left = first + int(rng.choice(len(start), p=start / start.sum()))
        indices = []
        for i, row in enumerate(steps):
            after = np.where(row <= left, ways[i + 1][np.maximum(left - row, 0)], 0.0)
            pick = int(rng.choice(len(row), p=after / after.sum()))
            indices.append(pick)
            left -= int(row[pick])
        if low_ms <= table.latency_ms(tuple(indices)) <= high_ms:
            found.append(tuple(indices))
            if len(found) == n:
                break
    return found
