from math import sqrt

import numpy as np
import pytest

from qnas.common.intervals import paired_drop, wilson


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


def test_the_interval_of_a_drop_is_the_published_one() -> None:
    # airway hyper-responsiveness before and after transplantation, by Tango's method (Fagerland, Lydersen
    # and Laake, Statistics in Medicine 33, 2014)
    assert paired_drop(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=6e-4)


@pytest.mark.parametrize(
    ("lost", "won", "images"), [(1, 0, 36), (50, 0, 1000), (9, 4, 512), (0, 0, 36), (0, 7, 40)]
)
def test_the_ends_of_a_drop_solve_the_equation_of_its_score_test(lost: int, won: int, images: int) -> None:
    """At an end, the drop lies 1.96 standard errors away, by the likeliest shares with the end's drop."""
    for end in paired_drop(lost, won, images):
        least = max(0.0, -end)
        shares = np.linspace(least + 1e-9, (1 - abs(end)) / 2 + least - 1e-9, 2_000_001)  # won
        likelihood = (images - lost - won) * np.log1p(-2 * shares - end)
        likelihood += (lost * np.log(shares + end) if lost else 0) + (won * np.log(shares) if won else 0)
        share = shares[likelihood.argmax()]
        error = sqrt((2 * share + end - end**2) / images)
        assert abs((lost - won) / images - end) == pytest.approx(1.959964 * error, rel=2e-4)


def test_the_interval_of_a_drop_holds_it_for_any_counts() -> None:
    for images in (1, 2, 7, 36):
        for lost in range(images + 1):
            for won in range(images + 1 - lost):
                low, high = paired_drop(lost, won, images)
                assert -1 <= low <= (lost - won) / images <= high <= 1
                assert low < high
                assert paired_drop(won, lost, images) == pytest.approx((-high, -low), abs=1e-6)
