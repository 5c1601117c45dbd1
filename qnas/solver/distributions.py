"""Distributions over networks: of maximum entropy under limits, and even over a range of latencies.

Among all distributions that draw each position independently and whose expected amounts meet the limits, the
one of largest entropy has p_i ~ exp(-sum_l strength_l cells_li / limit_l). The strengths minimise the convex
dual, by L-BFGS.

Where candidates have groups that must be equally likely at each position, such as kinds of blocks, the
distribution of largest entropy has the same form within a group, and each group has the geometric mean of the
masses of its position's groups (`levelled`). The dual changes alike and stays convex.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from qnas.latency.table import LatencyTable
from qnas.solver.limits import Limits
from qnas.solver.solve import CandidateIndices, Scores

# with it, a candidate that takes a hundredth of the limit is e^-10 times as likely as a free one
MOST_STRENGTH = 1000.0

Floats = NDArray[np.float64]


def max_entropy_strengths(
    fixed: Floats,
    cells: Floats,
    limit: Floats,
    mask: NDArray[np.bool_],
    bounds: tuple[float, float] = (0.0, MOST_STRENGTH),
    tolerance: float = 1e-5,
    groups: NDArray[np.int64] | None = None,
) -> Floats:
    """Return the strength of each limit, (limits,).

    fixed, limit: (limits,); cells: (limits, positions, candidates), 0 where the mask (positions, candidates)
    is False. With a lower bound of 0, limits that the uniform distribution meets get no strength. With one
    below 0, the expected amount equals the limit as closely as possible. `tolerance` is a share of the limit.
    With `groups` (positions, candidates; see `levelled`), the groups of a position are equally likely.
    """
    cells, margin = cells / limit[:, None, None], 1 - fixed / limit

    def dual(strengths: Floats) -> tuple[float, Floats]:
        tilted = np.where(mask, -np.tensordot(strengths, cells, 1), -np.inf)
        tilted = tilted if groups is None else levelled(tilted, groups)
        slack = margin - (softmax(tilted, axis=1) * cells).sum((1, 2))
        return float(logsumexp(tilted, axis=1).sum() + strengths @ margin), slack

    found = minimize(
        dual,
        np.zeros(len(limit)),
        jac=True,
        method="L-BFGS-B",
        bounds=[bounds] * len(limit),
        options={"ftol": min(1e-12, tolerance**2), "gtol": tolerance},
    )
    strengths: Floats = found.x
    return strengths


def levelled(logits: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return logits (positions, candidates) shifted so that the groups of a position are equally likely.

    groups: (positions, candidates), a number for each group; candidates with a negative one have none and
    keep their logits. Each group gets the geometric mean of the masses of its position's groups.
    """
    found = logits.copy()
    for row, own, numbers in zip(found, logits, groups, strict=True):
        members = [np.flatnonzero(numbers == number) for number in np.unique(numbers[numbers >= 0])]
        masses = [float(logsumexp(own[places])) for places in members]
        for places, mass in zip(members, masses, strict=True):
            row[places] += sum(masses) / len(masses) - mass
    return found


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
) -> list[CandidateIndices]:
    """Draw networks whose latency lies in [low, high], all such networks about equally likely.

    With `weights` of the candidates, the likelihood of a network is the product of its candidates' weights.
    Dynamic programming counts the networks of each total latency, rounded to bins; networks are drawn
    backwards through the counts. A network that rounding put outside the window, or that is over one of the
    limits `within`, is drawn again. Returns fewer than n, perhaps none, where such networks are rare.
    """
    room = high_ms - table.fixed_ms
    if room <= 0:
        return []
    width = room / bins
    steps = [np.rint(np.asarray(row) / width).astype(np.int64) for row in table.ms]
    # rounding moves a total by up to half a bin per position: include networks at the window's ends
    slack = len(steps) // 2 + 1
    last = bins + slack
    shares = [np.asarray(row) / sum(row) for row in weights or [[1.0] * len(row) for row in steps]]
    # ways[i][b]: share of the choices of positions i.. that take b bins together
    ways: list[Floats] = [np.zeros(last + 1) for _ in range(len(steps) + 1)]
    ways[-1][0] = 1.0
    for i in range(len(steps) - 1, -1, -1):
        for step, share in zip(steps[i], shares[i], strict=True):
            if step <= last:
                ways[i][step:] += share * ways[i + 1][: last + 1 - step]
    first = max(0, math.floor((low_ms - table.fixed_ms) / width) - slack)
    start = ways[0][first:]
    if start.sum() <= 0:
        return []
    found: list[CandidateIndices] = []
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
