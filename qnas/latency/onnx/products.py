"""The nodes of an ONNX graph that multiply and add: convolutions, and products of matrices.

Their multiply-adds are exact. Those for which no latency model has a kernel are stand-ins: they are priced
as a convolution or a product of as many.
"""

import math
from collections.abc import Callable

from qnas.latency.kernels import GROUPED, Kernel
from qnas.latency.onnx.einsum import parse_einsum
from qnas.latency.onnx.onnx_operator import OnnxOperator, Status, operator_of, side, uncovered, windowed
from qnas.latency.onnx.tensors import Reader
from qnas.latency.onnx.values import Node


def _convolution(reader: Reader, node: Node) -> OnnxOperator:
    """Return a convolution; one of integers or deformed is a stand-in, on most devices also one in groups."""
    weights = node.inputs[_RIGHT.get(node.op, 1)]
    x, weight, y = (reader.shapes[name] for name in (node.inputs[0], weights, node.outputs[0]))
    groups = node.attribute("group", 1)
    if groups < 1 or weight[1] * groups != x[1]:
        raise ValueError(f"weights for {weight[1] * groups} channels")
    dilations = node.attribute("dilations") or [1]
    is_plain = node.op == "Conv" and len(x) == 4 and set(dilations) == {1}
    macs, c_in = math.prod(y) * math.prod(weight[1:]), weight[1]
    status: Status = "direct" if is_plain else "stand-in"
    if groups == x[1] > 1:
        return windowed(reader, node, "dwconv", weight[2:], macs=macs, status=status)
    if is_plain and groups > 1:
        return windowed(reader, node, GROUPED, weight[2:], macs=macs, status="stand-in", groups=groups)
    return windowed(reader, node, "conv", weight[2:], c_in=c_in, macs=macs, status=status)


def _transposed_convolution(reader: Reader, node: Node) -> OnnxOperator:
    """Return a transposed convolution as a convolution with the same multiply-adds."""
    x, weight, y = (reader.shapes[name] for name in (*node.inputs[:2], node.outputs[0]))
    if weight[0] != x[1]:
        raise ValueError(f"weights for {weight[0]} channels")
    c_in, size = x[1] // node.attribute("group", 1), side(math.prod(weight[2:]))
    kernel = Kernel("conv", side(math.prod(x[2:])), c_in, y[1], size, 1, max(1, x[0]))
    macs = math.prod(x) * math.prod(weight[1:])
    return operator_of(node, kernel, macs, "stand-in")


def _product(reader: Reader, node: Node) -> OnnxOperator:
    """Return a matrix product: `linear` (one row), `conv` (rows as pixels) or, without weights, `matmul`."""
    places = (0, _RIGHT.get(node.op, 1))
    a, b = (reader.shapes[node.inputs[place]] for place in places)
    y = reader.shapes[node.outputs[0]]
    weights = [place for place in places if node.inputs[place] in reader.graph.constants]
    fan_in = a[-2] if node.attribute("transA", 0) else a[-1]
    if fan_in != (b[-1] if node.attribute("transB", 0) or len(b) == 1 else b[-2]):
        raise ValueError(f"sums of {fan_in} products")
    # with the weights first, columns take the place of rows
    c_out = max(1, (y[-2] if weights == [0] else y[-1]) if len(y) > 1 else math.prod(y))
    status: Status = "direct" if weights and node.op in ("Gemm", "MatMul") else "stand-in"
    return _matrices(node, math.prod(y) // c_out, fan_in, c_out, has_weights=bool(weights), status=status)


def _matrices(
    node: Node, rows: int, fan_in: int, c_out: int, *, has_weights: bool, status: Status = "stand-in"
) -> OnnxOperator:
    """Return a product of a matrix of rows with one of (fan_in, c_out), or several such products."""
    rows = max(1, rows)
    kind = "matmul" if not has_weights else "linear" if rows == 1 else "conv"
    return operator_of(node, Kernel(kind, side(rows), fan_in, c_out), rows * c_out * fan_in, status)


def _einsum(reader: Reader, node: Node) -> OnnxOperator:
    """Return a sum of products over indices as one product of matrices.

    The order of more than two operands is not known: each after the first is multiplied for all indices, an
    upper bound.
    """
    einsum = parse_einsum(node.attribute("equation"), [reader.shapes[name] for name in node.inputs])
    summed, columns, further = einsum.summed, einsum.columns, len(einsum.terms) - 1
    if not further or summed == 1:  # no sum of products
        return uncovered(reader, node)
    rows = math.prod(einsum.sizes.values()) * further // (summed * columns)
    has_weights = any(name in reader.graph.constants for name in node.inputs)
    return _matrices(node, rows, summed, columns, has_weights=has_weights)


def _recurrent(reader: Reader, node: Node) -> OnnxOperator:
    """Return a recurrent layer as its products: of the rows of all steps with the weights of all gates."""
    x, w, r = (reader.shapes[name] for name in node.inputs[:3])
    directions, c_out, from_input = w
    steps, batch, given = x
    if given != from_input:
        raise ValueError(f"weights for {from_input} channels")
    has_weights = node.inputs[1] in reader.graph.constants
    return _matrices(node, steps * batch * directions, from_input + r[2], c_out, has_weights=has_weights)


def _attention(reader: Reader, node: Node) -> OnnxOperator:
    """Return attention as its two products: of queries and keys, and of their scores and the values."""
    q, k, v = (reader.shapes[name] for name in node.inputs[:3])
    past = node.inputs[4] if len(node.inputs) > 4 else ""
    keys = k[-2] + (reader.shapes[past][-2] if past else 0)
    heads, kv_heads = node.attribute("q_num_heads", 0), node.attribute("kv_num_heads", 0)
    if len(q) == 4:  # (B, heads, length, channels), otherwise (B, length, heads * channels)
        heads, of_query, of_value = q[1], q[3], v[3]
    else:
        of_query, of_value = q[2] // heads, v[2] // kv_heads
    return _matrices(node, q[0] * heads * q[-2], of_query + of_value, keys, has_weights=False)


# Place of the second operand, where it is not the second input.
_RIGHT = {"QLinearConv": 3, "QLinearMatMul": 3}

PRODUCTS: dict[str, Callable[[Reader, Node], OnnxOperator]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "DeformConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _product,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Einsum": _einsum,
    "RNN": _recurrent,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "Attention": _attention,
}
