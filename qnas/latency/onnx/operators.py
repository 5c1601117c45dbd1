"""The nodes of an ONNX graph, read as the operators that latency models know."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qnas.latency.kernels import Kernel
from qnas.latency.onnx.tensors import Reader
from qnas.latency.onnx.values import Node

# direct: an operator that the models know; stand-in: priced as another one with the same
# multiply-adds; uncovered: neither
Status = Literal["direct", "stand-in", "uncovered"]


UNCOVERED = "elementwise"


@dataclass(frozen=True)
class OnnxOperator:
    """One operator, or a composition that is one."""

    name: str  # of its nodes, joined by "+"
    op: str  # their ONNX operators, joined by "+"
    kernel: Kernel
    macs: int = 0  # for one image
    status: Status = "direct"


def _side(area: int) -> int:
    """Return the side of the smallest square with at least this area.

    >>> _side(49), _side(50)
    (7, 8)
    """
    return math.isqrt(max(1, area) - 1) + 1


def _operator(node: Node, kernel: Kernel, macs: int = 0, status: Status = "direct") -> OnnxOperator:
    return OnnxOperator(node.name, node.op, kernel, macs, status)


def pass_over(reader: Reader, node: Node, kind: str, tensor: str, status: Status = "direct") -> OnnxOperator:
    """Return an operator that passes over a tensor and keeps its size."""
    pixels, channels = reader.map_of(tensor)
    return _operator(node, Kernel(kind, _side(pixels), channels, channels), status=status)


def _uncovered(reader: Reader, node: Node) -> OnnxOperator:
    tensors = [*reader.activations(node), *filter(None, node.outputs)]
    largest = max(tensors, key=lambda name: math.prod(reader.shapes[name]))
    return pass_over(reader, node, UNCOVERED, largest, "uncovered")


def _windowed(
    reader: Reader,
    node: Node,
    kind: str,
    window: Sequence[int],
    *,
    c_in: int | None = None,
    macs: int = 0,
    status: Status = "direct",
) -> OnnxOperator:
    """Return an operator of windows, with the resolution that gives its output for any padding."""
    x, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
    strides: list[int] = node.attribute("strides") or [1] * len(window)
    stride = max(1, round(float(math.prod(strides) ** (1 / len(window)))))
    px, out_px = _side(math.prod(x[2:])), _side(math.prod(y[2:]))
    kernel = Kernel(kind, px, c_in or x[1], y[1], _side(math.prod(window)), stride, max(1, x[0]))
    if kernel.out_px != out_px:
        kernel = replace(kernel, resolution_px=out_px * stride)
    return _operator(node, kernel, macs, status)


def _convolution(reader: Reader, node: Node) -> OnnxOperator:
    """Return a convolution; a grouped one has the input channels of one group.

    It has the multiply-adds and weights of all groups together, and one launch. Reads of the other
    groups' input channels are not counted, so it is a stand-in.
    """
    x, weight, y = (reader.shapes[name] for name in (*node.inputs[:2], node.outputs[0]))
    groups = node.attribute("group", 1)
    is_depthwise = groups == x[1] > 1
    kind, c_in = ("dwconv", x[1]) if is_depthwise else ("conv", weight[1])
    macs = math.prod(y) * math.prod(weight[1:])
    dilations = node.attribute("dilations") or [1]
    is_direct = (groups == 1 or is_depthwise) and len(x) == 4 and set(dilations) == {1}
    status: Status = "direct" if is_direct else "stand-in"
    return _windowed(reader, node, kind, weight[2:], c_in=c_in, macs=macs, status=status)


def _transposed_convolution(reader: Reader, node: Node) -> OnnxOperator:
    """Return a transposed convolution as a convolution with the same multiply-adds."""
    x, weight, y = (reader.shapes[name] for name in (*node.inputs[:2], node.outputs[0]))
    c_in, size = x[1] // node.attribute("group", 1), _side(math.prod(weight[2:]))
    kernel = Kernel("conv", _side(math.prod(x[2:])), c_in, y[1], size, 1, max(1, x[0]))
    macs = math.prod(x) * math.prod(weight[1:])
    return _operator(node, kernel, macs, "stand-in")


def _product(reader: Reader, node: Node) -> OnnxOperator:
    """Return a matrix product: `linear` (one row), `conv` (rows as pixels) or, without weights, `matmul`."""
    a, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
    weights = [place for place in (0, 1) if node.inputs[place] in reader.graph.constants]
    fan_in = a[-2] if node.attribute("transA", 0) else a[-1]
    # with the weights first, columns take the place of rows
    c_out = max(1, (y[-2] if weights == [0] else y[-1]) if len(y) > 1 else math.prod(y))
    rows = max(1, math.prod(y) // c_out)
    kind = "matmul" if not weights else "linear" if rows == 1 else "conv"
    kernel = Kernel(kind, _side(rows), fan_in, c_out)
    status: Status = "direct" if weights else "stand-in"
    return _operator(node, kernel, math.prod(y) * fan_in, status)


def _pool(reader: Reader, node: Node) -> OnnxOperator:
    x, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
    window = node.attribute("kernel_shape")
    if node.op == "AveragePool" and tuple(window) == x[2:] and math.prod(y[2:]) == 1:
        return pass_over(reader, node, "gap", node.inputs[0])
    return _windowed(reader, node, "avgpool" if node.op == "AveragePool" else "maxpool", window)


def _mean(reader: Reader, node: Node) -> OnnxOperator:
    """Return a mean over all pixels; any other mean is uncovered."""
    tensor = node.inputs[0]
    shape = reader.shapes[tensor]
    given = node.attribute("axes")
    values = reader.constant(node, 1)
    axes = list(given) if given is not None else values.tolist() if values is not None else []
    reduced = {axis % len(shape) for axis in axes}
    places = set(range(1, len(shape))) - {reader.channel_axis(tensor) % len(shape)}
    is_global = len(shape) >= 3 and reduced == places
    return pass_over(reader, node, "gap", tensor) if is_global else _uncovered(reader, node)


def _layer_norm(reader: Reader, node: Node) -> OnnxOperator:
    shape = reader.shapes[node.inputs[0]]
    axis = node.attribute("axis", -1) % len(shape)
    channels, rows = math.prod(shape[axis:]), math.prod(shape[:axis])
    return _operator(node, Kernel("layernorm", _side(rows), channels, channels))


def _clip(reader: Reader, node: Node) -> OnnxOperator:
    given = reader.constant(node, 1)
    low = node.attribute("min") if given is None else float(given.reshape(-1)[0])
    return pass_over(reader, node, "relu6" if low == 0 else "clip", node.inputs[0])


def _sum_or_product(maps: str, scalar: str) -> Callable[[Reader, Node], OnnxOperator]:
    """Return the reader of an operator of two tensors, one of which may be a scalar, or one per channel."""

    def read(reader: Reader, node: Node) -> OnnxOperator:
        y = node.outputs[0]
        if maps == "mul" and reader.root(node.inputs[0]) == reader.root(node.inputs[1]):
            return pass_over(reader, node, "square", y)
        smaller = min(node.inputs[:2], key=lambda name: math.prod(reader.shapes[name]))
        size = math.prod(reader.shapes[smaller])
        kind = maps
        if smaller in reader.graph.constants and size == 1:
            kind = scalar
        elif is_per_channel(reader, smaller, y) and reader.map_of(y)[0] > 1:
            constant = smaller in reader.graph.constants
            kind = "scale" if maps in ("mul", UNCOVERED) else scalar if constant else maps
        return _uncovered(reader, node) if kind == UNCOVERED else pass_over(reader, node, kind, y)

    return read


def _power(reader: Reader, node: Node) -> OnnxOperator:
    exponent = reader.constant(node, 1)
    is_square = exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2
    return pass_over(reader, node, "square", node.inputs[0]) if is_square else _uncovered(reader, node)


def is_per_channel(reader: Reader, tensor: str, of: str) -> bool:
    """Whether a tensor has one value for each channel of another one."""
    whole, part = reader.shapes[of], reader.shapes[tensor]
    aligned = (1,) * (len(whole) - len(part)) + part
    axis = reader.channel_axis(of) % len(whole) if whole else 0
    return bool(whole) and all(n == (whole[i] if i == axis else 1) for i, n in enumerate(aligned))


def _transposition(reader: Reader, node: Node) -> OnnxOperator:
    """Return a transposition; one that exchanges groups and channels is a shuffle.

    As in the measured networks, a shuffle's outputs are the channels of one group.
    """
    shape = reader.shapes[node.inputs[0]]
    order = node.attribute("perm")
    if order in ([0, 2, 1, 3, 4], [0, 1, 2, 4, 3]):
        area, (groups, channels) = (shape[3:], shape[1:3]) if order[1] == 2 else (shape[1:3], shape[3:])
        kernel = Kernel("shuffle", _side(math.prod(area)), groups * channels, channels)
        return _operator(node, kernel)
    return pass_over(reader, node, "transpose", node.inputs[0])


def _of_input(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    return lambda reader, node: pass_over(reader, node, kind, reader.activations(node)[0])


def _of_output(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    return lambda reader, node: pass_over(reader, node, kind, node.outputs[0])


# ONNX operator -> its reader. An operator that is neither here nor free is uncovered.
OPERATORS: dict[str, Callable[[Reader, Node], OnnxOperator]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _product,
    "MatMul": _product,
    "BatchNormalization": _of_input("batchnorm"),
    "LayerNormalization": _layer_norm,
    "Relu": _of_input("relu"),
    "Clip": _clip,
    "Gelu": _of_input("gelu"),
    "HardSwish": _of_input("hswish"),
    "HardSigmoid": _of_input("hsigmoid"),
    "Swish": _of_input("swish"),
    "Sigmoid": _of_input("sigmoid"),
    "Add": _sum_or_product("add", "add_scalar"),
    "Sub": _sum_or_product("sub", "add_scalar"),
    "Mul": _sum_or_product("mul", "mul_scalar"),
    "Pow": _power,
    "Div": _sum_or_product(UNCOVERED, "mul_scalar"),
    "GlobalAveragePool": _of_input("gap"),
    "ReduceMean": _mean,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Concat": _of_output("concat"),
    "Split": _of_input("split"),
    "Slice": _of_output("slice"),
    "Gather": _of_output("slice"),
    "Transpose": _transposition,
}


def read_operator(reader: Reader, node: Node) -> OnnxOperator:
    """Return the operator of a node; one that no latency model knows is uncovered."""
    return OPERATORS.get(node.op, _uncovered)(reader, node)
