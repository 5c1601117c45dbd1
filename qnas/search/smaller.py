"""What a smaller network costs, before and after it is measured.

Single changes of a network are measured on some hundred images. The differences of the losses are then as
large as their errors, and the solver takes those that look best: sizes that seem to cost nothing. But
smaller networks are worse ones. In general, the loss is about in proportion to MACs^-0.2: so are the errors
of MobileNetV2's published accuracies, from 71.8% at 224 px and 300M MACs to 60.3% at 96 px and 56M
(arXiv 1801.04381, and its reference implementation).

So before it is measured, what a change costs is assumed to be exponentially distributed, with the mean of
that law or, if it is greater, the mean of all that was measured for changes of its kind: kernels cost more
than their MACs say. Afterwards, it is the mean of the posterior under a normal error. A cost that is large
beside its error stays as it was measured; one that is not is about what the mean says, and never zero.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr
from sklearn.isotonic import isotonic_regression

POWER = 0.2  # of the loss by MACs
FAR = -30.0  # standard errors below which the tail of a normal distribution is that of an exponential one
SURE = 1e-12  # least variance of a loss

Floats = NDArray[np.float64]


def errors_of(differences: Floats) -> Floats:
    """Return the standard errors of means over images: (..., images) -> (...)."""
    found: Floats = differences.std(-1) / differences.shape[-1] ** 0.5
    return found


def assumed_costs(loss: float, saved: Floats) -> Floats:
    """Return the nats that smaller networks cost by the law of POWER, where one of this loss is made smaller.

    `saved` are the logarithms of the ratios of MACs, the whole network's to the smaller one's.
    """
    found: Floats = loss * POWER * saved
    return found


def expected_costs(measured: Floats, errors: Floats, means: Floats) -> Floats:
    """Return the mean of each cost's posterior, in nats; above zero where there is an error and a mean.

    measured, errors, means: (changes,), the last being those of exponential distributions.

    >>> expected_costs(np.array([0.3, 0.3]), np.array([0.0, 0.01]), np.array([0.1, 0.1])).round(3)
    array([0.3  , 0.299])
    >>> expected_costs(np.array([0.0, -0.1]), np.array([1.0, 0.1]), np.array([0.01, 0.1])).round(3)
    array([0.01 , 0.037])
    """
    found = np.maximum(measured, 0.0)
    open_ones = (errors > 0) & (means > 0)
    sigma, center = errors[open_ones], measured[open_ones] - errors[open_ones] ** 2 / means[open_ones]
    z = center / sigma
    density = np.exp(-(z**2) / 2 - np.log(np.sqrt(2 * np.pi)) - log_ndtr(z))
    found[open_ones] = np.where(z < FAR, sigma / np.maximum(-z, 1.0), center + sigma * density)
    found[(errors > 0) & (means <= 0)] = 0.0
    return found


def expected_losses(losses: Floats, log_macs: Floats) -> Floats:
    """Return the expected losses of one network at several layouts, which fall with the MACs.

    losses: (layouts, images), the same images for all. log_macs: (layouts,).
    """
    measured, saved = losses.mean(1), log_macs.max() - log_macs
    means = assumed_costs(float(measured.mean()), saved)
    errors = errors_of(losses - losses.mean(0))
    # all layouts tell of the loss of the one with the most MACs, those best whose cost is best known
    level = float(np.average(measured - means, weights=1 / (errors**2 + means**2 + SURE)))
    found = level + expected_costs(measured - level, errors, means)
    order: Sequence[int] = np.argsort(log_macs, kind="stable").tolist()
    falling: Floats = np.empty(len(found))
    falling[order] = isotonic_regression(found[order], increasing=False)
    return falling
