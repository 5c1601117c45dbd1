"""The fit of a device's model to end-to-end times of whole networks: non-negative least squares.

A network's latency is a fixed part plus the sum over its kernels, so the totals of whole networks
determine the cost of kernels (the additive model of nn-Meter, MobiSys 2021, without timing kernels
one by one). Errors are relative: 1 ms off in 10 ms weighs as much as 10 ms off in 100 ms. Networks
with large errors are weighted down in each round, since no term explains their difference; the fit to
the others improves.

Totals do not determine the cost of a kernel that is rare or always occurs with the same others. Three
priors replace the missing information, and hold up when a whole family of networks is left out: few
terms per kernel, each with a meaning on the device; weights that kinds of kernels share, such as one
pass over a map; and lower bounds (floors), such as a launch. fitting.forms has them for each device.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import nnls

from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel

Array = npt.NDArray[np.float64]
Terms = dict[str, dict[str, float]]  # kernel kind -> feature -> milliseconds
Column = tuple[str, str]  # kernel kind, feature

HELD_OUT = 0.2  # share of the measurements left out of a fit
SEED = 0

_ROUNDS = 6
_FIXED: Column = ("", "fixed")


@dataclass(frozen=True)
class Form:
    """The terms in the cost of kernels on one device.

    `own` has the features of each kind of kernel with a separate weight. `shared` has weights for several
    kinds: name -> kind and feature -> multiple of the weight there. `floors` has the lower bound of a
    weight in milliseconds: by the name of a shared one, by "kind.feature" or by the feature of any kind;
    other weights may be zero. `far` is the relative error at which a network has half the weight in the fit.
    """

    own: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, Mapping[Column, float]]
    floors: Mapping[str, float]
    far: float = 0.05

    def __post_init__(self) -> None:
        names = {name for features in self.own.values() for name in features}
        names |= {feature for columns in self.shared.values() for _, feature in columns}
        assert names <= set(FEATURES), names - set(FEATURES)
        assert self.kinds == {kind for kind, feature in self.columns if feature == "launch"}

    @property
    def columns(self) -> set[Column]:
        """Every kind with each of its features."""
        own = {(kind, feature) for kind, features in self.own.items() for feature in features}
        return own.union(*self.shared.values())

    @property
    def kinds(self) -> set[str]:
        """The kinds of kernels that the form knows."""
        return {kind for kind, _ in self.columns}

    def floor(self, column: Column) -> float:
        """Return the least weight of a kind's own feature."""
        kind, feature = column
        return self.floors.get(f"{kind}.{feature}", self.floors.get(feature, 0.0))


@dataclass(frozen=True)
class Design:
    """The features of networks, summed over their kernels: one column for each weight of the form."""

    form: Form
    names: tuple[Column | str, ...]  # kind and feature, or the name of a shared weight
    matrix: Array  # (networks, weights)
    lowest: Array  # (weights,)


@dataclass(frozen=True)
class Fit:
    """A fitted additive model: the terms of each kind, and the shared weights."""

    terms: Terms
    shared: Mapping[str, float]
    fixed_ms: float


def design(form: Form, kernels: Sequence[Kernel], counts: sparse.csr_matrix) -> Design:
    """Return the design of networks, given the count of each kernel in each network."""
    kinds = np.array([kernel.kind for kernel in kernels])
    unknown = set(kinds.tolist()) - form.kinds
    assert not unknown, f"no terms for {unknown}"
    totals: dict[Column, Array] = {}
    for kind in sorted(form.kinds):
        of_kind = np.flatnonzero(kinds == kind).tolist()
        features = sorted(feature for k, feature in form.columns if k == kind)
        values = counts[:, of_kind] @ feature_matrix([kernels[j] for j in of_kind], features)
        totals |= {(kind, feature): values[:, f] for f, feature in enumerate(features)}
    own = [(kind, feature) for kind, features in form.own.items() for feature in features]
    columns = [totals[column] for column in own]
    for multiples in form.shared.values():
        columns.append(sum((times * totals[c] for c, times in multiples.items()), np.zeros(counts.shape[0])))
    columns.append(np.ones(counts.shape[0]))
    lowest = [form.floor(column) for column in own] + [form.floors.get(name, 0.0) for name in form.shared]
    return Design(form, (*own, *form.shared, _FIXED), np.stack(columns, axis=1), np.array([*lowest, 0.0]))


def fit_networks(of: Design, latency_ms: Array, rows: npt.NDArray[np.bool_]) -> Fit:
    """Fit the costs of kernels to the latencies of the networks for which `rows` is true."""
    found = fit_robust(of.matrix[rows], latency_ms[rows], of.lowest, of.form.far)
    weights = dict(zip(of.names, found.tolist(), strict=True))
    shared = {name: weights[name] for name in of.form.shared}
    terms: Terms = {kind: {} for kind in sorted(of.form.kinds)}
    for kind, features in of.form.own.items():
        terms[kind] |= {feature: weights[kind, feature] for feature in features}
    for name, multiples in of.form.shared.items():
        for (kind, feature), times in multiples.items():
            terms[kind][feature] = terms[kind].get(feature, 0.0) + times * shared[name]
    return Fit({kind: scaled(of_kind, 1.0) for kind, of_kind in terms.items()}, shared, weights[_FIXED])


def fit_robust(matrix: Array, latency_ms: Array, lowest: Array, far: float = 0.05) -> Array:
    """Return weights >= lowest as `fit_relative`, in rounds that weight networks with large errors down.

    A row has the weight 1 / (1 + (error / far)^2): iteratively reweighted least squares, Cauchy's weights.
    """
    counts = np.ones(len(latency_ms))
    weights = lowest
    for _ in range(_ROUNDS):
        weights = fit_relative(matrix, latency_ms, lowest, counts)
        counts = 1.0 / (1.0 + ((matrix @ weights / latency_ms - 1.0) / far) ** 2)
    return weights


def fit_relative(matrix: Array, latency_ms: Array, lowest: Array, counts: Array | None = None) -> Array:
    """Return weights >= lowest with the least squared relative error of `matrix @ weights`.

    `counts` are the weights of the rows. The problem is solved on its normal equations, which reduce
    thousands of rows to the number of columns. A ridge of 1e-6 keeps them regular if columns are alike.
    """
    root = np.ones(len(latency_ms)) if counts is None else np.sqrt(counts)
    rows = matrix / latency_ms[:, None] * root[:, None]
    target = root - rows @ lowest
    scale = np.sqrt((rows**2).sum(axis=0))
    scale[scale == 0] = 1.0
    rows = rows / scale
    gram = rows.T @ rows + 1e-6 * np.eye(rows.shape[1])
    factor = np.linalg.cholesky(gram).T
    weights, _ = nnls(factor, np.linalg.solve(factor.T, rows.T @ target), maxiter=300 * len(scale))
    return np.asarray(weights / scale + lowest, dtype=np.float64)


def feature_matrix(kernels: Sequence[Kernel], features: Iterable[str]) -> Array:
    """Return the features of kernels. -> (kernels, features)"""
    counts = [FEATURES[name] for name in features]
    values = [[count(kernel) for count in counts] for kernel in kernels]
    return np.array(values, dtype=np.float64).reshape(len(kernels), len(counts))


def scaled(terms: Mapping[str, float], times: float) -> dict[str, float]:
    """Return a multiple of a kernel's terms above zero, to six digits: more are not significant."""
    return {feature: float(f"{times * weight:.6g}") for feature, weight in terms.items() if weight > 0}


def summed(*parts: Mapping[str, float]) -> dict[str, float]:
    """Return the terms of kernels that run one after the other."""
    total: dict[str, float] = {}
    for terms in parts:
        for feature, weight in terms.items():
            total[feature] = total.get(feature, 0.0) + weight
    return scaled(total, 1.0)
