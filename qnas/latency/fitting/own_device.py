"""The fit of a device's model to some dozens of measured networks of one space.

A few totals do not determine the cost of every kind of kernel, since the kernels of a block always occur
together. The fit therefore has two steps. The first has only four rates, the same for all kinds of
kernels: for a launch, for a million multiply-adds (one rate for dense and one for depthwise
convolutions), and for a thousand moved elements. In the second step, each kind has separate terms, with
a ridge penalty towards the rates of the first, whose strength is chosen by cross-validation. Terms that
the data do not determine stay near the rates, in other spaces too. No weight is negative, no launch free.

Errors are relative, as in the other fits: 1 ms off in 10 ms weighs as much as 10 ms off in 100 ms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from qnas.common.errors import TableError
from qnas.latency.device import Device, Figures, FilePrecision, KernelModel, Source
from qnas.latency.evaluation import figures
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel, fuse
from qnas.spaces.arch import Arch, sample_arch
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace

Array = npt.NDArray[np.float64]
Column = tuple[str, str]  # kind of kernel, feature

CROSS_VALIDATED = "cross-validated"  # the key in a device's accuracy

LEAST_NETWORKS = 20
LEAST_SPREAD = 1.2  # slowest over fastest network
SEED = 0

_FUSION = "edge"
FOLDS = 10
_INNER_FOLDS = 5
_RIDGES = tuple(10.0**e for e in range(-7, 0))
_FREE = 0.02  # share of a network's latency that a term without a rate may well contribute
_NEGLIGIBLE = 1e-3  # share of it that each rate contributes at least, so that no kernel is free
_PROBES = 200  # random networks by which the terms of a space are counted

_FIXED = ("", "fixed")
_DENSE = ("launch", "mmacs", "kelements_in", "kelements_out", "kweights")
_MOVING = ("launch", "kelements_in")

# The features that the cost of a kind of kernel may depend on; for other kinds, _MOVING. Terms without a
# rate in the first step start at zero, since implementations differ in them.
_TERMS: dict[str, tuple[str, ...]] = {
    "conv1x1": _DENSE,
    "conv": (*_DENSE, "kcolumns"),
    "patch": _DENSE,
    "linear": _DENSE,
    "dwconv": ("launch", "mmacs", "kelements_in", "klines", "kelements_out_k5", "kelements_out_k7"),
    "layernorm": ("launch", "kelements_in", "kpixels"),
}

# Kernels of other spaces that this one may lack: estimated at the rates of the first step.
_OTHER_KINDS = (
    *("add", "addrelu", "batchnorm", "clip", "gap", "gelu"),
    *("hsigmoid", "hswish", "mul", "relu", "scale", "square"),
)

# The rates of the first step: feature -> its rate.
_LAUNCH, _DENSE_MMACS, _DEPTHWISE_MMACS, _MOVED = range(4)
_RATES = {"launch": _LAUNCH, "kelements_in": _MOVED, "kelements_out": _MOVED, "kweights": _MOVED}


@dataclass(frozen=True)
class OwnFit:
    """A device's model, fitted to its networks, with its accuracy on networks left out."""

    model: dict[str, KernelModel]
    fixed_ms: float
    accuracy: Figures
    terms: int  # number that networks of the space can tell apart


def fit_own(space: SearchSpace, archs: Sequence[Arch], latency_ms: Sequence[float], where: str) -> OwnFit:
    """Fit the costs of kernels to the latencies of networks of a space, one value in ms each.

    Accuracy is that of `FOLDS`-fold cross-validation, including the choice of the ridge. Raises
    TableError, with the remedy, where the networks do not determine a model: `where` names them.
    """
    measured = np.array(latency_ms, dtype=np.float64)
    assert len(archs) == len(measured)
    assert (measured > 0).all()
    counts = [_kernels(space, arch) for arch in archs]
    rng = np.random.default_rng(SEED)
    probes = [_kernels(space, sample_arch(space, rng)) for _ in range(_PROBES)]
    _check_kinds(probes, counts, where)
    kinds = sorted({*_TERMS, *_OTHER_KINDS, *(kernel.kind for kernels in counts for kernel in kernels)})
    columns = [_FIXED, *((kind, term) for kind in kinds for term in _TERMS.get(kind, _MOVING))]
    matrix = _matrix(counts, columns)
    # those that networks of the space can tell apart, however many are measured
    probed = _matrix(probes, columns)
    terms = int(np.linalg.matrix_rank(probed / _positive(np.abs(probed).max(axis=0)), tol=1e-6))
    _check_measured(measured, terms, where)
    predicted = np.empty_like(measured)
    for held in folds(len(measured), FOLDS):
        predicted[held] = matrix[held] @ _fit_best(columns, matrix[~held], measured[~held])
    accuracy, constant_pct = figures(predicted, measured), constant_error_pct(measured)
    if accuracy.rmspe_pct > 0.5 * constant_pct:
        raise TableError(
            f"{where}, latency_ms: times do not follow the networks: predictions of networks left out are "
            f"{accuracy.rmspe_pct:.0f}% off, where one latency for all would be {constant_pct:.0f}% off: "
            "check that each time stands in its network's row, in ms, measured on an idle device"
        )
    weights = _fit_best(columns, matrix, measured)
    return OwnFit(_model(columns, weights, matrix), _rounded(weights[0]), accuracy, terms)


def own_device(
    fit: OwnFit,
    *,
    name: str,
    space: SearchSpace,
    networks: int,
    runtime: str,
    day: date,
    file_format: str = "",
    file_precision: FilePrecision = "fp32",
) -> Device:
    """Return the device of a fit to files of a format and precision."""
    return Device(
        schema="qnas.device/1",
        name=name,
        title=f"{name}, from {networks} networks of {space.name}",
        runtime=runtime or "not said",
        precision="as measured" if file_precision == "fp32" else f"as measured, of files in {file_precision}",
        file_format=file_format,
        file_precision=file_precision,
        batch=1,
        unit="ms",
        kind="fitted",
        source=f"fitted by qnas fit-latency to {networks} networks of space {space.name}, timed as wholes",
        date=day.isoformat(),
        accuracy={CROSS_VALIDATED: {"all": fit.accuracy}},
        fusion=_FUSION,
        fixed_ms=fit.fixed_ms,
        model=fit.model,
    )


def _kernels(space: SearchSpace, arch: Arch) -> list[Kernel]:
    return [kernel for block in lower(space, arch) for kernel in fuse(block.layers, _FUSION)]


def _matrix(networks: Sequence[Sequence[Kernel]], columns: Sequence[Column]) -> Array:
    """Return the features of networks, summed over their kernels. -> (networks, columns)"""
    index = {column: j for j, column in enumerate(columns)}
    matrix = np.zeros((len(networks), len(columns)))
    known: dict[Kernel, list[tuple[int, float]]] = {}
    for row, kernels in zip(matrix, networks, strict=True):
        row[index[_FIXED]] = 1.0
        for kernel in kernels:
            if kernel not in known:
                terms = _TERMS.get(kernel.kind, _MOVING)
                known[kernel] = [(index[kernel.kind, term], FEATURES[term](kernel)) for term in terms]
            for j, value in known[kernel]:
                row[j] += value
    return matrix


def _check_kinds(
    probes: Sequence[Sequence[Kernel]], networks: Sequence[Sequence[Kernel]], where: str
) -> None:
    """Raise TableError where kinds of kernels that vary in the space do not vary in the networks."""
    known = sorted({kernel.kind for kernels in probes for kernel in kernels})
    alike = [kind for kind in known if _varies(kind, probes) and not _varies(kind, networks)]
    if alike:
        raise TableError(
            f"{where}: kernels of kind {', '.join(alike)} are the same in all networks, so their cost cannot "
            "be estimated: measure networks that differ there, such as those that qnas sample writes"
        )


def _varies(kind: str, networks: Sequence[Sequence[Kernel]]) -> bool:
    return len({tuple(sorted(map(str, (k for k in kernels if k.kind == kind)))) for kernels in networks}) > 1


def _check_measured(measured: Array, terms: int, where: str) -> None:
    """Raise TableError for too few networks, or for networks that take nearly the same time."""
    needed = max(LEAST_NETWORKS, math.ceil(1.25 * terms))
    if len(measured) < needed:
        raise TableError(
            f"{where}: {len(measured)} networks are too few for the {terms} terms that the space's latencies "
            f"have: measure at least {needed}, better {2 * needed} (qnas sample with `networks={2 * needed}`)"
        )
    spread = float(measured.max() / measured.min())
    if spread < LEAST_SPREAD:
        raise TableError(
            f"{where}, latency_ms: the slowest network takes only {spread:.2f} times as long as the fastest: "
            f"expected {LEAST_SPREAD:g} times at least, from networks spread as by qnas sample"
        )


def constant_error_pct(measured: Array) -> float:
    """Return the relative error, in percent, of the one latency that is best for all networks."""
    best = float(np.sum(1 / measured) / np.sum(1 / measured**2))  # of least relative squares
    return 100 * float(np.sqrt(np.mean((best / measured - 1) ** 2)))


def folds(n: int, count: int) -> list[npt.NDArray[np.bool_]]:
    """Return the rows that each fold holds out, in a fixed random order."""
    number = np.random.default_rng(SEED).permutation(n) % count
    return [number == fold for fold in range(count)]


def _fit_best(columns: Sequence[Column], matrix: Array, latency_ms: Array) -> Array:
    """Return the weights with the ridge strength that predicts left-out networks best."""
    errors = dict.fromkeys(_RIDGES, 0.0)
    for held in folds(len(latency_ms), _INNER_FOLDS):
        prior = _Prior(columns, matrix[~held], latency_ms[~held])
        for ridge in _RIDGES:
            predicted = matrix[held] @ prior.fit(matrix[~held], latency_ms[~held], ridge)
            errors[ridge] += float(np.sum((predicted / latency_ms[held] - 1) ** 2))
    ridge = min(_RIDGES, key=lambda r: errors[r])
    return _Prior(columns, matrix, latency_ms).fit(matrix, latency_ms, ridge)


class _Prior:
    """The first step: rates of the machine, and the cost of each term at these rates."""

    def __init__(self, columns: Sequence[Column], matrix: Array, latency_ms: Array) -> None:
        tied = np.zeros((len(columns), 5))  # for each column, its rate or the fixed part
        for row, (kind, term) in zip(tied, columns, strict=True):
            if (kind, term) == _FIXED:
                row[4] = 1.0
            elif term == "mmacs":
                row[_DEPTHWISE_MMACS if kind == "dwconv" else _DENSE_MMACS] = 1.0
            elif term in _RATES:
                row[_RATES[term]] = 1.0
        counts = matrix @ tied
        rows = counts / latency_ms[:, None]
        share = _positive(rows.mean(axis=0))  # of a network's latency, at a weight of 1
        lowest = _NEGLIGIBLE / share
        weights, _ = nnls(rows / share, 1.0 - rows @ lowest)
        self._lowest = tied @ lowest
        self._mean = tied @ (weights / share + lowest)
        # terms with a rate may change by about that rate; those without by _FREE of a network
        free = _FREE / _positive((matrix / latency_ms[:, None]).mean(axis=0))
        self._width = np.where(tied.any(axis=1), self._mean, free)

    def fit(self, matrix: Array, latency_ms: Array, ridge: float) -> Array:
        """Return weights of least squared relative error plus ridge, none negative, launches positive."""
        floor = 0.1 * self._lowest
        rows = matrix / latency_ms[:, None] * self._width
        root = math.sqrt(ridge * len(rows))
        target = np.concatenate(
            [1.0 - matrix @ floor / latency_ms, root * (self._mean - floor) / self._width]
        )
        found, _ = nnls(np.vstack([rows, root * np.eye(len(floor))]), target, maxiter=100 * len(floor))
        weights: Array = found * self._width + floor
        return weights


def _positive(values: Array) -> Array:
    """Replace zeros by ones, for division."""
    return np.where(values > 0, values, 1.0)


def _model(columns: Sequence[Column], weights: Array, matrix: Array) -> dict[str, KernelModel]:
    """Return the cost of each kind, with a note where the networks do not determine it."""
    model = {}
    for kind in dict.fromkeys(kind for kind, _ in columns if kind):
        of_kind = [j for j, column in enumerate(columns) if column[0] == kind]
        terms = {columns[j][1]: _rounded(weights[j]) for j in of_kind if weights[j] > 0}
        source: Source
        if not matrix[:, of_kind].any():
            source, note = "estimated", "in no network measured: at the machine's rates"
        elif not np.ptp(matrix[:, of_kind], axis=0).any():
            source, note = "fitted", "the same in all networks measured: their sum is known, not its parts"
        else:
            source, note = "fitted", ""
        model[kind] = KernelModel(kind=source, note=note, terms=terms)
    return model


def _rounded(weight: float) -> float:
    return float(f"{weight:.6g}")
