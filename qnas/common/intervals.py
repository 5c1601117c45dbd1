"""Confidence intervals of an accuracy, from the number of images that it was measured on.

Wilson's score interval (Wilson, 1927): unlike the accuracy plus and minus two standard errors, it stays
within 0 and 1, and keeps its level near these ends and for a few dozen images.
"""

from scipy.stats import binomtest

LEVEL = 0.95


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95% interval of an accuracy (0 to 1) that was measured on this many images.

    The interval covers the choice of the images, not the randomness of training.

    >>> [round(end, 3) for end in wilson(0.9, 100)]
    [0.826, 0.945]
    """
    interval = binomtest(round(accuracy * images), images).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
