import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import entr, softmax

from qnas.solver.distributions import max_entropy_strengths

RNG = np.random.default_rng(0)
MASK = np.array([[True, True, True], [True, True, False], [True, True, True]])
CELLS = RNG.uniform(0.2, 3.0, (2, 3, 3)) * MASK
FIXED = np.array([1.0, 2.0])


def distribution(strengths: NDArray[np.float64], limit: NDArray[np.float64]) -> NDArray[np.float64]:
    tilt = np.tensordot(strengths, CELLS / limit[:, None, None], 1)
    return np.asarray(softmax(np.where(MASK, -tilt, -np.inf), axis=1))


def expected(p: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(FIXED + (p * CELLS).sum((1, 2)))


@pytest.mark.parametrize("share", [0.5, 0.8, 1.2])
def test_no_distribution_within_the_limits_has_more_entropy(share: float) -> None:
    uniform = MASK / MASK.sum(1, keepdims=True)
    least = FIXED + np.where(MASK, CELLS, np.inf).min(2).sum(1)
    limit = least + share * (expected(uniform) - least) + [0.0, 0.3]
    p = distribution(max_entropy_strengths(FIXED, CELLS, limit, MASK), limit)
    assert (expected(p) <= limit * (1 + 1e-4)).all()
    found = minimize(
        lambda logits: -entr(softmax(np.where(MASK, logits.reshape(3, 3), -np.inf), axis=1)).sum(),
        np.zeros(9),
        method="SLSQP",
        constraints={
            "type": "ineq",
            "fun": lambda logits: (
                limit - expected(softmax(np.where(MASK, logits.reshape(3, 3), -np.inf), axis=1))
            ),
        },
    )
    assert entr(p).sum() == pytest.approx(-found.fun, abs=1e-3)
    if share > 1:
        np.testing.assert_allclose(p, uniform, atol=1e-9)


@pytest.mark.parametrize("share", [0.3, 1.4])
def test_with_negative_strengths_the_expected_amount_is_the_limit(share: float) -> None:
    uniform = MASK / MASK.sum(1, keepdims=True)
    least = FIXED + np.where(MASK, CELLS, np.inf).min(2).sum(1)
    limit = least + share * (expected(uniform) - least)
    strengths = max_entropy_strengths(
        FIXED[:1], CELLS[:1], limit[:1], MASK, bounds=(-1e4, 1e4), tolerance=1e-9
    )
    p = softmax(np.where(MASK, -strengths[0] * CELLS[0] / limit[0], -np.inf), axis=1)
    assert expected(p)[0] == pytest.approx(limit[0], rel=1e-8)
    assert bool(strengths[0] < 0) is (share > 1)
