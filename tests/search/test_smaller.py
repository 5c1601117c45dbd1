"""What smaller networks cost, by what is known beforehand and what was measured."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from qnas.search.smaller import assumed_costs, errors_of, expected_costs, expected_losses

# MobileNetV2 at 224, 192, 160, 128 and 96 px: MACs in millions, top-1 errors of its reference implementation
MACS = np.array([300.0, 221, 154, 99, 56])
ERRORS = np.array([28.2, 29.3, 31.2, 34.7, 39.7])


def test_the_law_is_that_of_published_networks() -> None:
    costs = assumed_costs(ERRORS[0], np.log(MACS[0] / MACS))
    assert costs[0] == 0
    np.testing.assert_allclose(ERRORS[0] + costs, ERRORS, rtol=0.06)


@pytest.mark.parametrize("mean", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("error", [0.01, 0.05])
@pytest.mark.parametrize("measured", [-0.1, 0.0, 0.02, 0.2])
def test_a_cost_is_the_mean_of_its_posterior(measured: float, error: float, mean: float) -> None:
    def density(cost: float) -> float:
        return float(np.exp(norm.logpdf(measured, cost, error) + 20 - cost / mean))

    limits = {"a": 0, "b": max(measured, 0) + 12 * error, "epsabs": 0, "limit": 200}
    expected = quad(lambda cost: cost * density(cost), **limits)[0] / quad(density, **limits)[0]
    (found,) = expected_costs(np.array([measured]), np.array([error]), np.array([mean]))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found > 0


def test_far_from_what_was_measured_the_assumption_decides() -> None:
    # 40 standard errors below zero once the slope of the assumption is taken off
    (found,) = expected_costs(np.array([0.0]), np.array([1.0]), np.array([1 / 40]))
    assert found == pytest.approx(1 / 40, rel=0.01)
    # no error: as measured, and never below zero; no mean: nothing is assumed to cost anything
    zeros = np.zeros(2)
    assert expected_costs(np.array([0.3, -0.3]), zeros, zeros + 0.1).tolist() == [0.3, 0.0]
    assert expected_costs(np.array([0.3, -0.3]), zeros + 0.1, zeros).tolist() == [0.0, 0.0]


def test_errors_are_those_of_means_over_images() -> None:
    assert errors_of(np.array([[1.0, -1.0, 1.0, -1.0], [2.0, 2.0, 2.0, 2.0]])).tolist() == [0.5, 0.0]


def test_noise_between_layouts_is_not_taken_for_a_gain() -> None:
    rng = np.random.default_rng(0)
    log_macs = np.log([100.0, 140, 200, 260])
    truth = 1 + 0.2 * (log_macs.max() - log_macs)
    means, found = [], []
    for _ in range(50):
        noisy = truth[:, None] + rng.normal(0, 1.0, (4, 128))
        means.append(noisy.mean(1))
        found.append(expected_losses(noisy, log_macs))
        assert (np.diff(found[-1]) <= 1e-12).all()  # more MACs are no worse
    assert np.square(np.array(found) - truth).mean() < 0.5 * np.square(np.array(means) - truth).mean()
    # with many images, what was measured counts
    steep = np.array([3.0, 2.0, 1.5, 1.0])[:, None] + rng.normal(0, 0.01, (4, 1000))
    np.testing.assert_allclose(expected_losses(steep, log_macs) - steep.mean(1), 0, atol=0.1)


def test_layouts_may_come_in_any_order() -> None:
    rng = np.random.default_rng(1)
    losses, log_macs = rng.normal(1, 0.1, (5, 64)), np.log([5.0, 3, 1, 4, 2])
    order = np.argsort(log_macs)
    np.testing.assert_allclose(
        expected_losses(losses, log_macs)[order], expected_losses(losses[order], log_macs[order])
    )
