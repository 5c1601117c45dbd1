"""Confidence intervals of an accuracy and of its drop, from the number of images.

Score intervals: of an accuracy Wilson's (1927), of the drop between two networks on the same images Tango's
(Statistics in Medicine 17, 1998). Unlike the value plus and minus two standard errors, they stay within
their bounds, and keep their level near these ends and for a few dozen images.
"""

from math import sqrt

from scipy.optimize import brentq
from scipy.stats import binomtest, norm

LEVEL = 0.95


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95% interval of an accuracy (0 to 1) that was measured on this many images.

    The interval covers the choice of the images, not the randomness of training.

    >>> [round(end, 3) for end in wilson(0.9, 100)]
    [0.826, 0.945]
    """
    interval = binomtest(round(accuracy * images), images).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def paired_drop(lost: int, won: int, images: int) -> tuple[float, float]:
    """Return the 95% interval of the drop of an accuracy (-1 to 1), of two networks on the same images.

    `lost` images are right with the first network alone, `won` with the second alone.

    >>> [round(end, 3) for end in paired_drop(1, 0, 36)]  # one flipped image says little
    [-0.071, 0.142]
    >>> [round(end, 3) for end in paired_drop(50, 0, 1000)]
    [0.038, 0.065]
    """
    assert 0 <= lost + won <= images > 0, (lost, won, images)
    z = float(norm.ppf((1 + LEVEL) / 2))

    def excess(drop: float) -> float:
        """The squared score statistic of a drop, minus the quantile of its distribution; times images."""
        b = (2 * images - lost + won) * drop - lost - won
        ill = (sqrt(max(0.0, b * b + 8 * images * won * drop * (1 - drop))) - b) / (4 * images)  # share won
        variance = images * max(0.0, 2 * ill + drop * (1 - drop))
        return (lost - won - images * drop) ** 2 - z * z * variance

    seen = (lost - won) / images
    # an end of -1 or 1 is one without a root; the value itself is a root if all images agree
    low = brentq(excess, -1, seen - 1e-9) if excess(-1) > 0 and seen > -1 else -1.0
    high = brentq(excess, seen + 1e-9, 1) if excess(1) > 0 and seen < 1 else 1.0
    return float(low), float(high)
