"""One operator of an ONNX graph, as a kernel that latency models know."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qnas.latency.kernels import Kernel
from qnas.latency.onnx.tensors import Reader
from qnas.latency.onnx.values import Node

# direct: an operator that the models know; stand-in: priced as another one with the same
# multiply-adds; uncovered: neither
Status = Literal["direct", "stand-in", "uncovered"]

UNCOVERED = "elementwise"
# Uncovered operators that some devices know by these names; the others price them as UNCOVERED.
NAMED = {"LeakyRelu": "leakyrelu", "GroupNormalization": "groupnorm", "Pad": "pad", "Resize": "upsample"}


@dataclass(frozen=True)
class OnnxOperator:
    """One operator, or a composition that is one."""

    name: str  # of its nodes, joined by "+"
    op: str  # their ONNX operators, joined by "+"
    kernel: Kernel
    macs: int = 0  # for one image
    status: Status = "direct"


def side(area: int) -> int:
    """Return the side of the smallest square with at least this area.

    >>> side(49), side(50)
    (7, 8)
    """
    return math.isqrt(max(1, area) - 1) + 1


def operator_of(node: Node, kernel: Kernel, macs: int = 0, status: Status = "direct") -> OnnxOperator:
    """Return a node as an operator."""
    return OnnxOperator(node.name, node.op, kernel, macs, status)


def pass_over(reader: Reader, node: Node, kind: str, tensor: str, status: Status = "direct") -> OnnxOperator:
    """Return an operator that passes over a tensor and keeps its size."""
    pixels, channels = reader.map_of(tensor)
    return operator_of(node, Kernel(kind, side(pixels), channels, channels), status=status)


def uncovered(reader: Reader, node: Node) -> OnnxOperator:
    """Return an operator that few latency models know: a pass over the largest of its tensors."""
    tensors = [*reader.activations(node), *filter(None, node.outputs)]
    largest = max(tensors, key=lambda name: math.prod(reader.shapes[name]))
    return pass_over(reader, node, NAMED.get(node.op, UNCOVERED), largest, "uncovered")


def windowed(
    reader: Reader,
    node: Node,
    kind: str,
    window: Sequence[int],
    *,
    c_in: int | None = None,
    macs: int = 0,
    status: Status = "direct",
    groups: int = 1,
) -> OnnxOperator:
    """Return an operator of windows, with the resolution that gives its output for any padding."""
    x, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
    strides: list[int] = node.attribute("strides") or [1] * len(window)
    stride = max(1, round(float(math.prod(strides) ** (1 / len(window)))))
    px, out_px = side(math.prod(x[2:])), side(math.prod(y[2:]))
    kernel = Kernel(kind, px, c_in or x[1], y[1], side(math.prod(window)), stride, max(1, x[0]), groups)
    if kernel.out_px != out_px:
        kernel = replace(kernel, resolution_px=out_px * stride)
    return operator_of(node, kernel, macs, status)
