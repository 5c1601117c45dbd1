"""Synthetic tasks for efficiency.py: points of two classes in the plane, and functions of several variables.

Inputs have mean 0 and a variance of about 1 in every coordinate. Classes are exactly balanced. Targets of
regression have mean 0 and variance 1, so that the mean squared error of the best constant is 1. A function is
the same in every call; only the points are drawn.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SIDE = 3**0.5  # coordinates uniform in [-SIDE, SIDE] have variance 1
DISC = 2.0  # points uniform in a disc of this radius have variance 1 in each coordinate
RINGS = 2  # of each class
TURNS, SPIRAL_NOISE = 1.5, 0.05
VARIABLES = 6  # of the polynomials
BARRON_VARIABLES, RIDGES, FREQUENCY = 10, 100, 0.5
RADIAL_VARIABLES, SWING = 10, 2.0
FIXED_BY = 0  # the seed of the functions' coefficients
STANDARDISED_ON = 100_000  # points, for the mean and variance of a function


@dataclass(frozen=True)
class Task:
    """A task by name: `draw(rng, count)` returns points (count, variables) and what to predict, (count,).

    That is a class, 0 or 1, with two `outputs`, or a number with one.
    """

    name: str
    variables: int
    outputs: int
    draw: Callable[[np.random.Generator, int], tuple[Floats, NDArray[Any]]]

    @property
    def is_regression(self) -> bool:
        """Whether a number is to be predicted."""
        return self.outputs == 1

    @property
    def guess(self) -> float:
        """The error without looking at the point: of a class, or the squared error of the mean."""
        return 1.0 if self.is_regression else 0.5

    @property
    def digest(self) -> str:
        """The identity of the task: some of its points and what to predict for them."""
        points, wanted = self.draw(np.random.default_rng(FIXED_BY), 8)
        content = json.dumps([points.round(4).tolist(), wanted.round(4).tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def half_and_half(count: int) -> NDArray[np.int64]:
    """Return classes 0 and 1 in turn."""
    return np.arange(count) % 2


def draw_xor(rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[Any]]:
    """Draw points of a square, whose class says whether both coordinates have one sign."""
    labels = half_and_half(count)
    signs = rng.choice([-1.0, 1.0], count)
    points = rng.uniform(0, SIDE, (count, 2))
    points *= np.stack([signs, np.where(labels == 1, signs, -signs)], 1)
    return points, labels


def draw_circles(rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[Any]]:
    """Draw points of a disc, cut into rings of equal area that belong to both classes in turn."""
    labels = half_and_half(count)
    area = (labels + 2 * rng.integers(RINGS, size=count) + rng.random(count)) / (2 * RINGS)
    return on_circle(DISC * np.sqrt(area), rng.uniform(0, 2 * np.pi, count)), labels


def draw_spirals(rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[Any]]:
    """Draw points near two spirals, each the other turned by half a circle."""
    labels = half_and_half(count)
    along = np.sqrt(rng.random(count))  # so that points are as dense outside as inside
    points = on_circle(DISC * along, 2 * np.pi * (TURNS * along + labels / 2))
    return points + SPIRAL_NOISE * rng.standard_normal((count, 2)), labels


def on_circle(radius: Floats, angle: Floats) -> Floats:
    """Return points of the plane by radius and angle."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


@cache
def polynomial(degree: int) -> Callable[[Floats], Floats]:
    """Return a polynomial of this degree with random coefficients, of points (count, VARIABLES).

    It is a sum of all products of Legendre polynomials whose degrees add up to `degree`. Those are
    orthonormal on the cube, so the coefficients (a random unit vector) give variance 1, and no polynomial of
    a lower degree explains any of it.
    """
    terms = list(combinations_with_replacement(range(VARIABLES), degree))
    powers = np.array([np.bincount(term, minlength=VARIABLES) for term in terms])
    weights = np.random.default_rng([FIXED_BY, degree]).standard_normal(len(terms))
    weights /= np.linalg.norm(weights)

    def value(points: Floats) -> Floats:
        # (count, variables, degree + 1), each column of the last dimension with variance 1
        basis = legendre.legvander(points / SIDE, degree) * np.sqrt(2 * np.arange(degree + 1) + 1)
        columns = np.arange(VARIABLES)
        return np.array([basis[:, columns, power].prod(1) for power in powers]).T @ weights

    return value


@cache
def barron() -> Callable[[Floats], Floats]:
    """Return a function of a small Barron norm (Barron 1993): a mean of random waves over all variables."""
    rng = np.random.default_rng([FIXED_BY, RIDGES])
    directions = FREQUENCY * rng.standard_normal((RIDGES, BARRON_VARIABLES))
    phases, weights = rng.uniform(0, 2 * np.pi, RIDGES), rng.standard_normal(RIDGES)

    def value(points: Floats) -> Floats:
        return np.cos(points @ directions.T + phases) @ weights

    return standardised(value, BARRON_VARIABLES)


@cache
def radial() -> Callable[[Floats], Floats]:
    """Return a wave of the distance from the centre: one quadratic neuron and a function of one variable."""
    spread = math.sqrt(0.8 * RADIAL_VARIABLES)  # the variance of a square of a uniform coordinate is 9/5 - 1

    def value(points: Floats) -> Floats:
        return np.sin(SWING * ((points**2).sum(1) - RADIAL_VARIABLES) / spread)

    return standardised(value, RADIAL_VARIABLES)


def standardised(function: Callable[[Floats], Floats], variables: int) -> Callable[[Floats], Floats]:
    """Return a function shifted and scaled to mean 0 and variance 1 on the cube."""
    rng = np.random.default_rng([FIXED_BY, variables])
    seen = function(rng.uniform(-SIDE, SIDE, (STANDARDISED_ON, variables)))
    mean, spread = seen.mean(), seen.std()
    return lambda points: (function(points) - mean) / spread


def regression(name: str, variables: int, function: Callable[[], Callable[[Floats], Floats]]) -> Task:
    """Return the task of learning a function from its values at points of the cube."""

    def draw(rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[Any]]:
        points = rng.uniform(-SIDE, SIDE, (count, variables))
        return points, function()(points)

    return Task(name, variables, 1, draw)


TASKS = {
    task.name: task
    for task in (
        Task("xor", 2, 2, draw_xor),
        Task("circles", 2, 2, draw_circles),
        Task("spirals", 2, 2, draw_spirals),
        *(regression(f"polynomial-{p}", VARIABLES, lambda p=p: polynomial(p)) for p in (2, 3, 4)),
        regression("barron", BARRON_VARIABLES, barron),
        regression("radial", RADIAL_VARIABLES, radial),
    )
}
