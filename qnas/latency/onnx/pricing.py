"""The latencies of the kernels of an ONNX network on a device."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qnas.common.errors import TableError
from qnas.latency.device import Device
from qnas.latency.kernels import Kernel, fuse_operators
from qnas.latency.onnx.networks import OnnxNetwork
from qnas.latency.onnx.operators import OnnxOperator


@dataclass(frozen=True)
class OnnxRow:
    """A kernel of the network with its predicted latency.

    `kind` is measured, fitted or estimated, or uncovered where the device does not know the kernel:
    it is priced as a pass over its map, as `add`.
    """

    name: str  # of the nodes that it runs
    op: str
    kernel: Kernel
    latency_ms: float
    kind: str


def predict_onnx(device: Device, network: OnnxNetwork) -> tuple[OnnxRow, ...]:
    """Return what the kernels of a network take by the device's model.

    The network takes the sum of them and what every network takes on that device. Raises TableError
    where the device has no model, or lacks what uncovered operators are priced by.
    """
    return tuple(
        _price(device, part, kernel)
        for chain in network.chains
        for part, kernel in _fused(chain, device.fusion)
    )


def coverage(rows: Iterable[OnnxRow], *, runtime_ms: float = 0.0) -> float:
    """Return the share of a latency that rests on measured or fitted models, 0 to 1.

    `runtime_ms` is what every network takes besides its kernels; it counts as covered.
    """
    known = list(rows)
    total = math.fsum([runtime_ms, *(row.latency_ms for row in known)])
    covered = math.fsum(
        [runtime_ms, *(row.latency_ms for row in known if row.kind in ("measured", "fitted"))]
    )
    return covered / total if total > 0 else 1.0


def _fused(chain: Sequence[OnnxOperator], fusion: str) -> Iterator[tuple[tuple[OnnxOperator, ...], Kernel]]:
    """Yield the kernels of a chain, each with the operators that it stands for."""
    start = 0
    while start < len(chain):
        for stop in range(len(chain), start, -1):
            kernels = fuse_operators([o.kernel for o in chain[start:stop]], fusion)
            if len(kernels) == 1:  # the longest sequence that is one kernel, as `fuse_operators` takes it
                yield tuple(chain[start:stop]), kernels[0]
                start = stop
                break


# What a kind is priced by where a device does not know it: the same multiply-adds or the same pass.
_STAND_INS = {"matmul": ("conv1x1", "linear")}


_PASSES = ("elementwise", "add")


def _price(device: Device, part: Sequence[OnnxOperator], kernel: Kernel) -> OnnxRow:
    name, op = "+".join(o.name for o in part), "+".join(o.op for o in part)
    kind = _known(device, kernel)
    if kind is not None and part[0].status != "uncovered":
        kind = "estimated" if part[0].status == "stand-in" else kind
        return OnnxRow(name, op, kernel, device.kernel_ms(kernel), kind)
    for other in _STAND_INS.get(kernel.kind, ()):
        stand_in = replace(kernel, kind=other)
        if _known(device, stand_in) is not None:
            return OnnxRow(name, op, kernel, device.kernel_ms(stand_in), "estimated")
    passes = [replace(kernel, kind=other, kernel=1, stride=1) for other in _PASSES]
    chosen = next((k for k in passes if _known(device, k) is not None), passes[-1])
    return OnnxRow(name, op, kernel, device.kernel_ms(chosen), "uncovered")


def _known(device: Device, kernel: Kernel) -> str | None:
    try:
        return device.kernel_source(kernel)
    except TableError:
        return None
