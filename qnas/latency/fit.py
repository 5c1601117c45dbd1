"""Fitting a device's model to measurements: non-negative least squares on the relative error.

A network's latency is a fixed part plus the sum over its kernels, so whole networks, of which
nothing is known but their total, pin down what kernels cost (the additive model of nn-Meter,
MobiSys 2021, without timing kernels one by one). Every row is divided by its latency: 1 ms of
error on a network of 10 ms weighs as much as 10 ms on one of 100 ms.

Totals do not pin down the cost of a kernel that is rare or always in the same company. So every
kernel has a floor: a launch, and for operators that only move data, the bandwidth of the memory.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import nnls
from scipy.stats import spearmanr

from qnas.errors import TableError
from qnas.latency.device import Figures
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel, fuse_operators

Array = npt.NDArray[np.float64]
Terms = dict[str, dict[str, float]]  # kernel kind -> feature -> milliseconds

HELD_OUT = 0.2  # share of the measurements that a fit does not see
SEED = 0

_MOVING = ("launch", "kelements_in")  # operators without weights: they read and write maps

# Elementwise operators as passes over a map, which all cost the same. Left free each, they are not
# pinned down by the totals of networks; tied, the fit is as good, and it gives what a pass costs for
# operators that no measured network has.
PASSES: dict[str, int] = {"add": 1, "addrelu": 1, "batchnorm": 1, "hswish": 3}
PASS = "pass"

# Which features the cost of a kind of kernel may use, in a fit to edge devices; others: _MOVING.
EDGE_FEATURES: dict[str, tuple[str, ...]] = {
    "conv1x1": (
        "launch",
        "mmacs",
        "mmacs_c8",
        "mmacs_r4_c8",
        "mmacs_c32",
        "mmacs_c64",
        "mmacs_beyond_c512",
        "kelements_in",
        "kelements_in_above_256",
        "kelements_in_above_1024",
        "kelements_out",
        "kelements_out_above_128",
        "kelements_out_above_1024",
        "kweights",
        "kweights_above_64",
        "kpixels",
        "klines",
        "kchannels_in",
        "kchannels_out",
    ),
    "conv": (
        "launch",
        "mmacs",
        "mmacs_c8",
        "mmacs_r4_c8",
        "mmacs_c32",
        "mmacs_k5",
        "mmacs_k7",
        "mmacs_beyond_c64",
        "mmacs_beyond_c512",
        "mmacs_centre",
        "mmacs_row",
        "kelements_in_above_256",
        "kelements_in_above_256_k5",
        "kelements_in_above_256_k7",
        "kelements_out",
        "kelements_out_above_128",
        "kelements_out_above_1024",
        "kweights",
        "kweights_above_64",
        "kcolumns",
        "kpixels",
        "strided_kelements_in",
    ),
    "dwconv": (
        "launch",
        "mmacs",
        "kpixels",
        "kelements_in_above_256",
        "kelements_out",
        "kelements_out_k3",
        "kelements_out_k5",
        "kelements_out_k7",
        "kelements_out_k9",
        "klines",
        "klines_k3",
        "klines_k5",
        "klines_k7",
        "kchannels_out",
        "kchannels_out_k3",
        "kchannels_out_k5",
        "strided_kelements_out_k3",
        "strided_kelements_out_k5",
        "strided_kchannels_out_k3",
    ),
    "linear": ("launch", "kweights", "kweights_above_1024"),
    "split": ("launch", "kelements_in", "klines", "kchannels_out"),
    "shuffle": ("launch", "kelements_in", "klines", "kchannels_out"),
    "hsigmoid": ("launch", "kchannels_out"),  # on a map of one pixel
    "maxpool": ("launch", "kelements_in", "kchannels_out"),
    "reshape": ("launch",),
}

_DENSE = (
    "launch",
    "mmacs",
    "mmacs_r128_c128",
    "mmacs_above_32",
    "mmacs_above_128",
    "mmacs_above_512",
    "kelements_in",
    "kelements_in_above_1024",
    "kelements_in_above_4096",
    "kelements_out",
    "kelements_out_above_1024",
    "kweights",
    "kweights_above_1024",
)
_ELEMENTWISE = (
    "launch",
    "kelements_in",
    "kelements_in_above_256",
    "kelements_in_above_1024",
    "kelements_in_above_2048",
    "kelements_in_above_4096",
)

# As EDGE_FEATURES, for the operators of a GPU, each timed by itself.
OPERATOR_FEATURES: dict[str, tuple[str, ...]] = {
    "linear": _DENSE,
    "conv": (*_DENSE, "mmacs_c32", "mmacs_c64", "kcolumns", "kfan_in"),
    "layernorm": (*_ELEMENTWISE, "kchannels_out"),
    "gelu": _ELEMENTWISE,
    "relu": _ELEMENTWISE,
    "mul": _ELEMENTWISE,
    "add": _ELEMENTWISE,
}


@dataclass(frozen=True)
class Networks:
    """Networks that were timed as a whole.

    `counts` has a row for each network and a column for each kernel of `kernels`; `latency_ms` has a
    value for each network, by device, NaN where it was not measured.
    """

    families: npt.NDArray[np.str_]
    kernels: tuple[Kernel, ...]
    counts: sparse.csr_matrix
    latency_ms: Mapping[str, Array]


def read_networks(path: Path, *, every: int = 1) -> Networks:
    """Read edge_models.npz: networks as sequences of operators, with their measured latencies.

    `every` takes one network in so many. Raises TableError where there is no such file.
    """
    try:
        content = np.load(path)
    except FileNotFoundError:
        raise TableError(f"{path}: no such file, expected the measured networks") from None
    names = [str(name) for name in content["op_names"]]
    operators = []
    for op, h_in, c_in, _, c_out, kernel, stride, broadcast in content["ops"].tolist():
        # a product with one value a channel is another operator than one of two maps
        kind = "scale" if names[op] == "mul" and broadcast else names[op]
        operators.append(Kernel(kind, h_in, c_in, c_out, kernel, stride))
    start, of_network = content["indptr"], content["indices"]
    chosen = range(0, len(start) - 1, every)
    column: dict[Kernel, int] = {}
    rows, columns = [], []
    for row, i in enumerate(chosen):
        for kernel in fuse_operators([operators[j] for j in of_network[start[i] : start[i + 1]]]):
            rows.append(row)
            columns.append(column.setdefault(kernel, len(column)))
    counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(chosen), len(column)))
    measured = content["latency_ms"].astype(np.float64)[::every]
    latency_ms = {str(device): measured[:, d] for d, device in enumerate(content["devices"])}
    return Networks(content["family"][::every], tuple(column), counts, latency_ms)


def read_operators(path: Path) -> tuple[list[Kernel], Array]:
    """Read a100_ops.csv: kernels and their latency in ms. Raises TableError where there is no file."""
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


@dataclass(frozen=True)
class Fit:
    """A fitted additive model and how well it did on what it had not seen."""

    terms: Terms
    fixed_ms: float
    accuracy: dict[str, dict[str, Figures]]


def fit_networks(
    networks: Networks,
    device: str,
    *,
    floors: Mapping[str, float],
    left_out: Sequence[str] = (),
) -> Fit:
    """Fit what kernels cost on an edge device to the latencies of whole networks.

    `floors` gives the least milliseconds for `launch` and, of operators without weights, for
    `kelements_in`. Accuracy is that on a random fifth of the networks, and on each family of
    `left_out` when all of it is held out; the returned terms are fitted without that random fifth,
    so that the accuracy is theirs. Among them is PASS, one pass of an elementwise operator.
    """
    measured = networks.latency_ms[device]
    known = np.flatnonzero(np.isfinite(measured))
    latency, families = measured[known], networks.families[known]
    columns, matrix = _network_features(networks)
    matrix = matrix[known]
    lowest = np.array([_floor(kind, feature, floors) for kind, feature in columns])
    test = np.random.default_rng(SEED).random(len(latency)) < HELD_OUT
    weights = fit_relative(matrix[~test], latency[~test], lowest)
    unseen = {"all": test, **{str(f): test & (families == f) for f in np.unique(families)}}
    accuracy = {
        "unseen networks": {
            name: figures(matrix[rows] @ weights, latency[rows]) for name, rows in unseen.items()
        },
        "unseen family": {},
    }
    for family in left_out:
        rows = families == family
        without = fit_relative(matrix[~rows], latency[~rows], lowest)
        accuracy["unseen family"][family] = figures(matrix[rows] @ without, latency[rows])
    terms = _terms(columns, weights)
    terms |= {kind: scaled(terms[PASS], passes) for kind, passes in PASSES.items()}
    return Fit(terms, terms.pop(_FIXED)["launch"], accuracy)


_FIXED = "fixed"


def _network_features(networks: Networks) -> tuple[list[tuple[str, str]], Array]:
    """Return (kind, feature) of each column, and the networks' features summed over their kernels."""
    columns, blocks = [], []
    kinds = np.array([kernel.kind for kernel in networks.kernels])
    for kind in sorted(set(kinds.tolist()) - set(PASSES)):
        of_kind = np.flatnonzero(kinds == kind).tolist()
        features = EDGE_FEATURES.get(kind, _MOVING)
        values = feature_matrix([networks.kernels[j] for j in of_kind], features)
        blocks.append(networks.counts[:, of_kind] @ values)
        columns += [(kind, feature) for feature in features]
    tied = np.zeros((networks.counts.shape[0], len(_MOVING)))
    for kind, passes in PASSES.items():
        of_kind = np.flatnonzero(kinds == kind).tolist()
        values = feature_matrix([networks.kernels[j] for j in of_kind], _MOVING)
        tied += passes * (networks.counts[:, of_kind] @ values)
    columns += [(PASS, feature) for feature in _MOVING]
    columns.append((_FIXED, "launch"))
    return columns, np.hstack([*blocks, tied, np.ones((len(tied), 1))])


def _floor(kind: str, feature: str, floors: Mapping[str, float]) -> float:
    if feature == "launch":
        return floors["launch"]
    return floors["kelements_in"] if EDGE_FEATURES.get(kind, _MOVING) == _MOVING else 0.0


def fit_operators(kernels: Sequence[Kernel], latency_ms: Array, *, floors: Mapping[str, float]) -> Fit:
    """Fit what each kind of operator costs, from operators timed by themselves.

    Accuracy is that on a random fifth, by kind; the returned terms are fitted without it.
    """
    kinds = np.array([kernel.kind for kernel in kernels])
    test = np.random.default_rng(SEED).random(len(kernels)) < HELD_OUT
    terms: Terms = {}
    accuracy = {}
    for kind in sorted(set(kinds.tolist())):
        features = OPERATOR_FEATURES[kind]
        of_kind = np.flatnonzero(kinds == kind).tolist()
        matrix, latency, held = (
            feature_matrix([kernels[j] for j in of_kind], features),
            latency_ms[of_kind],
            test[of_kind],
        )
        lowest = np.array([floors["launch"] if feature == "launch" else 0.0 for feature in features])
        weights = fit_relative(matrix[~held], latency[~held], lowest)
        terms |= _terms([(kind, feature) for feature in features], weights)
        accuracy[kind] = figures(matrix[held] @ weights, latency[held])
    return Fit(terms, 0.0, {"unseen operators": accuracy})


def feature_matrix(kernels: Sequence[Kernel], features: Iterable[str]) -> Array:
    """Return features of kernels. -> (kernels, features)"""
    names = list(features)
    values = [[FEATURES[name](kernel) for name in names] for kernel in kernels]
    return np.array(values, dtype=np.float64).reshape(len(kernels), len(names))


def fit_relative(matrix: Array, latency_ms: Array, lowest: Array) -> Array:
    """Return weights >= lowest with the least squared relative error of `matrix @ weights`.

    The problem is solved on its normal equations: thousands of rows become as many as there are
    columns. A millionth of ridge keeps them regular where columns are alike.
    """
    rows = matrix / latency_ms[:, None]
    target = 1.0 - rows @ lowest
    scale = np.sqrt((rows**2).sum(axis=0))
    scale[scale == 0] = 1.0
    rows = rows / scale
    gram = rows.T @ rows + 1e-6 * np.eye(rows.shape[1])
    factor = np.linalg.cholesky(gram).T
    weights, _ = nnls(factor, np.linalg.solve(factor.T, rows.T @ target), maxiter=100 * len(scale))
    return np.asarray(weights / scale + lowest, dtype=np.float64)


def _terms(columns: Sequence[tuple[str, str]], weights: Array) -> Terms:
    """Return the weights above zero, to six digits: more would not be readable, nor mean anything."""
    terms: Terms = {}
    for (kind, feature), weight in zip(columns, weights, strict=True):
        of_kind = terms.setdefault(kind, {})
        if weight > 0:
            of_kind[feature] = float(f"{weight:.6g}")
    return terms


def scaled(terms: Mapping[str, float], times: float) -> dict[str, float]:
    """Return a multiple of a kernel's terms, to six digits."""
    return {feature: float(f"{times * weight:.6g}") for feature, weight in terms.items()}


def figures(predicted_ms: Array, measured_ms: Array) -> Figures:
    """Compare predictions with measurements, both in ms; at least two of them."""
    error = predicted_ms / measured_ms - 1.0
    return Figures(
        n=len(error),
        rmspe_pct=round(100 * float(np.sqrt(np.mean(error**2))), 2),
        within_5_pct=round(100 * float(np.mean(np.abs(error) <= 0.05)), 1),
        within_10_pct=round(100 * float(np.mean(np.abs(error) <= 0.10)), 1),
        bias_pct=round(100 * float(np.mean(error)), 2),
        spearman=round(float(spearmanr(predicted_ms, measured_ms)[0]), 4),
    )
