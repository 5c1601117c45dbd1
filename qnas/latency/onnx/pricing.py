"""The latencies of the kernels of an ONNX network on a device."""

from collections.abc import Sequence
from dataclasses import replace

from qnas.common.errors import TableError
from qnas.latency.device import Device
from qnas.latency.device_table import KernelRow
from qnas.latency.kernels import Kernel, fused_parts
from qnas.latency.onnx.networks import OnnxNetwork
from qnas.latency.onnx.operators import OnnxOperator


def predict_onnx(device: Device, network: OnnxNetwork) -> tuple[KernelRow, ...]:
    """Return the latencies of the kernels of a network by the device's model.

    A network takes their sum plus `device.network_ms`. Raises TableError
    where the device has no model, or lacks what uncovered operators are priced by.
    """
    return tuple(
        _price(device, chain[part], kernel)
        for chain in network.chains
        for part, kernel in fused_parts([operator.kernel for operator in chain], device.fusion)
    )


# The kinds by which one is priced where a device does not know it: the same multiply-adds or the same pass.
_STAND_INS = {"matmul": ("conv1x1", "linear")}
_PASSES = ("elementwise", "add")


def _price(device: Device, part: Sequence[OnnxOperator], kernel: Kernel) -> KernelRow:
    def row(priced_as: Kernel, kind: str) -> KernelRow:
        name, op = "+".join(o.name for o in part), "+".join(o.op for o in part)
        return KernelRow(name, kernel, device.kernel_ms(priced_as), kind, op)

    kind = _known(device, kernel)
    if kind is not None and part[0].status != "uncovered":
        kind = "estimated" if part[0].status == "stand-in" else kind
        return row(kernel, kind)
    for other in _STAND_INS.get(kernel.kind, ()):
        stand_in = replace(kernel, kind=other)
        if _known(device, stand_in) is not None:
            return row(stand_in, "estimated")
    passes = [replace(kernel, kind=other, kernel=1, stride=1) for other in _PASSES]
    chosen = next((k for k in passes if _known(device, k) is not None), passes[-1])
    return row(chosen, "uncovered")


def _known(device: Device, kernel: Kernel) -> str | None:
    try:
        return device.kernel_source(kernel)
    except TableError:
        return None
