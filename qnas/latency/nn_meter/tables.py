"""Latencies by nn-Meter (MobiSys 2021): its own prediction code, with the imported forests.

nn-Meter prices a network as the sum of its fused kernels, each by a random forest of its kind. It has no
fixed latency for a network, so the fixed part of a table is zero. Kernels are priced in three ways:

- direct: by the forest of its operator. nn-Meter has one forest for a convolution, with or without folded
  norm and ReLU, as we do; a sum is priced with or without a ReLU, which costs nothing once fused.
- stand-in: by the forest of another operator that touches as many elements.
- uncovered: nn-Meter has no forest for it and would count 0 ms without a warning. The device's own
  model prices the kernel.

Stand-ins and uncovered kernels are the estimated part of a latency. A forest does not extrapolate, and
rounds a size to one that it was trained on: kernels of other sizes are counted (`in_range`).

The package nn_meter is imported at the first prediction. That takes a second and writes a configuration
into the home folder, for which it is given a temporary folder.
"""

import importlib.util
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from qnas.common.errors import TableError, one_line
from qnas.latency.device import Device
from qnas.latency.device_table import KernelRow, build_table, cell_of, load_table
from qnas.latency.kernels import Kernel, fuse
from qnas.latency.nn_meter import predictors
from qnas.latency.nn_meter.forests import Forest
from qnas.latency.table import Cell, LatencyTable
from qnas.spaces.lower import BlockSpec, all_blocks
from qnas.spaces.space import SearchSpace

NN_METER, SETUPTOOLS = '"nn-meter>=2.0,<3"', '"setuptools>=77.0.3,<81"'  # for its pkg_resources
REQUIREMENTS = f"{NN_METER} {SETUPTOOLS}"

Mapped = Literal["direct", "stand-in", "uncovered"]
MAPPINGS: tuple[Mapped, ...] = ("direct", "stand-in", "uncovered")


class PricingForest(NamedTuple):
    """A forest that can price a kernel."""

    predictor: str
    mapped: Mapped


# Kind of kernel -> the forests that can price it. The first one that the device has is used.
FORESTS_OF_KIND: dict[str, tuple[PricingForest, ...]] = {
    "conv": (PricingForest("conv-bn-relu", "direct"),),
    "conv1x1": (PricingForest("conv-bn-relu", "direct"),),
    "patch": (PricingForest("conv-bn-relu", "direct"),),
    "dwconv": (PricingForest("dwconv-bn-relu", "direct"),),
    "linear": (PricingForest("fc", "direct"),),
    "gap": (PricingForest("global-avgpool", "direct"),),
    "maxpool": (PricingForest("maxpool", "direct"),),
    "avgpool": (PricingForest("avgpool", "direct"),),
    "batchnorm": (PricingForest("bn", "direct"),),
    "relu": (PricingForest("relu", "direct"),),
    "hswish": (PricingForest("hswish", "direct"),),
    "add": (PricingForest("add", "direct"), PricingForest("addrelu", "direct")),
    "addrelu": (PricingForest("addrelu", "direct"),),
    "split": (PricingForest("split", "direct"),),
    "shuffle": (PricingForest("channelshuffle", "direct"),),
    "mul": (PricingForest("add", "stand-in"), PricingForest("addrelu", "stand-in")),  # two maps in, one out
    "square": (PricingForest("relu", "stand-in"),),  # a map in, a map out
    "scale": (PricingForest("bn", "stand-in"),),  # a factor per channel
    "layernorm": (PricingForest("bn", "stand-in"),),
    "gelu": (PricingForest("hswish", "stand-in"),),
    "hsigmoid": (PricingForest("hswish", "stand-in"),),
    "clip": (PricingForest("relu", "stand-in"),),
    # concat: its forest needs the channels of each part, which a kernel does not hold
}


class _Trained(NamedTuple):
    """The sizes that forests were trained on: input pixels, kernel sizes, strides."""

    px: tuple[int, ...]
    kernels: tuple[int, ...] = (1,)
    strides: tuple[int, ...] = (1,)


# As nn-Meter samples its training data (its prior_distribution_sampler). fc and the global pool are
# priced by their channels alone.
_PX = (1, 3, 7, 14, 28, 56, 112, 224)
_POOL = _Trained((14, 28, 56, 112, 224), (2, 3), (1, 2))
_MAP = _Trained(_PX)
TRAINED: dict[str, _Trained] = {
    "conv-bn-relu": _Trained((1, 3, 7, 8, 13, 14, 27, 28, 32, 56, 112, 224), (1, 3, 5, 7), (1, 2, 4)),
    "dwconv-bn-relu": _Trained(_PX, (1, 3, 5, 7), (1, 2)),
    "maxpool": _POOL,
    "avgpool": _POOL,
    **dict.fromkeys(("add", "addrelu", "bn", "relu", "hswish", "split", "channelshuffle"), _MAP),
}


@dataclass(frozen=True)
class MappedRow(KernelRow):
    """A kernel of a network with its latency; `kind` is fitted where direct, else estimated."""

    mapped: Mapped = "uncovered"
    predictor: str = ""  # nn-Meter's name; empty where uncovered
    in_range: bool = True  # whether the forest was trained on kernels of this size


def predict_rows(device: Device, blocks: Iterable[BlockSpec]) -> tuple[MappedRow, ...]:
    """Return the kernels of these blocks by nn-Meter. Raises TableError as `map_kernels`."""
    return map_kernels(
        device, [(block.name, kernel) for block in blocks for kernel in fuse(block.layers, device.fusion)]
    )


def map_kernels(device: Device, kernels: Sequence[tuple[str, Kernel]]) -> tuple[MappedRow, ...]:
    """Return the latencies of these kernels by nn-Meter, each given with the name of its block or node.

    Raises TableError where the device's predictors were not imported, with the way to import
    them and the device's own prediction, and where neither nn-Meter nor that model knows a kernel.
    """

    _check_imported(
        device, lambda: [math.fsum([device.network_ms, *(device.kernel_ms(kernel) for _, kernel in kernels)])]
    )
    estimates = estimate(device, (kernel for _, kernel in kernels))
    return tuple(replace(estimates[kernel], name=name) for name, kernel in kernels)


def compute_table(device: Device, space: SearchSpace) -> LatencyTable:
    """Return the table of a space's deployed networks by nn-Meter. Raises TableError as `map_kernels`."""

    def default() -> list[float]:
        own = load_table(device, space)
        return [own.fastest_ms, own.slowest_ms]

    _check_imported(device, default)
    blocks = [block for block, _ in all_blocks(space)]
    estimates = estimate(device, (kernel for b in blocks for kernel in fuse(b.layers, device.fusion)))

    def price(block: BlockSpec) -> Cell:
        rows = [estimates[kernel] for kernel in fuse(block.layers, device.fusion)]
        return cell_of(rows, describe_mapping(rows))

    runtime = Cell(0.0, 0.0, "nn-Meter: a network takes the sum of its kernels")
    return build_table(device, space, runtime, price)


def describe_mapping(rows: Iterable[MappedRow]) -> str:
    """Name the operators by how they were priced: `direct: dwconv, add; stand-in: gelu by hswish`."""
    rows = tuple(rows)
    parts = []
    for mapped in MAPPINGS:
        names = [
            f"{row.kernel.kind} by {row.predictor}" if mapped == "stand-in" else row.kernel.kind
            for row in rows
            if row.mapped == mapped
        ]
        if names:
            parts.append(f"{mapped}: {', '.join(dict.fromkeys(names))}")
    outside = sum(not row.in_range for row in rows)
    if outside:
        parts.append(f"{outside} of {len(rows)} kernels of sizes that the forests were not trained on")
    return "; ".join(parts)


@dataclass(frozen=True)
class Coverage:
    """The shares of a network's latency by their source, 0 to 1, and the kernels out of range."""

    shares: Mapping[Mapped, float]
    kernels: int
    outside: int  # kernels of sizes that their forests were not trained on
    outside_share: float


def cover(rows: Sequence[MappedRow]) -> Coverage:
    """Return the coverage of these kernels' latency."""
    total = math.fsum(row.latency_ms for row in rows) or 1.0
    shares = {
        mapped: math.fsum(row.latency_ms for row in rows if row.mapped == mapped) / total
        for mapped in MAPPINGS
    }
    outside = [row.latency_ms for row in rows if not row.in_range]
    return Coverage(shares, len(rows), len(outside), math.fsum(outside) / total)


def _check_imported(device: Device, default: Callable[[], list[float]]) -> None:
    """Raise TableError where there are no predictors, with the latencies of the device's own model."""
    if predictors.is_imported(device.name):
        return
    try:
        own_ms = " to ".join(dict.fromkeys(f"{ms:.4g}" for ms in default()))
        without = f"; without `latency='nn-meter'`, {device.name}'s own model says {own_ms} ms"
    except TableError:  # it has none
        without = ""
    raise TableError(
        f"no nn-Meter predictors for {device.name}: {predictors.download_hint(device.name)}{without}"
    )


def estimate(device: Device, kernels: Iterable[Kernel]) -> dict[Kernel, MappedRow]:
    """Price kernels in one call of nn-Meter. Raises TableError where neither it nor the device knows one."""
    distinct = tuple(dict.fromkeys(kernels))
    available = predictors.describe_predictors(device.name).forests
    chosen = {kernel: choice for kernel in distinct if (choice := _choose(kernel, available)) is not None}
    priced = _predict(device.name, {kernel: choice.predictor for kernel, choice in chosen.items()})
    found = {}
    for kernel in distinct:
        # a forest trained on noise may predict 0 or less, which is no latency
        if priced.get(kernel, 0.0) > 0:
            predictor, mapped = chosen[kernel]
            kind, known = "fitted" if mapped == "direct" else "estimated", in_range(kernel, predictor)
            found[kernel] = MappedRow("", kernel, priced[kernel], kind, mapped, predictor, known)
        else:
            found[kernel] = MappedRow("", kernel, device.kernel_ms(kernel), "estimated")
    return found


def _choose(kernel: Kernel, available: Iterable[str]) -> PricingForest | None:
    if kernel.batch != 1:  # nn-Meter measured single images
        return None
    return next(
        (choice for choice in FORESTS_OF_KIND.get(kernel.kind, ()) if choice.predictor in available), None
    )


def in_range(kernel: Kernel, predictor: str) -> bool:
    """Whether a predictor was trained on kernels of this size; its range of channels is not published."""
    trained = TRAINED.get(predictor)
    return trained is None or (
        kernel.resolution_px in trained.px
        and kernel.kernel in trained.kernels
        and kernel.stride in trained.strides
    )


@dataclass
class _Recorder:
    """A predictor as nn-Meter calls it, which records its predictions: nn-Meter returns only their sum."""

    forest: Forest
    predictions: list[float] = field(default_factory=list)

    def predict(self, rows: Sequence[Sequence[float]]) -> list[float]:
        values: list[float] = self.forest.predict(rows).tolist()
        self.predictions += values
        return values


def _predict(device: str, predictor_of: Mapping[Kernel, str]) -> dict[Kernel, float]:
    """Return the latency of each kernel by nn-Meter's code and the predictor of this name."""
    if not predictor_of:
        return {}
    forests = predictors.load_forests(device, dict.fromkeys(predictor_of.values()))
    recorders = {name: _Recorder(forest) for name, forest in forests.items()}
    total = _nn_predict()(recorders, [_unit(kernel, name) for kernel, name in predictor_of.items()])
    # nn-Meter keeps the order of kernels within a predictor
    predictions = {name: iter(recorder.predictions) for name, recorder in recorders.items()}
    priced = {kernel: next(predictions[name]) for kernel, name in predictor_of.items()}
    assert math.isclose(total, math.fsum(priced.values()), rel_tol=1e-9, abs_tol=1e-9), "kernels left out"
    return priced


def _unit(kernel: Kernel, predictor: str) -> dict[str, Any]:
    """Return a kernel in the form of nn-Meter's kernel detector."""
    px, channels = kernel.resolution_px, kernel.c_in
    return {
        "op": predictor.replace("addrelu", "add-relu"),
        "inputh": px,
        "cin": channels,
        "cout": kernel.c_out,
        "ks": [kernel.kernel, kernel.kernel],
        "strides": [kernel.stride, kernel.stride],
        "input_tensors": [[1, px, px, channels], [1, px, px, channels]],
    }


def why_not_importable() -> tuple[str, str] | None:
    """Return what keeps nn-Meter from being imported, with the remedy; None where nothing known does."""
    if importlib.util.find_spec("nn_meter") is None:
        return "nn-Meter is not installed", f"pip install {NN_METER}"
    if importlib.util.find_spec("pkg_resources") is None:
        return "nn-Meter needs pkg_resources, which newer setuptools lack", f"pip install {SETUPTOOLS}"
    return None


def _nn_predict() -> Callable[[Mapping[str, Any], list[dict[str, Any]]], float]:
    """Import nn-Meter's prediction.

    Its package writes ~/.nn_meter when it is imported and fails where it cannot, though nothing here needs
    it. Its import of pkg_resources warns. Raises TableError where it is not installed in full.
    """
    kept = {name: os.environ.get(name) for name in ("HOME", "USERPROFILE")}
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.update(dict.fromkeys(kept, home))
        try:
            from nn_meter.predictor.prediction.predict_by_kernel import (  # type: ignore[import-untyped]
                nn_predict,
            )
        except ImportError as error:
            found, advice = why_not_importable() or (f"nn-Meter cannot be imported ({one_line(error)})", "")
            raise TableError(f"{found}: {advice or f'pip install {REQUIREMENTS}'}") from error
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    predict: Callable[[Mapping[str, Any], list[dict[str, Any]]], float] = nn_predict
    return predict
