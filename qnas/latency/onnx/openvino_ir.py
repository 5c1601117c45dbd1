"""An OpenVINO IR, the .xml of a network whose weights lie in a .bin, stated as an ONNX graph.

OpenVINO itself is not needed. Of the .bin only axes, sizes and scalars are read.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto

from qnas.common.errors import ArchError, one_line
from qnas.common.reading import open_regular, read_text
from qnas.latency.onnx.statement import TO_FIRST, TO_LAST, Statement, damage
from qnas.latency.onnx.values import LARGEST_VALUE, Array

_CHARACTERS = 64_000_000  # limit for the .xml; a network of a hundred layers has half a million
_ELEMENTS = 1_000_000  # limit for the elements in it
_SCALARS = {"f32": np.float32, "f16": np.float16, "f64": np.float64}
_WHOLE = {"i32": np.int32, "i64": np.int64, "u32": np.uint32, "u64": np.uint64, "boolean": np.bool_}


@dataclass(frozen=True)
class _Layer:
    """A layer: its attributes, and the names and shapes of its inputs and outputs."""

    op: str
    name: str
    data: dict[str, str]
    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    outputs: tuple[str, ...]
    out_shapes: tuple[tuple[int, ...], ...]

    def whole(self, key: str) -> list[int] | None:
        """Return the whole numbers of an attribute, None where it is left out."""
        given = self.data.get(key)
        return None if given is None else [int(n) for n in given.split(",") if n.strip()]

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a truth value."""
        return self.data.get(key, str(default)).lower() in ("true", "1")


def read_ir(path: Path) -> onnx.ModelProto:
    """State an IR as an ONNX graph, for any batch size that it has.

    Raises ArchError where it is no IR, or exceeds a limit, or its .bin is missing.
    """
    with damage(path, "OpenVINO IR"):
        statement, layers = Statement(path, "openvino"), _layers(path)
        images, outputs = [], []
        for layer in layers:
            if layer.op == "Parameter":
                images.append((layer.outputs[0], layer.out_shapes[0]))
            elif layer.op == "Result":
                outputs.append(layer.inputs[0])
            elif layer.op == "Const":
                _state_constant(statement, layer)
            elif layer.op in _OPERATORS:
                _OPERATORS[layer.op](statement, layer)
            else:
                unknown = zip(layer.outputs, layer.out_shapes, strict=True)
                statement.add_unknown(layer.op, layer.inputs, list(unknown), name=layer.name)
        return statement.model(images, outputs)


def _layers(path: Path) -> list[_Layer]:
    """Return the layers in an order in which they can run, which is that of the file."""
    root = _parse(path)
    written: dict[tuple[str, str], tuple[str, str]] = {}  # (layer, port) that reads -> that writes
    for edge in root.iterfind("edges/edge"):
        written[edge.attrib["to-layer"], edge.attrib["to-port"]] = (
            edge.attrib["from-layer"],
            edge.attrib["from-port"],
        )
    layers = []
    for layer in root.iterfind("layers/layer"):
        own, data = layer.attrib["id"], layer.find("data")
        ins, outs = layer.findall("input/port"), layer.findall("output/port")
        sources = [written[own, port.attrib["id"]] for port in ins]
        layers.append(
            _Layer(
                layer.attrib["type"],
                one_line(layer.attrib["name"], 100),
                dict(data.attrib) if data is not None else {},
                tuple(f"{source}:{port}" for source, port in sources),
                tuple(map(_shape, ins)),
                tuple(f"{own}:{port.attrib['id']}" for port in outs),
                tuple(map(_shape, outs)),
            )
        )
    return layers


def _shape(port: ET.Element) -> tuple[int, ...]:
    return tuple(int(dim.text or "") for dim in port.iterfind("dim"))


def _parse(path: Path) -> ET.Element:
    text = read_text(path, ArchError, "an OpenVINO IR", limit=_CHARACTERS)
    if "<!DOCTYPE" in text:  # its entities can stand for gigabytes
        raise ValueError("a document type, which no IR has")
    parser: ET.XMLPullParser[ET.Element] = ET.XMLPullParser(["start"])
    root: ET.Element | None = None
    count = 0
    try:
        for at in range(0, len(text), 2**16):
            parser.feed(text[at : at + 2**16])
            for event in parser.read_events():
                _, element = cast(tuple[str, ET.Element], event)
                root, count = root if root is not None else element, count + 1
            if count > _ELEMENTS:
                raise ArchError(f"{path}: more than {_ELEMENTS:,} elements, expected a network of images")
        parser.close()
    except ET.ParseError as error:
        raise ArchError(f"{path}: not XML: {one_line(error, 100)}") from error
    if root is None or root.tag != "net":
        raise ArchError(f"{path}: expected an OpenVINO IR, whose first element is <net>")
    return root


def _state_constant(statement: Statement, layer: _Layer) -> None:
    (output,), (shape,) = layer.outputs, layer.out_shapes
    kind = layer.data["element_type"]
    size = math.prod(shape)
    # the weights of a convolution to one channel tell whether it is a mean
    is_read = kind in _SCALARS and (size == 1 or (shape[:1] == (1,) and shape[2:] == (1, 1)))
    if size <= LARGEST_VALUE and (kind in _WHOLE or is_read):
        value = _stored(statement.path, layer, np.dtype({**_SCALARS, **_WHOLE}[kind])).reshape(shape)
        statement.constant(value, output, dtype=np.float32 if value.dtype.kind == "f" else value.dtype)
    else:
        statement.weight(output, shape)


def _stored(path: Path, layer: _Layer, dtype: np.dtype[np.generic]) -> Array:
    """Return the values of a small constant from the .bin."""
    size, weights = int(layer.data["size"]), path.with_suffix(".bin")
    if not 0 <= size <= 16 * LARGEST_VALUE:
        raise ValueError(f"{layer.name}: {size} bytes")
    try:
        with open_regular(weights) as file:
            file.seek(int(layer.data["offset"]))
            return np.frombuffer(file.read(size), dtype)
    except OSError as error:
        raise ArchError(
            f"{path}: the values of {one_line(layer.name, 60)!r} cannot be read: put {weights.name}, which "
            "belongs to this file, beside it"
        ) from error


_State = Callable[[Statement, _Layer], object]


def _as(op: str) -> _State:
    """State an operator of the same inputs under ONNX's name."""
    return lambda to, layer: to.add_all(op, layer.inputs, layer.outputs, name=layer.name)


def _padding(layer: _Layer) -> dict[str, Any]:
    kind = layer.data.get("auto_pad", "explicit").upper()
    if kind != "EXPLICIT":
        return {"auto_pad": kind}
    return {"pads": [*(layer.whole("pads_begin") or ()), *(layer.whole("pads_end") or ())] or None}


def _convolution(to: Statement, layer: _Layer) -> None:
    x, weight = layer.inputs
    groups = 1
    if layer.op == "GroupConvolution":
        groups, columns, *rest = layer.shapes[1]
        weight = to.add("Reshape", weight, to.constant([groups * columns, *rest]))
    strides, dilations = layer.whole("strides"), layer.whole("dilations")
    to.add(
        "Conv",
        x,
        weight,
        output=layer.outputs[0],
        name=layer.name,
        group=groups,
        strides=strides,
        dilations=dilations,
        **_padding(layer),
    )


def _pool(op: str) -> _State:
    def state(to: Statement, layer: _Layer) -> None:
        window: dict[str, Any] = {"kernel_shape": layer.whole("kernel"), "strides": layer.whole("strides")}
        ceil = int(layer.data.get("rounding_type", "floor") != "floor")
        to.add(
            op,
            layer.inputs[0],
            output=layer.outputs[0],
            name=layer.name,
            ceil_mode=ceil,
            **window,
            **_padding(layer),
        )

    return state


def _norm(to: Statement, layer: _Layer) -> None:
    """State an MVN: over channels it is a layer norm, over anything else a pass."""
    x, shape, (output,) = layer.inputs[0], layer.shapes[0], layer.outputs
    axes = {axis % len(shape) for axis in to.numbers(layer.inputs[1])} if len(layer.inputs) > 1 else set()
    if axes == {len(shape) - 1}:
        to.layer_norm(x, shape[-1], output=output, name=layer.name)
    elif axes == {1} and len(shape) == 4:
        norm = to.layer_norm(to.add("Transpose", x, perm=TO_LAST), shape[1], name=layer.name)
        to.add("Transpose", norm, output=output, perm=TO_FIRST)
    else:
        to.add_all("MeanVarianceNormalization", [x], [output], name=layer.name)
        to.state(output, [max(1, size) for size in layer.out_shapes[0]])


def _matmul(to: Statement, layer: _Layer) -> None:
    operands = list(layer.inputs)
    for place, key in enumerate(("transpose_a", "transpose_b")):
        if layer.flag(key):
            *order, i, j = range(len(layer.shapes[place]))
            operands[place] = to.add("Transpose", operands[place], perm=[*order, j, i])
    to.add("MatMul", *operands, output=layer.outputs[0], name=layer.name)


def _reduction(op: str) -> _State:
    return lambda to, layer: to.add(
        *(op, *layer.inputs),
        output=layer.outputs[0],
        name=layer.name,
        keepdims=int(layer.flag("keep_dims")),
    )


def _transpose(to: Statement, layer: _Layer) -> None:
    x, order = layer.inputs
    to.add("Transpose", x, output=layer.outputs[0], name=layer.name, perm=to.numbers(order) or None)


def _convert(to: Statement, layer: _Layer) -> None:
    types = {"f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}
    kind = types.get(layer.data["destination_type"], TensorProto.INT64)
    to.add("Cast", layer.inputs[0], output=layer.outputs[0], name=layer.name, to=kind)


def _swish(to: Statement, layer: _Layer) -> None:
    x = layer.inputs[0]
    to.add("Mul", x, to.add("Sigmoid", x), output=layer.outputs[0], name=layer.name)


def _hard_sigmoid(to: Statement, layer: _Layer) -> None:
    x, slope, shift = layer.inputs
    line = to.add("Add", to.add("Mul", x, slope), shift)
    to.clip(line, 0.0, 1.0, output=layer.outputs[0], name=layer.name)


def _clamp(to: Statement, layer: _Layer) -> None:
    bounds = float(layer.data["min"]), float(layer.data["max"])
    to.clip(layer.inputs[0], *bounds, output=layer.outputs[0], name=layer.name)


def _with(op: str, **attributes: Any) -> _State:
    """State an operator of the first input under ONNX's name, with these attributes."""
    return lambda to, layer: to.add(
        op, layer.inputs[0], output=layer.outputs[0], name=layer.name, **attributes
    )


def _reshape(to: Statement, layer: _Layer) -> None:
    zero = int(not layer.flag("special_zero"))
    to.add("Reshape", *layer.inputs, output=layer.outputs[0], name=layer.name, allowzero=zero)


def _along_axis(op: str) -> _State:
    def state(to: Statement, layer: _Layer) -> None:
        axis = int(layer.data.get("axis", 1))
        to.add(op, *layer.inputs, output=layer.outputs[0], name=layer.name, axis=axis)

    return state


def _gather(to: Statement, layer: _Layer) -> None:
    x, places, axis = layer.inputs
    to.add("Gather", x, places, output=layer.outputs[0], name=layer.name, axis=to.numbers(axis)[0])


def _split(to: Statement, layer: _Layer) -> None:
    (axis,) = to.numbers(layer.inputs[1])
    sizes: Sequence[int] = [shape[axis] for shape in layer.out_shapes]
    to.add_all("Split", [layer.inputs[0], to.constant(sizes)], layer.outputs, name=layer.name, axis=axis)


# The operators that have a name in ONNX.
_OPERATORS: dict[str, _State] = {
    **{"Add": _as("Add"), "Subtract": _as("Sub"), "Multiply": _as("Mul"), "Divide": _as("Div")},
    **{"Power": _as("Pow"), "Maximum": _as("Max"), "Minimum": _as("Min"), "ReLU": _as("Relu")},
    **{op: _as(op) for op in ("Sigmoid", "Tanh", "Exp", "Erf", "Sqrt", "Abs", "Squeeze", "Unsqueeze")},
    **{"Negative": _as("Neg"), "PReLU": _as("PRelu"), "HSwish": _as("HardSwish"), "Gelu": _as("Gelu")},
    **{f"Reduce{op}": _reduction(f"Reduce{op}") for op in ("Mean", "Sum", "Max", "Min", "Prod", "L2")},
    "HSigmoid": _with("HardSigmoid", alpha=1 / 6, beta=0.5),
    "HardSigmoid": _hard_sigmoid,
    "Swish": _swish,
    "Clamp": _clamp,
    "Convolution": _convolution,
    "GroupConvolution": _convolution,
    "MatMul": _matmul,
    "MVN": _norm,
    "MaxPool": _pool("MaxPool"),
    "AvgPool": _pool("AveragePool"),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Concat": _along_axis("Concat"),
    "Softmax": _along_axis("Softmax"),
    "Split": _split,
    "VariadicSplit": _split,
    "ShapeOf": _as("Shape"),
    "Gather": _gather,
    "Convert": _convert,
    "FakeQuantize": lambda to, layer: to.requantised(
        layer.inputs[0], output=layer.outputs[0], name=layer.name
    ),
}
