"""The nodes of an ONNX graph, read as the operators that latency models know."""

import math
from collections import Counter
from collections.abc import Callable

from qnas.common.errors import ArchError, abbreviate, one_line
from qnas.latency.kernels import Kernel
from qnas.latency.onnx.onnx_operator import (
    UNCOVERED,
    OnnxOperator,
    operator_of,
    pass_over,
    side,
    uncovered,
    windowed,
)
from qnas.latency.onnx.products import PRODUCTS
from qnas.latency.onnx.tensors import FREE, Reader
from qnas.latency.onnx.values import Node


def _pool(reader: Reader, node: Node) -> OnnxOperator:
    x, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
    window = node.attribute("kernel_shape")
    if node.op == "AveragePool" and tuple(window) == x[2:] and math.prod(y[2:]) == 1:
        return pass_over(reader, node, "gap", node.inputs[0])
    return windowed(reader, node, "avgpool" if node.op == "AveragePool" else "maxpool", window)


def _mean(reader: Reader, node: Node) -> OnnxOperator:
    """Return a mean over all pixels; any other mean is uncovered."""
    tensor = node.inputs[0]
    shape = reader.shapes[tensor]
    given = node.attribute("axes")
    values = reader.constant(node, 1)
    axes = list(given) if given is not None else values.tolist() if values is not None else []
    reduced = {axis % max(1, len(shape)) for axis in axes}
    places = set(range(1, len(shape))) - {reader.channel_axis(tensor) % len(shape)}
    is_global = len(shape) >= 3 and reduced == places
    return pass_over(reader, node, "gap", tensor) if is_global else uncovered(reader, node)


def _layer_norm(reader: Reader, node: Node) -> OnnxOperator:
    shape = reader.shapes[node.inputs[0]]
    axis = node.attribute("axis", -1) % len(shape)
    channels, rows = math.prod(shape[axis:]), math.prod(shape[:axis])
    return operator_of(node, Kernel("layernorm", side(rows), channels, channels))


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
        return uncovered(reader, node) if kind == UNCOVERED else pass_over(reader, node, kind, y)

    return read


def _power(reader: Reader, node: Node) -> OnnxOperator:
    exponent = reader.constant(node, 1)
    is_square = exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2
    return pass_over(reader, node, "square", node.inputs[0]) if is_square else uncovered(reader, node)


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
        kernel = Kernel("shuffle", side(math.prod(area)), groups * channels, channels)
        return operator_of(node, kernel)
    return pass_over(reader, node, "transpose", node.inputs[0])


def _of_input(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    return lambda reader, node: pass_over(reader, node, kind, reader.activations(node)[0])


def _of_output(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    return lambda reader, node: pass_over(reader, node, kind, node.outputs[0])


# ONNX operator -> its reader.
OPERATORS: dict[str, Callable[[Reader, Node], OnnxOperator]] = {
    **PRODUCTS,
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


# Operators that no latency model knows, but that pass over their tensors once and do not multiply matrices.
PASSES = (
    *FREE,  # where something else than a tensor's shape depends on the image
    # of each element
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf"),
    *("Exp", "Floor", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "PRelu", "Reciprocal"),
    *("Round", "Selu", "Shrink", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "SwiGLU", "Tan"),
    *("Tanh", "ThresholdedRelu", "Cast", "CastLike", "BitCast", "QuantizeLinear", "DequantizeLinear"),
    *("And", "Or", "Xor", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Equal"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "Max", "Min", "Mean", "Sum", "Mod"),
    # of rows or windows
    *("Softmax", "LogSoftmax", "Hardmax", "ArgMax", "ArgMin", "CumSum", "CumProd", "TopK"),
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare", "GlobalMaxPool", "GlobalLpPool", "LpPool", "MaxUnpool", "LRN"),
    *("LpNormalization", "InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization"),
    *("RMSNormalization", "RotaryEmbedding", "DynamicQuantizeLinear"),
    # that move data
    *("CenterCropPad", "Col2Im", "DepthToSpace", "SpaceToDepth", "Expand", "Pad", "Tile", "Resize"),
    *("Upsample", "GridSample", "AffineGrid", "GatherElements", "GatherND", "Scatter", "ScatterElements"),
    *("ScatterND", "TensorScatter", "OneHot", "ReverseSequence", "Trilu", "EyeLike"),
)


def check_priced(reader: Reader) -> None:
    """Raise ArchError for operators whose work is not known, so that no total can be given."""
    unknown = Counter(node.op for node in reader.nodes if node.op not in OPERATORS and node.op not in PASSES)
    if unknown:
        named = abbreviate([f"{one_line(op, 40)} ({n})" for op, n in unknown.items()], most=3)
        raise ArchError(
            f"{reader.graph.path}: no total: these operators are not known, so they have no price: {named}"
        )


def read_operator(reader: Reader, node: Node) -> OnnxOperator:
    """Return the operator of a node. Raises ArchError where its tensors do not fit it."""
    try:
        return OPERATORS.get(node.op, uncovered)(reader, node)
    # onnx does not check all that an operator needs; each of these is of a shape or an attribute
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        shapes = ", ".join(str(reader.shapes[name]) for name in node.inputs if name)
        raise reader.graph.error(
            f"{one_line(node.op, 40)} {one_line(node.name, 40)!r} does not fit its inputs, {shapes}"
        ) from error
