"""The exact solve: the best networks within all limits.

The score of a network is the sum of its candidates' scores: the measured effects (`search.effects`) or the
logarithms of the probabilities. The solve is therefore a multiple-choice knapsack problem, which maximises
a sum of scores under limits on sums of amounts; `knapsack` solves it with proof. The positions of identities
in a stage do not change a network (`block_order`), so `solve_best` counts them once, with the highest score.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qnas.common.errors import ArchError, InfeasibleBudgetError
from qnas.latency.intervals import Interval
from qnas.solver.kinds import kinds_of, names_of, places_of, places_with_blocks, take
from qnas.solver.knapsack import k_best
from qnas.solver.limits import Limit, Limits, check_limits, count_limit
from qnas.spaces.arch import arch_document, arch_from_indices
from qnas.spaces.block_order import Labels, block_labels
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace

SOLVER = "qnas.knapsack"
K_BEST = 20  # solutions, to be ranked on held-out images
BISECTIONS = 12  # of the range of MACs, for the network that MACs alone would choose

Scores = tuple[tuple[float, ...], ...]  # [position][candidate]
CandidateIndices = tuple[int, ...]  # a network: the candidate's number at each position


@dataclass(frozen=True)
class Solution:
    """A network with the proof of its rank."""

    indices: CandidateIndices
    score: float  # sum of the chosen candidates' scores
    limits: Limits  # that it meets
    bound: float  # no network within the limits has a higher score than this
    rank: int = 1  # by score, from 1
    solved: int = 1  # number of solutions, this one included
    # the kinds of blocks among whose networks the bound and the rank hold; none: among all networks
    kinds: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()  # likewise, from 1: those that have a block in each of these networks

    @property
    def latency_ms(self) -> float:
        """Return the predicted latency on the first device."""
        return self.limits[0].latency_ms(self.indices)


def solve(scores: Scores, limits: Limits) -> Solution:
    """Return the network with the highest total score that is within all limits.

    Its amounts, summed as in `Limit.amount`, are within every limit. Its score differs from the best by at
    most 1e-9 of the scores' range. Raises InfeasibleBudgetError when there is none.
    """
    every = tuple(tuple(range(1, 1 + len(row))) for row in scores)
    return _solutions(scores, limits, 1, every)[0]


def check_feasible(limits: Limits) -> None:
    """Raise InfeasibleBudgetError, with the reason, if no network meets all the limits at once."""
    # the network with the smallest sum of its shares of all limits
    pressure = sum(np.concatenate([np.asarray(row) for row in limit.cells]) / limit.limit for limit in limits)
    ends = np.cumsum([len(row) for row in limits[0].cells])[:-1]
    solve(tuple(tuple((-part).tolist()) for part in np.split(np.asarray(pressure), ends)), limits)


def solve_best(
    space: SearchSpace,
    scores: Scores,
    limits: Limits,
    k: int = K_BEST,
    kinds: tuple[str, ...] = (),
    stages: tuple[int, ...] = (),
    floor: float = -math.inf,
) -> tuple[Solution, ...]:
    """Return the k best networks within all limits, best first, or fewer if there are fewer.

    All are different: placements of identities that give the same network count once, with the best
    score. With `kinds`, they are the best among the networks whose blocks are of these kinds, wherever a
    position has a candidate of them or an identity (`kinds.places_of`); with `stages`, counted from 1, among
    those that have a block in each of these. Networks that score less than `floor` may be missing. Raises
    InfeasibleBudgetError when there is none.
    """
    labels = block_labels(space)
    if not kinds and not stages:
        return _solutions(scores, limits, k, labels, floor)
    every = kinds_of(space)
    places = places_with_blocks(space, places_of(every, kinds or names_of(every)), stages)
    fewer = tuple(replace(limit, cells=take(limit.cells, places)) for limit in limits)
    found = _solutions(take(scores, places), fewer, k, take(labels, places), floor)
    return tuple(
        replace(
            each,
            indices=tuple(own[i] for own, i in zip(places, each.indices, strict=True)),
            limits=limits,
            kinds=kinds,
            stages=stages,
        )
        for each in found
    )


def _solutions(
    scores: Scores, limits: Limits, k: int, labels: Labels, floor: float = -math.inf
) -> tuple[Solution, ...]:
    check_limits(limits)
    found = k_best(scores, limits, k, labels, floor)
    if not found.networks and floor > -math.inf:
        return ()
    if not found.networks:
        wanted = " and ".join(f"{limit.name} {limit.describe(limit.budget)}" for limit in limits)
        raise InfeasibleBudgetError(
            f"found no network within {wanted} at once, though each is possible alone: raise one limit"
        )
    bound = max(found.scores[0], found.left_out)
    return tuple(
        Solution(network, score, limits, bound, rank, len(found.networks))
        for rank, (network, score) in enumerate(zip(found.networks, found.scores, strict=True), 1)
    )


def macs_guided(space: SearchSpace, scores: Scores, limits: Limits) -> Solution | None:
    """Return the network that MACs alone would choose within these limits; None if there is none.

    The devices' limits are replaced by one on MACs: the largest whose solution meets the devices' limits too,
    found by bisection to a 4096th of the range. Where MACs order networks as the devices do, this is the
    derived network itself. Its limits and bound are those of the solve under MACs.
    """
    devices = [limit for limit in limits if limit.table is not None]
    counts = [limit for limit in limits if limit.table is None]
    macs = count_limit(space, "macs", math.inf)

    def solve_under(most: float) -> Solution | None:
        try:
            solution = solve(scores, (replace(macs, budget=most, limit=most), *counts))
        except InfeasibleBudgetError:
            return None
        return solution if all(d.amount(solution.indices) <= d.limit for d in devices) else None

    low, high = macs.least, macs.most
    if best := solve_under(high):
        return best
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if found := solve_under(middle):
            low, best = middle, found
        else:
            high = middle
    return best or solve_under(macs.least)


def largest(space: SearchSpace, limits: Limits) -> Solution:
    """Return the network with the most MACs within all limits; its score is their number."""
    return solve(count_limit(space, "macs", math.inf).cells, limits)


def check_searchable(space: SearchSpace, limits: Limits) -> None:
    """Raise an error, before training, for a space of one network and for limits that no network meets."""
    check_has_choice(space)
    check_feasible(limits)


def check_has_choice(space: SearchSpace) -> None:
    """Raise ArchError for a space of one network."""
    if space.is_fixed:
        raise ArchError(f"space {space.name} has one network only: there is nothing to search")


def solution_document(space: SearchSpace, solution: Solution, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the arch.json of a solution, with a certificate that a reader can check.

    The prediction is the sum of the certificate's `fixed_ms` and `position_ms` and at most `limit_ms`, the
    budget over 1 + margin. These are for the first device; `limits` has the same for each limit: `amount`,
    the sum of `fixed` and `positions`, is at most `limit`. With a confidence, these are upper ends. Of a
    network that is the best only of some kinds of blocks, or of those with blocks in some stages, the
    certificate names these (`kinds`, `stages`).
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
            "limits": [limit_entry(each, solution.indices) for each in solution.limits],
            "certificate": {
                "solver": SOLVER,
                "score": solution.score,
                "score_bound": solution.bound,
                "rank": solution.rank,
                "solved": solution.solved,
                "fixed_ms": limit.fixed,
                "position_ms": [row[i] for row, i in zip(limit.cells, solution.indices, strict=True)],
                "fastest_ms": limit.least,
                "slowest_ms": limit.most,
                **({"kinds": list(solution.kinds)} if solution.kinds else {}),
                **({"stages": list(solution.stages)} if solution.stages else {}),
            },
            **details,
        },
    )


def entry_latency_ms(entry: Mapping[str, Any]) -> float:
    """Return the predicted latency in an entry of `limits`, whose amount may be that of an upper end."""
    return float(entry.get("latency_ms", entry["amount"]))


def entry_interval(entry: Mapping[str, Any]) -> Interval | None:
    """Return the interval in an entry of `limits`; None where there is none."""
    found = entry.get("interval")
    return None if found is None else Interval(found["low_ms"], found["high_ms"], found["level"])


def limit_entry(limit: Limit, indices: tuple[int, ...]) -> dict[str, Any]:
    """Return a network's entry in the `limits` of its arch.json."""
    table = limit.table
    of_device: dict[str, Any] = {}
    if table is not None:
        of_device = {"table_digest": table.digest, "coverage": table.coverage(indices)}
        if table.copy_digest != table.digest:
            of_device["copy_digest"] = table.copy_digest
        if limit.throughput:
            of_device["quantity"] = "throughput"
        if (interval := limit.interval(indices)) is not None:
            assert table.uncertainty is not None
            errors = table.uncertainty.at(interval.level)
            factors = {"low": errors.low, "high": errors.high, "weight": table.uncertainty.weight}
            of_device["interval"] = vars(interval) | factors
        if limit.confidence is not None:
            of_device |= {"confidence": limit.confidence, "latency_ms": table.latency_ms(indices)}
    if limit.energy_of:  # no file of the run has its cells
        of_device = {"cells": [list(row) for row in limit.cells], "cells_digest": limit.cells_digest}
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
