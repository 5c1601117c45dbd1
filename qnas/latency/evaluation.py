"""Measured networks of edge_models.npz files, and the accuracy of predictions for them.

The format is that of edge_models.npz (the measurements published with nn-Meter, MobiSys 2021):
networks as sequences of single operators, not fused, with their latency on some devices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import spearmanr

from qnas.common.arrays import DAMAGE, Arrays, WrongArrayError, open_arrays
from qnas.common.errors import TableError, abbreviate, one_line
from qnas.common.units import LEAST_MS, MOST_MS
from qnas.latency.device import Device, Figures
from qnas.latency.kernels import Kernel, fuse_operators

Array = npt.NDArray[np.float64]

OPERATOR_COLUMNS = ("op", "h_in", "c_in", "h_out", "c_out", "kernel", "stride", "broadcast")
GROUPS = "groups"  # a ninth column, of files with grouped convolutions
_MOST_BYTES = 100_000_000  # of all arrays: three times what the 17,257 networks of nn-Meter take
_MOST_OPERATORS = 500_000  # different ones, of which those networks have 101,049
_MOST_SIZE = 1_048_576  # of an operator's pixels and channels; a linear layer may have that many

# array -> kind of its values, number of dimensions
_ARRAYS: dict[str, tuple[str, int]] = {
    "devices": ("text", 1),
    "latency_ms": ("numbers", 2),
    "family": ("text", 1),
    "ops": ("integers", 2),
    "op_names": ("text", 1),
    "indptr": ("integers", 1),
    "indices": ("integers", 1),
}
# kind of values -> numpy's kinds of it, and the type in which they are read
_DTYPES = {"text": ("U", np.str_), "numbers": ("fiu", np.float64), "integers": ("iu", np.int64)}


@dataclass(frozen=True)
class Networks:
    """Networks timed as a whole, in ms by device, NaN where one was not measured."""

    families: npt.NDArray[np.str_]
    operators: tuple[Kernel, ...]
    of_network: Sequence[npt.NDArray[np.int64]]  # operator numbers of each network, in running order
    latency_ms: Mapping[str, Array]
    names: npt.NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.families)

    def only(self, chosen: npt.NDArray[np.bool_]) -> "Networks":
        """Return the networks for which `chosen`, (networks,), is true."""
        of_network = tuple(compress(self.of_network, chosen))
        latency_ms = {device: ms[chosen] for device, ms in self.latency_ms.items()}
        names = None if self.names is None else self.names[chosen]
        return Networks(self.families[chosen], self.operators, of_network, latency_ms, names)

    def fused(self, fusion: str) -> tuple[tuple[Kernel, ...], sparse.csr_matrix]:
        """Return the distinct kernels, and how often each occurs in each network: (networks, kernels)."""
        column: dict[Kernel, int] = {}
        rows, columns = [], []
        for row, operators in enumerate(self.of_network):
            for kernel in fuse_operators([self.operators[j] for j in operators.tolist()], fusion):
                rows.append(row)
                columns.append(column.setdefault(kernel, len(column)))
        counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(self), len(column)))
        return tuple(column), counts


def read_networks(path: Path) -> Networks:
    """Read a file of measured networks.

    Nothing in it is unpickled. Raises TableError with the array that is missing or wrong.
    """
    arrays = _load(path)
    count = len(arrays["family"])
    _check(path, arrays, count)
    op_names = arrays["op_names"].tolist()
    operators = [_operator(op_names[row[0]], *row[1:]) for row in arrays["ops"].tolist()]
    of_network = np.split(arrays["indices"], arrays["indptr"][1:-1])
    if arrays["ops"].shape[1] > len(OPERATOR_COLUMNS):
        of_network = [_with_weight_norms(numbers, operators) for numbers in of_network]
    latency_ms = dict(zip(arrays["devices"].tolist(), arrays["latency_ms"].T, strict=True))
    return Networks(arrays["family"], tuple(operators), of_network, latency_ms, arrays.get("name"))


# An operation with one value for each channel is a different operator from one of two maps.
_BROADCAST = {"mul": "scale", "add": "shift"}


def _operator(
    name: str,
    h_in: int,
    c_in: int,
    h_out: int,
    c_out: int,
    kernel: int,
    stride: int,
    broadcast: int,
    groups: int | None = None,
) -> Kernel:
    """Return an operator as a kernel of its own name, whose output has the size that was recorded."""
    if groups is None:
        return Kernel(
            _BROADCAST[name] if name == "mul" and broadcast else name, h_in, c_in, c_out, kernel, stride
        )
    if name in _BROADCAST:  # the first operand may be the smaller one
        smaller = broadcast or (h_in, c_in) != (h_out, c_out)
        kind = "scalar" if h_out == c_out == 1 else _BROADCAST[name] if smaller else name
        return Kernel(kind, h_out, c_out, c_out)
    if name == "linear" and h_out > 1:  # a row of a matrix is an image of one pixel
        return Kernel(name, 1, c_in, c_out, batch=h_out**2)
    if name == "upsample":
        return Kernel(name, h_out, c_in, c_out)
    if name == "pad" and h_in % 2 == 0 and h_out - h_in == 2:
        name = "reflect_pad"  # of blur pools; others make up for an odd number of pixels
    if name in ("maxpool", "avgpool"):  # neither kernel nor stride was recorded
        stride = max(1, round(h_in / h_out))
    if -(-h_in // stride) != h_out and name not in ("gap", "linear", "pad", "reflect_pad"):
        h_in = h_out * stride  # a convolution without padding
    return Kernel(name, h_in, c_in, c_out, kernel, stride, groups=1 if name == "dwconv" else groups)


def _with_weight_norms(numbers: npt.NDArray[np.int64], operators: list[Kernel]) -> npt.NDArray[np.int64]:
    """Rename batch normalisations of the weights of the next convolution, which cost nothing for each image.

    They have a channel for each weight of an output. Networks with them have no other norms and keep their
    maps in range by numbers, so a product of maps is one with a number there. Renamed operators are appended
    to `operators`.
    """
    numbers = numbers.copy()
    for i, (this, following) in enumerate(pairwise(numbers.tolist())):
        norm, conv = operators[this], operators[following]
        of_map = (norm.resolution_px, norm.c_in) == (conv.resolution_px, conv.c_in)
        weights = conv.kernel**2 * conv.c_in // conv.groups
        if norm.kind == "bn" and conv.kind in ("conv", "gconv") and not of_map and norm.c_in == weights:
            numbers[i] = len(operators)
            operators.append(replace(norm, kind="weight_norm"))
    if any(operators[j].kind == "weight_norm" for j in numbers.tolist()):
        for i, this in enumerate(numbers.tolist()):
            if operators[this].kind == "mul":
                numbers[i] = len(operators)
                operators.append(replace(operators[this], kind="mul_scalar"))
    return numbers


def _load(path: Path) -> dict[str, npt.NDArray[Any]]:
    what = "npz file of measured networks"
    try:
        with open_arrays(path, _MOST_BYTES) as content:
            missing = [name for name in _ARRAYS if name not in content]
            if missing:
                raise TableError(
                    f"{path}: not an {what}: no array {', '.join(missing)} in it; "
                    f"expected {', '.join(_ARRAYS)}"
                )
            columns = _array(path, content, "op_columns", "text", 1) if "op_columns" in content else None
            arrays = {name: _array(path, content, name, *form) for name, form in _ARRAYS.items()}
            if "name" in content:
                arrays["name"] = _array(path, content, "name", "text", 1)
    except (FileNotFoundError, IsADirectoryError):
        raise TableError(f"{path}: no such file, expected the measured networks") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    except DAMAGE as error:
        raise TableError(f"{path}: not an {what}: {one_line(error)}") from error
    known = (OPERATOR_COLUMNS, (*OPERATOR_COLUMNS, GROUPS))
    if columns is not None and tuple(map(str, columns)) not in known:
        raise TableError(f"{path}: op_columns: expected {', '.join(OPERATOR_COLUMNS)}, and {GROUPS} or not")
    return arrays


def _array(path: Path, content: Arrays, name: str, values: str, dimensions: int) -> npt.NDArray[Any]:
    kinds, dtype = _DTYPES[values]
    try:
        return content.read(name, kinds, dimensions).astype(dtype)
    except WrongArrayError as error:
        raise TableError(f"{path}: {name}: {one_line(error)}") from error
    except (OSError, *DAMAGE) as error:
        raise TableError(f"{path}: {name}: cannot be read: {one_line(error)}") from error


def _check(path: Path, arrays: Mapping[str, npt.NDArray[Any]], count: int) -> None:
    """Raise TableError for the first array that does not fit the others."""

    def expect(name: str, fine: bool | np.bool_, expected: str) -> None:
        if not fine:
            raise TableError(
                f"{path}: {name}: expected {expected}, got an array of shape {arrays[name].shape}"
            )

    devices, ops, start, of_network = (arrays[n] for n in ("devices", "ops", "indptr", "indices"))
    measured = arrays["latency_ms"]
    expect("latency_ms", measured.shape == (count, len(devices)), f"shape {(count, len(devices))}")
    expect("devices", len(set(devices)) == len(devices), "each name once")
    fine = np.all(np.isnan(measured) | ((measured >= LEAST_MS) & (measured <= MOST_MS)))
    expect("latency_ms", fine, "milliseconds above 0, or NaN where nothing was measured")
    columns = len(OPERATOR_COLUMNS)
    expect(
        "ops",
        ops.shape[1] in (columns, columns + 1),
        f"{columns} columns ({', '.join(OPERATOR_COLUMNS)}), and {GROUPS} or not",
    )
    fine = np.all((ops[:, 0] >= 0) & (ops[:, 0] < len(arrays["op_names"])))
    expect("ops", fine, f"column op within 0 and {len(arrays['op_names']) - 1}, as op_names")
    expect("ops", len(ops) <= _MOST_OPERATORS, f"at most {_MOST_OPERATORS:,} operators")
    fine = np.all((ops[:, 1:7] >= 1) & (ops[:, 1:7] <= _MOST_SIZE))
    expect("ops", fine, f"sizes, kernels and strides of 1 to {_MOST_SIZE}")
    fine = np.all((ops[:, columns:] >= 1) & (ops[:, 2:3] % np.maximum(1, ops[:, columns:]) == 0))
    expect("ops", fine, "groups that divide the input channels")
    if "name" in arrays:
        expect("name", arrays["name"].shape == (count,), f"shape {(count,)}")
    expect("indptr", len(start) == count + 1, f"shape {(count + 1,)}")
    fine = start[0] == 0 and start[-1] == len(of_network) and np.all(np.diff(start) >= 0)
    expect("indptr", fine, f"rising numbers from 0 to {len(of_network)}, the length of indices")
    expect(
        "indices", np.all((of_network >= 0) & (of_network < len(ops))), f"rows of ops, 0 to {len(ops) - 1}"
    )


def predict_networks(device: Device, networks: Networks) -> Array:
    """Return each network's latency in ms by the device's model. Raises TableError for unknown kernels."""
    kernels, counts = networks.fused(device.fusion)
    ms = np.array([device.kernel_ms(kernel) for kernel in kernels], dtype=np.float64)
    return np.asarray(counts @ ms + device.network_ms, dtype=np.float64)


def evaluate_networks(device: Device, networks: Networks) -> dict[str, Figures]:
    """Compare predictions with measurements: for "all" networks, then for each family by name.

    Networks that were not measured on the device are ignored. Raises TableError where none was.
    """
    columns = [name for name in (device.name, *device.aliases) if name in networks.latency_ms]
    if not columns:
        names = abbreviate(sorted(networks.latency_ms)) or "none"
        raise TableError(f"device {device.name} is not among those of the file: {names}")
    measured = networks.latency_ms[columns[0]]
    known = np.isfinite(measured)
    if not known.any():
        raise TableError(f"none of the {len(networks)} networks was measured on {device.name}")
    measured, networks = measured[known], networks.only(known)
    predicted = predict_networks(device, networks)
    families = networks.families
    return {"all": figures(predicted, measured)} | {
        family: figures(predicted[families == family], measured[families == family])
        for family in sorted(set(families.tolist()))
    }


def figures(predicted_ms: Array | Sequence[float], measured_ms: Array | Sequence[float]) -> Figures:
    """Compare predictions with measurements, both in ms, of at least one network.

    The rank correlation is None where it is undefined: for one network, or for equal latencies.
    """
    predicted, measured = np.asarray(predicted_ms, np.float64), np.asarray(measured_ms, np.float64)
    assert len(predicted) == len(measured) > 0
    error = predicted / measured - 1.0
    rank = math.nan
    if np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        rank = float(spearmanr(predicted, measured)[0])
    return Figures(
        n=len(error),
        rmspe_pct=round(100 * float(np.sqrt(np.mean(error**2))), 2),
        within_5_pct=round(100 * float(np.mean(np.abs(error) <= 0.05)), 1),
        within_10_pct=round(100 * float(np.mean(np.abs(error) <= 0.10)), 1),
        bias_pct=round(100 * float(np.mean(error)), 2),
        spearman=None if math.isnan(rank) else round(rank, 4),
    )
