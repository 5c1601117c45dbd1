"""The distance of limits from the budgets of a search, measured by the expected amounts."""

import numpy as np

from qnas.solver.limits import Limit, Limits
from qnas.solver.solve import Scores

# An expected amount further than this share from its limit is far from the search. A search ends within 3%
# of its budget, and exchanging one block moves a network in the middle of a shipped space by at most 7 to
# 25%, by space and device. Beyond that, several blocks must differ from those that the probabilities favour,
# and the probabilities were not learned at such a budget.
FAR = 0.25


def far_from_searched(scores: Scores, limits: Limits, *, pressed: bool) -> str | None:
    """Return a warning where limits are far from those of the search; None where they are near.

    `scores` are log probabilities. The amounts that they expect are compared with the limits. The limit
    that is exceeded most, or reached most nearly, counts, since a search holds that one at its limit. More
    than FAR above is far, and so is more than FAR below where a budget bound the search (`pressed`).
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
        "this is far from what was searched for: the probabilities of the search expect "
        f"{limit.describe(expected[at])}{on}, {off}; a search for this budget would "
        "probably find a better network"
    )


def near_searched(log_probabilities: Scores, limit: Limit, *, pressed: bool) -> tuple[float, float | None]:
    """Return the range of budgets of one limit that are near the search's; None: no upper end."""
    margin = limit.budget / limit.limit
    expected = margin * expected_amount(log_probabilities, limit)
    return expected / (1 + FAR), expected / (1 - FAR) if pressed else None


def expected_amount(log_probabilities: Scores, limit: Limit) -> float:
    """Return the expected amount of a network drawn by these probabilities."""
    shares = (np.exp(row) for row in log_probabilities)
    cells = map(np.asarray, limit.cells)
    return limit.fixed + sum(float(share @ row) for share, row in zip(shares, cells, strict=True))
