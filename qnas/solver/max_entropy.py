"""The distribution of maximum entropy over networks whose expected amounts are limited.

Of all distributions that choose at each position by itself, the one of the largest entropy has
p_i ~ exp(-sum_l strength_l cells_li / limit_l). The strengths minimise the convex dual, by L-BFGS.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

# a candidate of a hundredth of the limit is e^-10 as likely as a free one
MOST_STRENGTH = 1000.0

Floats = NDArray[np.float64]


def max_entropy_strengths(
    fixed: Floats,
    cells: Floats,
    limit: Floats,
    mask: NDArray[np.bool_],
    bounds: tuple[float, float] = (0.0, MOST_STRENGTH),
    tolerance: float = 1e-5,
) -> Floats:
    """Return the strength of each limit, (limits,).

    fixed, limit: (limits,); cells: (limits, positions, candidates), 0 where the mask (positions, candidates)
    is. A strength of at least 0 leaves a limit alone that the uniform distribution keeps; with a lower bound
    below 0 the expected amount equals the limit, as nearly as it can. `tolerance` is a share of the limit.
    """
    cells, margin = cells / limit[:, None, None], 1 - fixed / limit

    def dual(strengths: Floats) -> tuple[float, Floats]:
        tilted = np.where(mask, -np.tensordot(strengths, cells, 1), -np.inf)
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
