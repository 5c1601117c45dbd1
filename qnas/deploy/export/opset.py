"""An ONNX graph stated in an older opset, for runtimes that read no newer one.

torch writes opset 18 and newer. Most operators of a network are the same since opset 13; a few have an
argument where an attribute was, and some did not exist: for these a target's `Forms` have other operators.
"""

from collections.abc import Callable

import onnx
from onnx import helper, numpy_helper

from qnas.common.errors import ExportError, UsageError

TRACED_OPSET = 20  # the first with Gelu; pinned, so that a newer torch writes the same operators
OLDEST_OPSET = 13
# The IR version of the onnx release that introduced an opset: older readers refuse newer ones.
_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}
FIRST_OPSETS = {"LayerNormalization": 17, "Gelu": 20, "HardSwish": 14}  # of the operators that have forms


def check_opset(opset: int) -> None:
    """Raise UsageError for an opset that cannot be written."""
    if not OLDEST_OPSET <= opset <= TRACED_OPSET:
        raise UsageError(f"`opset={opset}`: expected {OLDEST_OPSET} to {TRACED_OPSET}")


def restate(model: onnx.ModelProto, opset: int, where: str) -> onnx.ModelProto:
    """State a graph of TRACED_OPSET in an older opset, in place, and return it.

    Raises ExportError with all operators that mean something else there, or do not exist.
    """
    if opset == TRACED_OPSET:
        return model
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    unable = set()
    for node in graph.node:
        now, then = _schema(node, TRACED_OPSET), _schema(node, opset)
        if then is None or now is None:
            unable.add(node.op_type)
        elif then.since_version != now.since_version:
            if node.op_type in _STATED:
                _STATED[node.op_type](node, constants)
            elif node.op_type not in _SAME:
                unable.add(node.op_type)
    if unable:
        needed = ", ".join(sorted(unable))
        raise ExportError(f"{where}: opset {opset} has no {needed} as this network needs it")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.ir_version = _IR_VERSIONS[opset]
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model


def _schema(node: onnx.NodeProto, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None


def _axes_as_attribute(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    _drop(node, "noop_with_empty_axes")
    if len(node.input) > 1:
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        del node.input[1:]
        node.attribute.append(helper.make_attribute("axes", axes))


def _without(name: str) -> Callable[[onnx.NodeProto, dict[str, onnx.TensorProto]], None]:
    return lambda node, _: _drop(node, name)


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


# Operators whose later versions take more types, and mean the same for float32, int32 and int64.
_SAME = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Relu", "Sigmoid", "HardSigmoid", "Sqrt", "Exp", "Clip", "Min"),
    *("Max", "Cast", "Identity", "Flatten", "Transpose", "Concat", "Unsqueeze", "Squeeze", "Constant"),
    *("Equal", "Where", "Expand", "Slice", "Gather", "ConstantOfShape", "Shape", "GlobalAveragePool"),
    *("PRelu", "LeakyRelu"),
}
# How others are stated as before.
_STATED: dict[str, Callable[[onnx.NodeProto, dict[str, onnx.TensorProto]], None]] = {
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"), _axes_as_attribute),
    "Reshape": _without("allowzero"),
    "AveragePool": _without("dilations"),
    "BatchNormalization": _without("training_mode"),
}
