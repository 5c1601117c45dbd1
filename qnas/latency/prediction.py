"""The predicted latency of one network on one device, and its most expensive layers.

Latencies come from the device's own table or model, or from nn-Meter's predictors once imported.
The total of a network of a space is that of the latency table, which search and derivation use too. Its
parts are the device's kernels where it has a model of kernels, otherwise the table's blocks.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnas.common.errors import TableError, UsageError, abbreviate, one_line
from qnas.latency.device import Device
from qnas.latency.device_table import KernelRow, load_table, predict_blocks
from qnas.latency.energy import network_mj
from qnas.latency.intervals import Interval
from qnas.latency.kernels import GROUPED, Kernel, fuse, fused_parts, of_one_group
from qnas.latency.nn_meter import predictors
from qnas.latency.nn_meter import tables as nn_meter
from qnas.latency.onnx.networks import OnnxNetwork
from qnas.latency.onnx.onnx_operator import NAMED, OnnxOperator
from qnas.latency.table import LatencyTable
from qnas.spaces.arch import Arch
from qnas.spaces.lower import layers_of, lower
from qnas.spaces.space import SearchSpace

# Sources of latencies.
DEVICE = "device"
NN_METER = "nn-meter"
# Kinds of parts that rest on measurements; the others make coverage less than 1.
FROM_MEASUREMENTS = ("measured", "fitted", "direct")
ENOUGH_MEASURED = 0.8  # the coverage below which a latency is said to be mostly an estimate of some kernels


@dataclass(frozen=True)
class Part:
    """A kernel or block of a network with its latency."""

    name: str  # of the block or node
    what: str  # empty for a fixed block of a table
    latency_ms: float
    kind: str  # measured, fitted, estimated; direct, stand-in, uncovered


@dataclass(frozen=True)
class Layer:
    """All kernels of a network with the same shape."""

    what: str
    where: tuple[str, ...]  # the name of the block or node of each
    latency_ms: float  # of all of them
    kind: str


@dataclass(frozen=True)
class Prediction:
    """A network's latency on a device with its parts, in running order."""

    device: str
    latency_ms: float
    coverage: float  # share of the latency that rests on measurements
    margin: float  # share by which a measurement may exceed the prediction; 0 if unknown
    parts: tuple[Part, ...]
    batchnorm_ms: float | None = None  # the same choices with batch norms; None if no layer norm is there
    note: str = ""  # on the sources of the parts
    per_image: str = ""  # of a throughput device: "an image at batch 256"
    interval: Interval | None = None  # of a measurement; None where the device has no errors to tell from
    energy_mj: float | None = None  # None where the device's file states no energies

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The parts, with those of the same shape summed, the most expensive first."""
        alike: dict[tuple[str, str], list[Part]] = {}
        for part in self.parts:
            alike.setdefault((part.what or part.name, part.kind), []).append(part)
        layers = [
            Layer(what, tuple(p.name for p in parts), math.fsum(p.latency_ms for p in parts), kind)
            for (what, kind), parts in alike.items()
        ]
        return tuple(sorted(layers, key=lambda layer: -layer.latency_ms))

    def facts(self, dearest: int) -> dict[str, Any]:
        """Return the prediction as JSON values, with the most expensive layers in place of the parts."""
        facts = {name: value for name, value in vars(self).items() if name != "parts"}
        facts["interval"] = vars(self.interval) if self.interval is not None else None
        facts["images_per_s"] = 1e3 / self.latency_ms if self.per_image and self.latency_ms > 0 else None
        return facts | {"dearest": [vars(layer) for layer in self.layers[:dearest]]}


def estimated_ms(parts: Iterable[Part]) -> dict[str, float]:
    """Return the milliseconds that no measurement backs, by kind of kernel (else by block), most first."""
    found: dict[str, float] = {}
    for part in parts:
        if part.kind not in FROM_MEASUREMENTS:
            kind = (part.what or part.name).partition(",")[0].partition(" ")[0]  # as `describe_kernel` begins
            found[kind] = found.get(kind, 0.0) + part.latency_ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def check_source(latency: str) -> None:
    """Raise UsageError for an unknown source of latencies."""
    if latency not in (DEVICE, NN_METER):
        raise UsageError(f"`latency={latency!r}`: expected {DEVICE} or {NN_METER}")


def table_from(latency: str, device: Device, space: SearchSpace) -> LatencyTable:
    """Return the table of a space on a device. Raises TableError where the source has none."""
    check_source(latency)
    return nn_meter.compute_table(device, space) if latency == NN_METER else load_table(device, space)


def can_predict(latency: str, device: Device) -> bool:
    """Whether the source knows this device."""
    return latency != NN_METER or predictors.is_imported(device.name)


def predict_arch(latency: str, device: Device, space: SearchSpace, arch: Arch) -> Prediction:
    """Predict a network of a space. Raises TableError as `table_from`."""
    table = table_from(latency, device, space)
    indices = arch.indices(space)
    parts = arch_parts(latency, device, table, space, arch)
    batchnorm_ms = _with_batch_norms(latency, device, space, arch) if device.prices_kernels else None
    latency_ms = table.latency_ms(indices)
    kernels = (kernel for block in lower(space, arch) for kernel in fuse(block.layers, device.fusion))
    return Prediction(
        table.device,
        latency_ms,
        table.coverage(indices),
        table.margin,
        tuple(parts),
        batchnorm_ms,
        source_note(latency, device, space, arch),
        device.per_image,
        interval=table.interval(indices),
        energy_mj=network_mj(device, kernels, latency_ms),
    )


def arch_parts(
    latency: str, device: Device, table: LatencyTable, space: SearchSpace, arch: Arch
) -> list[Part]:
    """Return the kernels of a network of a space, or its blocks on a device with tables alone."""
    if latency == NN_METER:
        return _parts(nn_meter.predict_rows(device, lower(space, arch)))
    if device.prices_kernels:
        return _parts(predict_blocks(device, lower(space, arch)))
    return _table_parts(table, space, arch)


def _with_batch_norms(latency: str, device: Device, space: SearchSpace, arch: Arch) -> float | None:
    """Return the latency of the same choices with batch norms; None for a network without layer norms."""
    if all(layer.op != "layernorm" for layer in layers_of(lower(space, arch))):
        return None
    other = space.with_norm("batchnorm")
    chosen = (p.candidate(name) for p, name in zip(space.positions, arch.choices, strict=True))
    choices = Arch(tuple(candidate.with_spaces_norm.name for candidate in chosen))
    return table_from(latency, device, other).latency_ms(choices.indices(other))


def source_note(latency: str, device: Device, space: SearchSpace, arch: Arch) -> str:
    """Return a note on the source of a prediction, if it prices some operators as others."""
    if latency != NN_METER:
        return ""
    return _describe(nn_meter.cover(nn_meter.predict_rows(device, lower(space, arch))))


def predict_file(latency: str, device: Device, network: OnnxNetwork) -> Prediction:
    """Predict an ONNX file. Raises TableError where the device has no model of kernels."""
    check_source(latency)
    rows = predict_onnx(device, network)
    parts = _parts(rows)
    runtime_ms, notes = device.network_ms, []
    if latency == NN_METER:
        # nn-Meter does not know operators that qnas does not know: they keep the device's latency of a pass
        known = [row for row in rows if row.kind != "uncovered"]
        mapped = nn_meter.map_kernels(device, [(row.name, row.kernel) for row in known])
        parts = [part for part in parts if part.kind == "uncovered"] + _parts(mapped)
        runtime_ms = 0.0
        notes.append(_describe(nn_meter.cover(mapped)))
    stand_ins, uncovered = not_known([device], network.operators)
    if stand_ins:
        notes.append(f"estimated, each priced by its multiply-adds: {_counted(stand_ins)}")
    if uncovered:
        notes.append(f"uncovered, each priced as a pass over its map: {_counted(uncovered)}")
    if network.changes_of_precision:
        notes.append(
            f"{network.changes_of_precision} changes of precision, not priced: all as in {device.precision}"
        )
    total = math.fsum([runtime_ms, *(part.latency_ms for part in parts)])
    if not 0 < total < math.inf:
        raise TableError(
            f"device {device.name}: {network.path} takes {total} ms in all, expected more than 0 and an end"
        )
    unknown = math.fsum(p.latency_ms for p in parts if p.kind not in FROM_MEASUREMENTS)
    uncertainty = device.known_uncertainty if latency == DEVICE else None
    return Prediction(
        device.name,
        total,
        1.0 - unknown / total,
        device.margin,
        tuple(parts),
        note="; ".join(notes),
        per_image=device.per_image,
        interval=uncertainty.widest(total, unknown) if uncertainty is not None else None,
        energy_mj=network_mj(device, (row.priced_as or row.kernel for row in rows), total),
    )


def predict_onnx(device: Device, network: OnnxNetwork) -> tuple[KernelRow, ...]:
    """Return the latencies of the kernels of an ONNX network by the device's model.

    A network takes their sum plus `device.network_ms`. Raises TableError where the device has no model,
    or lacks the kinds by which other operators are priced.
    """
    return tuple(
        price_part(device, chain[part], kernel)
        for chain in network.chains
        for part, kernel in fused_parts([operator.kernel for operator in chain], device.fusion)
    )


def _counted(operators: Mapping[str, int]) -> str:
    """Name operators with their numbers."""
    return abbreviate([f"{one_line(op, 60)} ({n})" for op, n in operators.items()], most=12)


# Kinds of a pass, which price other passes that a device does not know.
_PASSES = ("elementwise", "add")


def _products(kernel: Kernel) -> Iterable[Kernel]:
    """Return kernels with the same multiply-adds, which price products that a device does not know."""
    fan_in = kernel.kernel**2 * (1 if kernel.kind == "dwconv" else kernel.c_in)
    alike = replace(kernel, resolution_px=kernel.out_px, c_in=fan_in, kernel=1, stride=1)
    rows = replace(alike, resolution_px=1, batch=kernel.rows)
    return replace(alike, kind="conv1x1"), replace(alike, kind="conv"), replace(rows, kind="linear")


def price_part(device: Device, part: Sequence[OnnxOperator], kernel: Kernel) -> KernelRow:
    """Return the latency of the kernel that a part of a chain becomes. Raises TableError as predict_onnx."""
    if kernel.kind == GROUPED and _known(device, kernel) is None:
        kernel = of_one_group(kernel)
    source, status = _known(device, kernel), part[0].status
    by_name = kernel.kind in _OF_FEW
    if source is not None and (status != "uncovered" or by_name):
        priced_as, kind = kernel, "estimated" if status == "stand-in" and not by_name else source
    else:
        # what multiplies is never priced as a pass
        if any(operator.macs for operator in part):
            others = [(other, "estimated") for other in _products(kernel)]
        else:
            others = [(replace(kernel, kind=k, kernel=1, stride=1), "uncovered") for k in _PASSES]
        priced_as, kind = next((o for o in others if _known(device, o[0]) is not None), others[-1])
    name = "+".join(o.name for o in part)
    return KernelRow(name, kernel, device.kernel_ms(priced_as), kind, priced_as=priced_as)


# Kinds that few devices know: a stand-in or uncovered where they do not.
_OF_FEW = (GROUPED, *NAMED.values())


def not_known(
    devices: Sequence[Device], operators: Iterable[OnnxOperator]
) -> tuple[dict[str, int], dict[str, int]]:
    """Count the operators by name that a device prices as stand-ins, and those that are uncovered on one."""
    counts: dict[str, Counter[str]] = {"stand-in": Counter(), "uncovered": Counter()}
    for operator in operators:
        by_name = operator.kernel.kind in _OF_FEW
        if operator.status in counts and not (by_name and _all_know(devices, operator.kernel)):
            counts[operator.status][operator.op] += 1
    return dict(counts["stand-in"]), dict(counts["uncovered"])


def _all_know(devices: Sequence[Device], kernel: Kernel) -> bool:
    return all(_known(device, kernel) is not None for device in devices)


def _known(device: Device, kernel: Kernel) -> str | None:
    return device.kernel_source(kernel) if device.prices(kernel) else None


def _parts(rows: Iterable[KernelRow]) -> list[Part]:
    return [
        Part(row.name, describe_kernel(row.kernel), row.latency_ms, getattr(row, "mapped", row.kind))
        for row in rows
    ]


def _describe(coverage: nn_meter.Coverage) -> str:
    shares = ", ".join(f"{mapped} {share:.0%}" for mapped, share in coverage.shares.items())
    if not coverage.outside:
        return shares
    return (
        f"{shares}; {coverage.outside} of {coverage.kernels} kernels ({coverage.outside_share:.0%} of the "
        "latency) of sizes that the forests were not trained on, and forests do not extrapolate"
    )


def _table_parts(table: LatencyTable, space: SearchSpace, arch: Arch) -> list[Part]:
    chosen = zip(space.positions, arch.choices, table.cells, arch.indices(space), strict=True)
    cells = [(name, "", cell) for name, cell in table.fixed]
    cells += [(position.name, choice, row[i]) for position, choice, row, i in chosen]
    return [
        Part(name, what, cell.latency_ms, "estimated" if cell.estimated_ms else "measured")
        for name, what, cell in cells
    ]


def describe_kernel(kernel: Kernel) -> str:
    """Write a kernel in a few words.

    >>> describe_kernel(Kernel("conv", 56, 24, 40, 3, 2)), describe_kernel(Kernel("add", 7, 96, 96))
    ('conv 3x3 stride 2, 56 px, 24 > 40', 'add, 7 px, 96')
    """
    size = f" {kernel.kernel}x{kernel.kernel}" if kernel.kernel > 1 else ""
    stride = f" stride {kernel.stride}" if kernel.stride > 1 else ""
    channels = f"{kernel.c_in}" + (f" > {kernel.c_out}" if kernel.c_out != kernel.c_in else "")
    return f"{kernel.kind}{size}{stride}, {kernel.resolution_px} px, {channels}"
