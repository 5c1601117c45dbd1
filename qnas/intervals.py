"""How sure an accuracy is, from the number of images that it was counted on.

Wilson's score interval (Wilson, 1927): unlike the accuracy plus and minus two standard errors it stays
within 0 and 1, and keeps its level near them and for a few dozen images.
"""

import math

LEVEL = 0.95
_Z = 1.959964  # standard deviations that hold this share of a normal distribution


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95% interval of an accuracy (share of 1) that was counted on so many images.

    It says how far another draw of images would move the accuracy of the same network. Training it again
    moves it too, which the interval does not hold.

    >>> [round(end, 3) for end in wilson(0.9, 100)]
    [0.826, 0.945]
    """
    assert images > 0, images
    assert 0 <= accuracy <= 1, accuracy
    spread = _Z**2 / images
    middle = (accuracy + spread / 2) / (1 + spread)
    half = math.sqrt(accuracy * (1 - accuracy) * spread + spread**2 / 4) / (1 + spread)
    # rounding must not leave 0 or 1 outside
    return min(accuracy, max(0.0, middle - half)), max(accuracy, min(1.0, middle + half))
