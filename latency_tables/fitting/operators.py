"""The fit of a device's model to operators timed one by one: one monotone, smooth grid for each kind.

The values are found by penalised least squares on the logarithm of the latency: linear between the
knots (`latency.grid`), with a penalty on second differences and a strong penalty on falling steps;
falling steps that remain are raised. Large errors are weighted down in inverse proportion to their size:
libraries switch algorithms from shape to shape, and a few outliers must not move the other values.

The fourth axis of a convolution is the number of blocks in Winograd's algorithm: it explains more of
the measured latencies than any other count of blocks (tiles of 1, 2 and 4 pixels, blocks of 32 to
256, waves over the processors) on a quarter of the training part. The remaining errors are jumps: of two
measured 3x3 convolutions that differ by less than 10% in shape, 43% differ by more than 10% in time.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import splu

from fitting.fit import HELD_OUT, SEED
from qnas.common.errors import TableError
from qnas.latency.device import Figures
from qnas.latency.evaluation import figures
from qnas.latency.grid import AXES, Grid, locate
from qnas.latency.kernels import Kernel

Array = npt.NDArray[np.float64]

BYTES_PER_MS = 1.3e9  # measured bandwidth of elementwise operators on the A100 (1.3 TB/s)
MS_PER_ELEMENT = 4 / BYTES_PER_MS  # float32

_ROBUST = 0.05  # relative error above which an error counts linearly, not squared
_MONOTONE = 1e3  # penalty of a falling step


@dataclass(frozen=True)
class Plan:
    """The grid of a kind: the number of knots of each axis, its smoothness, and its growth beyond the knots.

    `work` is the product of axes that determines the latency beyond the grid, at the time per unit of the
    largest measured operators; each of `moved` counts elements that are read or written.
    """

    knots: Mapping[str, int]
    smoothness: float
    work: str
    moved: tuple[str, ...] = ()


_ELEMENTWISE = Plan({"elements": 60}, 1e-3, "elements")
_MATRIX = ("rows*fan_in", "rows*channels", "fan_in*channels")

PLANS: dict[str, Plan] = {
    "linear": Plan({"rows": 10, "fan_in": 10, "channels": 10}, 0.01, "rows*fan_in*channels", _MATRIX),
    "conv": Plan(
        {"winograd_blocks": 6, "rows": 5, "fan_in": 5, "channels": 5}, 0.1, "rows*fan_in*channels", _MATRIX
    ),
    "layernorm": Plan({"rows": 20, "channels": 12}, 0.01, "rows*channels"),
    "gelu": _ELEMENTWISE,
    "relu": _ELEMENTWISE,
    "mul": _ELEMENTWISE,
    "add": _ELEMENTWISE,
}


def read_operators(path: Path) -> tuple[list[Kernel], Array]:
    """Read a100_ops.csv: kernels and their latency in ms. Raises TableError if there is no file."""
    names = {"ln": "layernorm"}
    kernels, latency_ms = [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                kind = names.get(row["op"], row["op"])
                c_in, c_out = int(row["k_or_c_in"]), int(row["n_or_c_out"])
                if kind == "conv":
                    kernel = Kernel(kind, int(row["m_or_hw"]), c_in, c_out, 3, 1, int(row["batch"]))
                else:  # a row of a matrix is an image of one pixel
                    batch = int(row["m_or_hw"] if kind == "linear" else row["batch"])
                    kernel = Kernel(kind, 1, c_in, c_out, batch=batch)
                kernels.append(kernel)
                latency_ms.append(float(row["latency_ms"]))
    except FileNotFoundError:
        raise TableError(f"{path}: no such file, expected the measured operators") from None
    return kernels, np.array(latency_ms)


def held_out(count: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the measurements left out of a fit: a random fifth."""
    return np.random.default_rng(SEED).random(count) < HELD_OUT


def fit_operators(
    kernels: Sequence[Kernel], latency_ms: Array
) -> tuple[dict[str, Grid], dict[str, dict[str, Figures]]]:
    """Fit a grid for each kind of operator to operators timed one by one.

    Returns the grids by kind, as they are written to a file, and by kind the accuracy of these grids on the
    random fifth that was left out of the fit.
    """
    kinds = np.array([kernel.kind for kernel in kernels])
    test = held_out(len(kernels))
    grids, predicted = {}, np.full(len(kernels), np.nan)
    for kind in sorted(set(kinds.tolist())):
        seen, unseen = (np.flatnonzero((kinds == kind) & part).tolist() for part in (~test, test))
        grids[kind] = fit_grid([kernels[i] for i in seen], latency_ms[seen], PLANS[kind])
        predicted[unseen] = [grids[kind].latency_ms(kernels[i]) for i in unseen]
    # no figure over all kinds: their mix is that of the measurements, not of a network
    groups = {kind: test & (kinds == kind) for kind in grids}
    accuracy = {kind: figures(predicted[rows], latency_ms[rows]) for kind, rows in groups.items()}
    return grids, {"unseen operators": accuracy}


def fit_grid(kernels: Sequence[Kernel], latency_ms: Array, plan: Plan) -> Grid:
    """Fit a grid to operators of one kind; no value is below the smallest measured latency."""
    points = np.array([[AXES[axis](kernel) for axis in plan.knots] for kernel in kernels], dtype=np.float64)
    knots = [_spread(points[:, j], count) for j, count in enumerate(plan.knots.values())]
    log_ms = _smooth(_interpolation(points, knots), np.log(latency_ms), knots, plan.smoothness)
    lowest = float(latency_ms.min())
    # four digits: more are not significant, and rounding keeps the order
    values = [float(f"{max(lowest, ms):.4g}") for ms in np.exp(log_ms).ravel().tolist()]
    width = len(knots[-1])
    beyond = dict.fromkeys(plan.moved, MS_PER_ELEMENT)
    beyond[plan.work] = _ms_per_unit(
        points, latency_ms, [list(plan.knots).index(a) for a in plan.work.split("*")]
    )
    return Grid(
        knots=dict(zip(plan.knots, knots, strict=True)),
        ms=tuple(tuple(values[i : i + width]) for i in range(0, len(values), width)),
        beyond={term: float(f"{ms:.4g}") for term, ms in sorted(beyond.items())},
    )


def _spread(values: Array, count: int) -> tuple[float, ...]:
    """Return knots at equal ratios over the range of whole values, rounded to whole numbers."""
    knots = np.unique(np.geomspace(values.min(), values.max(), count).round())
    return tuple(knots.tolist())


def _ms_per_unit(points: Array, latency_ms: Array, factors: Sequence[int]) -> float:
    """Return the median latency per unit of work, without launch, over the tenth with the most work."""
    work = points[:, factors].prod(axis=1)
    largest = work >= np.quantile(work, 0.9)
    return float(np.median((latency_ms[largest] - latency_ms.min()) / work[largest]))


def _interpolation(points: Array, knots: Sequence[Sequence[float]]) -> sparse.csr_matrix:
    """Return the share of each grid value in each point. -> (points, values)"""
    shape = [len(axis) for axis in knots]
    located = np.array([[locate(v, axis) for v, axis in zip(p, knots, strict=True)] for p in points.tolist()])
    cell, fraction = located[:, :, 0].astype(np.int64), located[:, :, 1]
    rows, columns, shares = [], [], []
    for corner in product((0, 1), repeat=len(shape)):
        rows.append(np.arange(len(points)))
        columns.append(np.ravel_multi_index(tuple((cell + np.array(corner)).T), shape))
        shares.append(np.where(np.array(corner), fraction, 1 - fraction).prod(axis=1))
    entries = (np.concatenate(shares), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(entries, (len(points), int(np.prod(shape))))


def _slopes(knots: Sequence[Sequence[float]], order: int) -> sparse.csr_matrix:
    """Return the operator of slopes (order 1) or their changes (2) on each axis. -> (slopes, values)"""
    shape = [len(axis) for axis in knots]
    blocks = []
    for j, axis in enumerate(knots):
        slope = sparse.csr_matrix(np.diff(np.eye(len(axis)), axis=0) / np.diff(np.log(axis))[:, None])
        if order == 2:
            slope = sparse.csr_matrix(np.diff(np.eye(len(axis) - 1), axis=0)) @ slope
        before, after = (sparse.eye_array(int(np.prod(part))) for part in (shape[:j], shape[j + 1 :]))
        blocks.append(sparse.kron(sparse.kron(before, slope), after))
    return sparse.csr_matrix(sparse.vstack(blocks))


def _smooth(
    shares: sparse.csr_matrix, target: Array, knots: Sequence[Sequence[float]], smoothness: float
) -> Array:
    """Return the values of the grid that fit the targets, in logs, and never fall. -> (knots, ...)"""
    rise, bend = _slopes(knots, 1), _slopes(knots, 2)
    # ridge of 1e-6: without it, values far from all measurements can be undetermined
    count = shares.shape[1]
    fixed = (smoothness / bend.shape[0]) * (bend.T @ bend) + (1e-6 / count) * sparse.eye_array(count)
    weights = np.ones(len(target))
    falling = np.zeros(rise.shape[0])
    values = np.zeros(shares.shape[1])
    for _ in range(6):  # rounds of weights, which make large errors count linearly
        for _ in range(10):  # rounds of the set of falling steps, which settles after a few
            weighted = shares.multiply(weights[:, None] / len(target)).tocsr()
            penalty = (_MONOTONE / rise.shape[0]) * (rise.T @ rise.multiply(falling[:, None]).tocsr())
            normal = sparse.csc_matrix(shares.T @ weighted + fixed + penalty)
            values = splu(normal).solve(weighted.T @ target)
            before, falling = falling, ((rise @ values) < 0).astype(np.float64)
            if np.array_equal(before, falling):
                break
        weights = _ROBUST / np.maximum(_ROBUST, np.abs(shares @ values - target))
    grid = values.reshape([len(axis) for axis in knots])
    for axis in range(grid.ndim):
        grid = np.maximum.accumulate(grid, axis=axis)
    return np.asarray(grid)
