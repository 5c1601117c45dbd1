from math import sqrt

import pytest

from qnas.common.intervals import wilson


@pytest.mark.parametrize(("accuracy", "images"), [(0.0, 5), (0.1, 10), (0.5, 40), (353 / 359, 359), (1.0, 3)])
def test_the_ends_solve_the_equation_of_the_score_test(accuracy: float, images: int) -> None:
    """At an end p the accuracy lies 1.96 of p's own standard errors away."""
    for end in wilson(accuracy, images):
        assert abs(accuracy - end) == pytest.approx(1.959964 * sqrt(end * (1 - end) / images), abs=1e-7)


def test_the_interval_holds_the_accuracy_and_narrows_with_images() -> None:
    for accuracy in (0.0, 0.3, 1.0):
        widths = []
        for images in (10, 100, 10_000):
            low, high = wilson(accuracy, images)
            assert 0 <= low <= accuracy <= high <= 1
            widths.append(high - low)
        assert widths == sorted(widths, reverse=True)
