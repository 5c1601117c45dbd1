"""The arch.json of a solution, with the certificate that a reader can check."""

from collections.abc import Mapping
from typing import Any

from qnas.solver.limits import Limit
from qnas.solver.solve import Solution
from qnas.spaces.arch import arch_document, arch_from_indices
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace


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
