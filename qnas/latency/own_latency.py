"""Devices whose latencies come from Python: a function of a layer, a block or a network, or measured blocks.

Such a Device can be given in place of a device's name. It is not written to a device file, so the folder of
a search keeps its table, not the function.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from qnas.common.arguments import check_arguments, quoted
from qnas.common.errors import TableError, UsageError
from qnas.common.reading import csv_rows, read_text
from qnas.latency.device import Device, Source, check_own_name
from qnas.latency.device_table import build_table
from qnas.latency.evaluation import Array, figures
from qnas.latency.fitting.own_device import CROSS_VALIDATED, FOLDS, constant_error_pct, folds
from qnas.latency.kernels import Kernel
from qnas.latency.table import (
    DECIMALS,
    RUNTIME,
    TABLE_BYTES,
    Cell,
    LatencyTable,
    table_from_rows,
    with_fewer_classes,
)
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import BlockSpec
from qnas.spaces.space import SearchSpace

ALL_NETWORKS = "all networks"  # the key in a device's accuracy for a space with few networks
NETWORKS_PER_EFFECT = 3  # for which a function of networks is called
LEAST_NETWORKS = 50
BLOCK_COLUMNS = ("position", "candidate", "latency_ms")  # that rows of measured blocks need


def device_from_function(
    name: str,
    *,
    layer: Callable[[Kernel], float] | None = None,
    block: Callable[[BlockSpec], float] | None = None,
    network: Callable[[Arch], float] | None = None,
    space: SearchSpace | None = None,
    fixed_ms: float = 0.0,
    kind: Source = "estimated",
) -> Device:
    """Return a device whose latencies, in ms for one image, are those of one function.

    `layer` is called with each layer as a runtime executes it: a convolution with its norm and ReLU is one
    `Kernel`. It prices networks of any space, ONNX files and modules. `block` is called with each candidate
    at each position and each fixed block of a space. With both, `fixed_ms` is added for each network.
    `network` is called with some networks of `space`, and a sum over blocks, which a search needs, is fitted
    to its latencies; the device's `accuracy` holds the error of that sum on networks left out. `kind` says
    whether the function rests on measurements. Raises UsageError unless exactly one function is given,
    TableError where it does not return latencies or where no sum over blocks fits them.

    >>> board = device_from_function("board", layer=lambda kernel: 0.001 * kernel.c_in)
    >>> board.kernel_ms(Kernel("conv1x1", 28, 40, 160))
    0.04
    """
    check_arguments(name=name, fixed_ms=fixed_ms, kind=kind)
    functions = {"layer": layer, "block": block, "network": network}
    given = [what for what, function in functions.items() if function is not None]
    if len(given) != 1:
        raise UsageError(f"device {name}: expected one of layer, block and network, got {given or 'none'}")
    if not callable(functions[given[0]]):
        raise UsageError(f"`{given[0]}={quoted(functions[given[0]])}`: expected a function")
    _check_space(space)
    if (network is not None) != (space is not None):
        raise UsageError(f"device {name}: give a space with a function of networks, and only with one")
    device = _device(name, f"a Python function of a {given[0]}", kind, fixed_ms)
    if layer is not None:
        return device.with_functions(kernel=layer)
    if block is not None:
        return device.with_functions(table=partial(_price_blocks, block))
    assert network is not None
    assert space is not None
    return _fit_blocks(device, network, space)


def device_from_blocks(
    name: str,
    blocks: Any,
    space: SearchSpace,
    *,
    fixed_ms: float = 0.0,
    kind: Source = "measured",
) -> Device:
    """Return a device from the measured blocks of a space: a CSV file, a DataFrame or dictionaries.

    Rows have `position`, `candidate` (empty for fixed blocks) and `latency_ms`; the other columns of
    latency_tables/DEVICE/SPACE.csv are checked if present. Identity without a row takes 0 ms, and the
    runtime, which is in every network, takes `fixed_ms`. Raises TableError with all problems.

    >>> from qnas.latency.prediction import table_from
    >>> from qnas.spaces.space import load_space
    >>> space = load_space("quadranet25-xxs")
    >>> fixed = ["stem", "2.transition", "3.transition", "4.transition", "head"]
    >>> rows = [{"position": name, "candidate": "", "latency_ms": 0.5} for name in fixed]
    >>> for position in space.positions:
    ...     rows.append({"position": position.name, "candidate": position.names[0], "latency_ms": 1.5})
    >>> table = table_from("device", device_from_blocks("board", rows, space), space)
    >>> table.slowest_ms
    40.0
    """
    check_arguments(name=name, fixed_ms=fixed_ms, kind=kind)
    _check_space(space)
    if space is None:
        raise UsageError("`space=None`: expected a SearchSpace, as load_space returns")
    device = _device(name, "measured blocks", kind, fixed_ms)
    where = str(blocks) if isinstance(blocks, str | Path) else f"device {name}"
    records = [{key: _text(value) for key, value in row.items()} for row in _records(blocks)]
    if lacking := [key for key in BLOCK_COLUMNS if any(key not in row for row in records)]:
        raise TableError(f"{where}: columns missing: {', '.join(lacking)}")
    default = {
        "": Cell(0.0, 0.0, "no operator"),
        RUNTIME: _cell(device, device.checked_ms(fixed_ms, RUNTIME), "given as fixed_ms"),
    }
    rows = ((f"row {number}", row) for number, row in enumerate(records, 1))
    table = table_from_rows(rows, space, where=where, device=name, default=default)
    return _with_table(device, table, space)


def _check_space(space: object) -> None:
    if not isinstance(space, SearchSpace | None):
        raise UsageError(f"`space={quoted(space)}`: expected a SearchSpace, as load_space returns")


def _device(name: str, source: str, kind: Source, fixed_ms: float) -> Device:
    check_own_name(name)
    return Device(
        schema="qnas.device/1",
        name=name,
        title=f"{name}, from {source}",
        runtime="not said",
        precision="not said",
        batch=1,
        unit="ms",
        kind=kind,
        source=source,
        date=date.today().isoformat(),
        fixed_ms=fixed_ms,
    )


def _cell(device: Device, latency_ms: float, source: str) -> Cell:
    latency_ms = round(latency_ms, DECIMALS)
    estimated_ms = latency_ms if device.kind == "estimated" else 0.0
    return Cell(latency_ms, estimated_ms, f"{device.kind}: {source}")


def _with_table(device: Device, table: LatencyTable, measured: SearchSpace) -> Device:
    """Return the device of one table, that of the `measured` space."""

    def load(of: Device, space: SearchSpace) -> LatencyTable:
        found = with_fewer_classes(table, measured, space)
        if found is None:
            raise TableError(
                f"device {of.name}: its latencies are of space {table.space}, digest {table.space_digest}; "
                f"for space {space.name}, digest {space.digest}, make another device"
            )
        return found

    return device.with_functions(table=load)


def _price_blocks(price: Callable[[BlockSpec], float], device: Device, space: SearchSpace) -> LatencyTable:
    def cell(block: BlockSpec) -> Cell:
        latency_ms = device.ms_of(price, block, f"block {block.name}") if block.layers else 0.0
        return _cell(device, latency_ms, "a function of the block")

    return build_table(device, space, _cell(device, device.fixed_ms, "given as fixed_ms"), cell)


def _fit_blocks(device: Device, network: Callable[[Arch], float], space: SearchSpace) -> Device:
    """Fit a function of networks by a cell for each candidate and a fixed part, all at or above 0."""
    indices, are_all = _design(space)
    archs = [arch_from_indices(space, tuple(row)) for row in indices.tolist()]
    latency_ms = np.array([device.ms_of(network, arch, " ".join(arch.choices)) for arch in archs])
    if (latency_ms == 0).any():
        raise TableError(f"device {device.name}: its function returned 0 ms for a network")
    sizes = [len(position.candidates) for position in space.positions]
    # (networks, 1 + candidates): ones, and 1 where a network has a candidate
    one_hot = [np.eye(size)[indices[:, at]] for at, size in enumerate(sizes)]
    matrix = np.concatenate([np.ones((len(indices), 1)), *one_hot], axis=1)
    weights = _fit(matrix, latency_ms)
    predicted = matrix @ weights
    if not are_all:
        for held in folds(len(indices), FOLDS):
            predicted[held] = matrix[held] @ _fit(matrix[~held], latency_ms[~held])
    accuracy, constant_pct = figures(predicted, latency_ms), constant_error_pct(latency_ms)
    if accuracy.rmspe_pct > 0.5 * constant_pct:
        raise TableError(
            f"device {device.name}: the latencies of its function do not follow a sum over blocks: the "
            f"best sum is {accuracy.rmspe_pct:.1f}% off on networks left out, one latency for all networks "
            f"{constant_pct:.1f}%; a search needs latencies that add up over blocks"
        )
    # the same sums with the fastest candidate of each position at 0: the fixed part is the fastest network
    rows = np.split(weights[1:], np.cumsum(sizes)[:-1])
    fixed_ms = float(weights[0] + sum(row.min() for row in rows))
    source = f"a function of the network, fitted to {len(indices)} networks"
    entry = {ALL_NETWORKS if are_all else CROSS_VALIDATED: {"all": accuracy}}
    device = device.model_copy(update={"source": source, "accuracy": entry})
    table = build_table(device, space, _cell(device, fixed_ms, source), lambda _: _cell(device, 0.0, source))
    cells = tuple(tuple(_cell(device, float(ms - row.min()), source) for ms in row) for row in rows)
    return _with_table(device, replace(table, cells=cells), space)


def _design(space: SearchSpace) -> tuple[np.ndarray[Any, np.dtype[np.int64]], bool]:
    """Return networks as rows of candidate numbers, and whether they are all networks of the space.

    In a sample each candidate of a position occurs equally often, give or take one.
    """
    sizes = [len(position.candidates) for position in space.positions]
    n = max(LEAST_NETWORKS, NETWORKS_PER_EFFECT * (1 + sum(size - 1 for size in sizes)))
    if math.prod(sizes) <= n:
        return np.array(list(product(*map(range, sizes))), dtype=np.int64), True
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(np.arange(n) % size) for size in sizes], axis=1), False


def _fit(matrix: Array, latency_ms: Array) -> Array:
    """Return the weights, 0 or more, of least squared relative error."""
    weights, _ = nnls(matrix / latency_ms[:, None], np.ones(len(matrix)), maxiter=100 * matrix.shape[1])
    return np.asarray(weights, dtype=np.float64)


def _records(blocks: Any) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a CSV file, of a DataFrame (pandas or polars), or the dictionaries themselves."""
    if isinstance(blocks, str | Path):
        text = read_text(Path(blocks), TableError, "a CSV of measured blocks", limit=TABLE_BYTES)
        return [row for _, row in csv_rows(text, str(blocks), TableError, BLOCK_COLUMNS)]
    rows: Any = blocks
    if hasattr(blocks, "to_dicts"):
        rows = blocks.to_dicts()
    elif hasattr(blocks, "to_dict"):
        rows = blocks.to_dict("records")
    if not isinstance(rows, Iterable) or isinstance(rows, Mapping | bytes):
        raise UsageError(f"`blocks={quoted(blocks)}`: expected a CSV file, a DataFrame or dictionaries")
    found: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UsageError(f"`blocks`: row {number} is {quoted(row)}, expected a dictionary")
        found.append(row)
    return found


def _text(value: Any) -> str:
    """Write a value as in a CSV file: nothing for None and NaN, whole numbers without a point."""
    try:
        if value is None or value != value:  # NaN, of whatever library
            return ""
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return str(value)
    except (TypeError, ValueError):  # pandas' NA, an array, a number of thousands of digits
        return ""
