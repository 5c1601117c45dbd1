import math
from pathlib import Path

import numpy as np
import pytest
from fitting.operators import PLANS, Plan, fit_grid, fit_operators, held_out, read_operators
from helpers.places import LATENCY_DATA

from qnas.common.errors import TableError
from qnas.latency.device import load_device
from qnas.latency.evaluation import figures
from qnas.latency.kernels import Kernel

DATA = LATENCY_DATA / "a100_ops.csv"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="the measurements are not here")

HEADER = "op,batch,m_or_hw,n_or_c_out,k_or_c_in,kernel,stride,latency_ms,device\n"


def linears(count: int) -> list[Kernel]:
    rng = np.random.default_rng(0)
    shapes = np.exp(rng.uniform(np.log(4), np.log(4000), (count, 3))).round().astype(int).tolist()
    return [Kernel("linear", 1, c_in, c_out, batch=rows) for rows, c_in, c_out in shapes]


def test_a_fit_recovers_the_power_law_that_made_the_data() -> None:
    def law(k: Kernel) -> float:
        return 2e-3 * float(k.batch**0.75 * k.c_in**0.5 * k.c_out**0.25)

    kernels = linears(600)
    grid = fit_grid(kernels[:500], np.array([law(k) for k in kernels[:500]]), PLANS["linear"])
    inside = [k for k in kernels[500:] if all(8 < n < 2000 for n in (k.batch, k.c_in, k.c_out))]
    assert len(inside) > 20
    for kernel in inside:
        assert grid.latency_ms(kernel) == pytest.approx(law(kernel), rel=0.002)


def test_a_fit_follows_a_launch_floor_and_a_roofline() -> None:
    def law(k: Kernel) -> float:
        return 0.05 + 1e-9 * k.batch * k.c_in * k.c_out

    kernels = linears(3000)
    latency = np.array([law(k) for k in kernels])
    grid = fit_grid(kernels[:2500], latency[:2500], PLANS["linear"])
    found = figures(np.array([grid.latency_ms(k) for k in kernels[2500:]]), latency[2500:])
    assert found.within_10_pct > 99
    assert grid.floor_ms == pytest.approx(0.05, rel=0.02)
    # a hundred times the rows: from the slope of the largest operators, not from a knot
    beyond = Kernel("linear", 1, 2000, 2000, batch=400_000)
    assert grid.latency_ms(beyond) == pytest.approx(law(beyond), rel=0.05)


def test_a_fit_never_falls_though_the_data_do() -> None:
    rng = np.random.default_rng(0)
    kernels = [Kernel("relu", 1, c, c) for c in range(1, 2000)]
    falling = np.array([1 / (1 + 0.01 * k.c_in) * rng.uniform(0.5, 2) for k in kernels])
    grid = fit_grid(kernels, falling, PLANS["relu"])
    times = [grid.latency_ms(k) for k in kernels]
    assert times == sorted(times)


def test_no_prediction_is_below_the_least_that_was_measured() -> None:
    # a steep law on few shapes, so that corners of the grid lie far from any of them
    kernels = linears(60)
    latency = np.array([1e-6 * k.batch**1.5 * k.c_in * k.c_out for k in kernels])
    grid = fit_grid(kernels, latency, PLANS["linear"])
    assert grid.floor_ms >= float(latency.min()) * (1 - 5e-4)


def test_a_far_miss_does_not_move_the_rest() -> None:
    kernels = [Kernel("relu", 1, c, c) for c in range(1, 3000)]
    latency = np.full(len(kernels), 2.0)
    latency[::20] = 10.0  # a twentieth is five times slower
    grid = fit_grid(kernels, latency, PLANS["relu"])
    times = np.array([grid.latency_ms(k) for k in kernels])
    assert np.median(np.abs(times / 2.0 - 1)) < 0.02


def test_a_smoother_plan_bends_less() -> None:
    rng = np.random.default_rng(0)
    kernels = [Kernel("relu", 1, c, c) for c in range(1, 3000)]
    latency = np.array([k.c_in * math.exp(rng.normal(0, 0.3)) for k in kernels])

    def bend(smoothness: float) -> float:
        grid = fit_grid(kernels, latency, Plan({"elements": 30}, smoothness, "elements"))
        slopes = np.diff(np.log(grid.ms[0])) / np.diff(np.log(grid.knots["elements"]))
        return float(np.abs(np.diff(slopes)).sum())

    assert bend(10.0) < 0.5 * bend(1e-6)


def test_operators_are_read_with_their_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a100_ops.csv"
    path.write_text(
        HEADER
        + "linear,1,58,13,141,1,1,0.0545,a\n"
        + "conv,2,14,984,14,3,1,0.088,a\n"
        + "ln,60,,512,512,1,1,0.05,a\n"
    )
    kernels, latency = read_operators(path)
    assert kernels == [
        Kernel("linear", 1, 141, 13, batch=58),
        Kernel("conv", 14, 14, 984, 3, 1, 2),
        Kernel("layernorm", 1, 512, 512, batch=60),
    ]
    assert latency.tolist() == [0.0545, 0.088, 0.05]


def test_absent_measurements_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file, expected the measured operators"):
        read_operators(tmp_path / "a100_ops.csv")


def test_every_operator_of_other_graphs_costs_at_least_a_launch() -> None:
    device = load_device("a100-eager")
    launch = min(m.grid.floor_ms for m in device.model.values() if m.grid)
    for kind in (
        *("maxpool", "avgpool", "gap", "concat", "split", "reshape", "transpose", "sigmoid", "swish"),
        *(
            "hsigmoid",
            "hswish",
            "add_scalar",
            "mul_scalar",
            "scale",
            "sub",
            "elementwise",
            "batchnorm",
            "clip",
        ),
        *("dwconv",),
    ):
        assert device.model[kind].kind == "estimated"
        assert device.kernel_ms(Kernel(kind, 1, 1, 1)) >= launch


def test_a_depthwise_estimate_is_a_launch_and_its_bytes() -> None:
    device = load_device("a100-eager")
    linear = device.model["linear"].grid
    assert linear is not None
    for px, channels, kernel, stride in ((56, 96, 3, 1), (56, 96, 7, 2), (7, 1152, 5, 1)):
        out_px = -(-px // stride)
        read_and_written = 4 * channels * (px**2 + out_px**2 + kernel**2)
        expected = linear.floor_ms + read_and_written / 1.3e12 * 1e3
        found = device.kernel_ms(Kernel("dwconv", px, channels, channels, kernel, stride))
        assert found == pytest.approx(expected, rel=1e-5)


@needs_data
def test_the_shipped_grids_are_as_accurate_as_they_say() -> None:
    device = load_device("a100-eager")
    kernels, latency = read_operators(DATA)
    unseen = np.flatnonzero(held_out(len(kernels))).tolist()
    predicted = np.array([device.kernel_ms(kernels[i]) for i in unseen])
    kinds = np.array([kernels[i].kind for i in unseen])
    said = device.accuracy["unseen operators"]
    assert set(said) == set(kinds.tolist())
    for kind, figure in said.items():
        rows = kinds == kind
        assert figures(predicted[rows], latency[unseen][rows]) == figure
    least = {
        "linear": 86,
        "layernorm": 98,
        "conv": 41,
        "gelu": 98,
        "relu": 99,
        "add": 99,
        "mul": 99,
    }
    for kind, share in least.items():
        assert said[kind].within_10_pct >= share


@needs_data
def test_a_fit_gives_the_shipped_grids_again() -> None:
    grids, accuracy = fit_operators(*read_operators(DATA))
    device = load_device("a100-eager")
    assert {kind: model.grid for kind, model in device.model.items() if model.grid} == grids
    assert device.accuracy["unseen operators"] == accuracy["unseen operators"]
