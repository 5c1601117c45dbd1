import itertools
import math

import numpy as np
import pytest

from qnas.latency.device import load_device
from qnas.latency.grid import AXES, Grid, locate
from qnas.latency.kernels import Kernel

SHIPPED = {kind: model.grid for kind, model in load_device("a100-eager").model.items() if model.grid}


def power_law(constant: float, exponents: dict[str, float], knots: dict[str, tuple[float, ...]]) -> Grid:
    """Return a grid with the values of constant * product of axis ** exponent."""
    points = [
        constant * math.prod(x**a for x, a in zip(p, exponents.values(), strict=True))
        for p in itertools.product(*knots.values())
    ]
    width = len(list(knots.values())[-1])
    rows = [tuple(points[i : i + width]) for i in range(0, len(points), width)]
    return Grid(knots=knots, ms=tuple(rows))


def lattice(grid: Grid) -> dict[str, list[float]]:
    """Return values of each axis: at, around and far outside of its knots."""
    axes = {}
    for axis, knots in grid.knots.items():
        inside = np.geomspace(knots[0], knots[-1], 9).tolist()
        near = [knots[0] * 0.99, knots[0] * 1.01, knots[-1] * 0.99, knots[-1] * 1.01]
        axes[axis] = sorted([*inside, *near, 1.0, knots[0] / 100, 10 * knots[-1], 1e4 * knots[-1]])
    return axes


def test_a_power_law_is_interpolated_exactly() -> None:
    exponents = {"rows": 1.0, "fan_in": 0.5, "channels": 0.25}
    grid = power_law(3e-3, exponents, {"rows": (1, 7, 50), "fan_in": (2, 90), "channels": (1, 3, 4, 60)})
    rng = np.random.default_rng(0)
    for _ in range(100):
        point = {axis: math.exp(rng.uniform(*np.log([k[0], k[-1]]))) for axis, k in grid.knots.items()}
        expected = 3e-3 * math.prod(point[axis] ** a for axis, a in exponents.items())
        assert grid.at(point) == pytest.approx(expected, rel=1e-9)


def test_a_grid_returns_its_values_at_its_knots() -> None:
    for grid in SHIPPED.values():
        points = list(itertools.product(*grid.knots.values()))
        values = [value for row in grid.ms for value in row]
        for point, value in list(zip(points, values, strict=True))[::7]:
            assert grid.at(dict(zip(grid.knots, point, strict=True))) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", SHIPPED)
def test_latency_never_falls_along_an_axis_and_is_never_below_the_floor(kind: str) -> None:
    grid = SHIPPED[kind]
    axes = lattice(grid)
    rng = np.random.default_rng(0)
    for _ in range(300):
        point = {axis: values[rng.integers(len(values))] for axis, values in axes.items()}
        for axis, values in axes.items():
            times = [grid.at({**point, axis: value}) for value in values]
            assert times == sorted(times), (point, axis)
            assert times[0] >= grid.floor_ms


@pytest.mark.parametrize("kind", SHIPPED)
def test_latency_does_not_jump_at_a_knot(kind: str) -> None:
    grid = SHIPPED[kind]
    rng = np.random.default_rng(0)
    axes = lattice(grid)
    for axis, knots in grid.knots.items():
        for knot in knots:
            point = {a: values[rng.integers(len(values))] for a, values in axes.items()}
            below, above = (grid.at({**point, axis: knot * (1 + step)}) for step in (-1e-9, 1e-9))
            assert below == pytest.approx(above, rel=1e-6), (point, axis, knot)


@pytest.mark.parametrize("kind", SHIPPED)
def test_far_beyond_the_grid_latency_grows_as_the_work(kind: str) -> None:
    grid = SHIPPED[kind]
    far = {axis: 1e4 * knots[-1] for axis, knots in grid.knots.items()}
    axis = "elements" if kind not in ("linear", "conv", "layernorm") else "rows"
    assert grid.at({**far, axis: 2 * far[axis]}) == pytest.approx(2 * grid.at(far), rel=0.01)


def test_beyond_the_grid_products_grow_from_where_it_ends() -> None:
    grid = Grid(
        knots={"rows": (2, 4), "channels": (3, 5)},
        ms=((1, 1), (1, 7)),
        beyond={"rows*channels": 0.5, "rows": 0.25},
    )
    assert grid.at({"rows": 4, "channels": 5}) == 7
    assert grid.at({"rows": 10, "channels": 5}) == pytest.approx(7 + 0.5 * (50 - 20) + 0.25 * 6)
    assert grid.at({"rows": 10, "channels": 8}) == pytest.approx(7 + 0.5 * (80 - 20) + 0.25 * 6)
    # below the first knot of the other axis: as at that knot
    assert grid.at({"rows": 10, "channels": 1}) == pytest.approx(1 + 0.5 * (30 - 12) + 0.25 * 6)
    assert grid.at({"rows": 1, "channels": 1}) == grid.floor_ms == 1


def test_a_value_is_located_in_its_cell() -> None:
    knots = (1.0, 4.0, 64.0)
    assert locate(1.0, knots) == (0, 0.0)
    assert locate(2.0, knots) == (0, 0.5)
    assert locate(4.0, knots)[0] + locate(4.0, knots)[1] == 1.0
    assert locate(16.0, knots) == (1, 0.5)
    assert locate(64.0, knots) == (1, 1.0)


def test_axes_count_what_their_names_say() -> None:
    conv = Kernel("conv", 14, 20, 200, 3, 2, batch=5)  # 7 px out
    assert AXES["rows"](conv) == 5 * 49
    assert AXES["fan_in"](conv) == 9 * 20
    assert AXES["channels"](conv) == 200
    assert AXES["elements"](conv) == 5 * 14 * 14 * 20
    # 5 images of 2 x 2 tiles of 4 pixels are one block of 128 tiles; 200 channels are two of 128
    assert AXES["winograd_blocks"](conv) == 2
    assert AXES["winograd_blocks"](Kernel("conv", 48, 20, 128, 3)) == 2  # 144 tiles
    assert AXES["rows"](Kernel("linear", 1, 20, 200, batch=5)) == 5


def test_no_axis_falls_as_a_kernel_grows() -> None:
    sizes = {
        "resolution_px": range(1, 60),
        "c_in": range(1, 60),
        "c_out": range(1, 300),
        "batch": range(1, 60),
    }
    for name, axis in AXES.items():
        for field, values in sizes.items():
            shape = {"resolution_px": 9, "c_in": 30, "c_out": 30, "batch": 3}
            counts = [axis(Kernel("conv", kernel=3, **{**shape, field: value})) for value in values]
            assert counts == sorted(counts), (name, field)
