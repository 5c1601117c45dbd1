"""An ONNX file as a graph for one image: the nodes that run, and the shape of every tensor.

A node whose inputs are all constants (weights, arithmetic on shapes) is computed when a runtime loads
the file, not for each image, and is left out. Such values are followed as far as shapes depend on them.
Weights are never read, so a file whose weights lie in another file is priced without them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # onnx itself needs it
from onnx import helper, inliner, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from qnas.common.errors import ArchError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

LARGEST_VALUE = 1024  # elements of a constant that is followed: shapes and scalars, not weights
_LARGEST_IMAGE_CHANNELS = 4  # tells (1, C, H, W) from (1, H, W, C)
_STANDARD = ("", "ai.onnx")
# operators for which onnx infers no shape; they keep that of their input
_KEEP_SHAPE = ("GroupNormalization", "InstanceNormalization", "MeanVarianceNormalization")


@dataclass(frozen=True)
class Node:
    """A node that runs for every image. An input that is left out is an empty string."""

    name: str
    op: str  # with its domain where that is not the standard one: "com.microsoft.FusedConv"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    proto: onnx.NodeProto

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value, text as str."""
        values = {a.name: helper.get_attribute_value(a) for a in self.proto.attribute if a.name == name}
        value = values.get(name, default)
        return value.decode() if isinstance(value, bytes) else value


def read_graph(path: Path, *, resolution_px: int | None = None) -> "Graph":
    """Read an ONNX file for a batch of one image.

    `resolution_px` is used for a height and width that the file leaves free. Raises ArchError where
    the file is no ONNX file, has other inputs than one image, a batch of more than one, or tensors whose
    shape depends on data; and where free sizes need a resolution, or fixed ones differ from it.
    """
    model = _load(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = Graph(model, path, resolution_px)
    for proto in model.graph.node:
        graph.add(proto)
    read, used = set(graph.outputs), []  # the nodes that an output depends on
    for node in reversed(graph.nodes):
        if read.intersection(node.outputs):
            read.update(node.inputs)
            used.append(node)
    graph.nodes = used[::-1]
    return graph


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except FileNotFoundError:
        raise ArchError(f"{path}: no such file, expected an ONNX file") from None
    except IsADirectoryError:
        raise ArchError(f"{path}: a folder, expected an ONNX file") from None
    except DecodeError as error:
        raise ArchError(f"{path}: not an ONNX file, or a damaged one") from error
    if not model.graph.node or not model.opset_import:
        raise ArchError(f"{path}: not an ONNX file, or one without operators")
    return model


def evaluate(
    protos: Sequence[onnx.NodeProto], feeds: Mapping[str, Array], output: str, opset: int
) -> Array | None:
    """Return the output of standard operators for `feeds`; None where onnx cannot evaluate them."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    graph = helper.make_graph(list(protos), "part", inputs, [helper.make_empty_tensor_value_info(output)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            (value,) = ReferenceEvaluator(model).run(None, dict(feeds))
    except Exception:  # of many types: the operator is unknown
        return None
    return np.asarray(value)


class Graph:
    """The nodes that run, in order, for one image of shape (1, C, H, W) or (1, H, W, C), and the tensors."""

    def __init__(self, model: onnx.ModelProto, path: Path, resolution_px: int | None) -> None:
        self._path = path
        self._opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
        self._context = onnx.checker.C.CheckerContext()
        self._context.ir_version = model.ir_version
        self._context.opset_imports = self._opsets
        self._stated = {info.name: info.type for info in (*model.graph.value_info, *model.graph.output)}
        self.opset = int(self._opsets.get("", 1))  # the version of the standard operators
        self.outputs = frozenset(output.name for output in model.graph.output)
        self.nodes: list[Node] = []
        self.shapes: dict[str, Shape] = {}  # of activations and of constants
        self.types: dict[str, int] = {}  # onnx element types
        self.values: dict[str, Array] = {}  # of the small constants
        self.constants: set[str] = set()
        for tensor in model.graph.initializer:
            self._set_tensor(tensor.name, tensor)
        for sparse in model.graph.sparse_initializer:
            self._set_constant(sparse.values.name, sparse.dims, sparse.values.data_type)
        images = [info for info in model.graph.input if info.name not in self.constants]
        self.input, self.is_channels_last = self._set_image(images, resolution_px)

    def _set_constant(self, name: str, shape: Iterable[int], element: int) -> None:
        self.constants.add(name)
        self.shapes[name] = tuple(shape)
        self.types[name] = element

    def _set_value(self, name: str, value: Array) -> None:
        self._set_constant(name, value.shape, helper.np_dtype_to_tensor_dtype(value.dtype))
        self.values[name] = value

    def _set_tensor(self, name: str, tensor: onnx.TensorProto) -> None:
        self._set_constant(name, tensor.dims, tensor.data_type)
        if math.prod(tensor.dims) <= LARGEST_VALUE:
            self._set_value(name, self._read(tensor))

    def _read(self, tensor: onnx.TensorProto) -> Array:
        try:
            return numpy_helper.to_array(tensor, str(self._path.parent))
        except (OSError, ValueError, TypeError, onnx.checker.ValidationError) as error:
            raise ArchError(
                f"{self._path}: the values of {tensor.name!r} cannot be read: put the data file that "
                "belongs to this ONNX file beside it"
            ) from error

    def _set_image(
        self, inputs: Sequence[onnx.ValueInfoProto], resolution_px: int | None
    ) -> tuple[str, bool]:
        """Set the input's shape for one image; return its name and whether channels come last."""
        if len(inputs) != 1:
            names = ", ".join(i.name for i in inputs) or "none"
            raise ArchError(f"{self._path}: expected one input, a batch of images; found {names}")
        (image,) = inputs
        where = f"{self._path}: input {image.name!r}"
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in image.type.tensor_type.shape.dim]
        if len(dims) != 4:
            shape = ", ".join(str(d or "?") for d in dims)
            raise ArchError(f"{where} has the shape ({shape}), expected images: four dimensions")
        if dims[0] > 1:
            raise ArchError(
                f"{self._path}: the batch is fixed at {dims[0]} images, expected 1 or a free batch size: "
                "export it so"
            )
        of_image = range(1, _LARGEST_IMAGE_CHANNELS + 1)
        is_last = dims[1] not in of_image and dims[3] in of_image
        channels, places = (3, slice(1, 3)) if is_last else (1, slice(2, 4))
        if not dims[channels]:
            raise ArchError(f"{where} has a free number of channels, expected a fixed one")
        dims[places] = [side or resolution_px or 0 for side in dims[places]]
        if 0 in dims[places]:
            raise ArchError(f"{self._path}: height and width of the images are free: give a resolution in px")
        if resolution_px is not None and set(dims[places]) != {resolution_px}:
            size = " x ".join(map(str, dims[places]))
            raise ArchError(
                f"{self._path}: images are fixed at {size} px, not {resolution_px}: leave the resolution out"
            )
        self.shapes[image.name] = (1, *dims[1:])
        self.types[image.name] = image.type.tensor_type.elem_type
        return image.name, is_last

    def add(self, proto: onnx.NodeProto) -> None:
        """Infer a node's outputs; keep the node if it runs for every image."""
        standard = proto.domain in _STANDARD
        name = proto.name or next(filter(None, proto.output), proto.op_type)
        self._check(proto, name)
        if standard and proto.op_type == "Constant":
            self._set_stated_value(proto)
            return
        operands = list(filter(None, proto.input))
        asks_shape = standard and proto.op_type in ("Shape", "Size")
        is_constant = asks_shape or (bool(operands) and self.constants.issuperset(operands))
        self._infer(proto, name, is_constant)
        if is_constant:
            self._fold(proto, operands, asks_shape)
            return
        op = proto.op_type if standard else f"{proto.domain}.{proto.op_type}"
        self.nodes.append(Node(name, op, tuple(proto.input), tuple(proto.output), proto))

    def _check(self, proto: onnx.NodeProto, name: str) -> None:
        try:
            onnx.checker.check_node(proto, self._context)
        except onnx.checker.ValidationError as error:
            problem = str(error).strip().splitlines()[0]
            raise ArchError(f"{self._path}: not a valid ONNX graph: {name!r}: {problem}") from error
        if proto.op_type == "Constant" and len(proto.attribute) != 1:
            raise ArchError(f"{self._path}: not a valid ONNX graph: {name!r}: a constant without a value")
        unknown = [operand for operand in proto.input if operand and operand not in self.shapes]
        if unknown:
            raise ArchError(
                f"{self._path}: {proto.op_type} {name!r} reads {unknown[0]!r}, whose shape is not known: "
                "expected operators in running order, with shapes that follow from the image's"
            )

    def _set_stated_value(self, proto: onnx.NodeProto) -> None:
        (attribute,) = proto.attribute
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.SparseTensorProto):
            self._set_constant(proto.output[0], value.dims, value.values.data_type)
        elif isinstance(value, onnx.TensorProto):
            self._set_tensor(proto.output[0], value)
        else:
            kind = {"value_float": np.float32, "value_floats": np.float32}.get(attribute.name, np.int64)
            is_text = attribute.name.startswith("value_string")
            self._set_value(proto.output[0], np.array(value, dtype=object if is_text else kind))

    def _fold(self, proto: onnx.NodeProto, operands: Sequence[str], asks_shape: bool) -> None:
        """Follow the value of a constant, where it and those that it depends on are small."""
        self.constants.update(filter(None, proto.output))
        output = proto.output[0]
        size = math.prod(self.shapes[output]) if output in self.shapes else LARGEST_VALUE + 1
        if asks_shape:  # any values of that shape will do; these share one element
            feeds = {name: np.broadcast_to(np.float32(0), self.shapes[name]) for name in operands}
        else:
            feeds = {name: self.values[name] for name in operands if name in self.values}
        if size > LARGEST_VALUE or len(proto.output) > 1 or len(feeds) < len(set(operands)):
            return
        value = evaluate([proto], feeds, output, self.opset)
        if value is not None:
            self._set_value(output, value)

    def _infer(self, proto: onnx.NodeProto, name: str, is_constant: bool) -> None:
        """Set shape and element type of the outputs; for constants, only if they are known."""
        inferred = self._inferred_types(proto)
        for output in filter(None, proto.output):
            found = _static(inferred.get(output)) or _static(self._stated.get(output))
            if found is None and proto.op_type in _KEEP_SHAPE and proto.input[0] in self.shapes:
                found = self.shapes[proto.input[0]], self.types[proto.input[0]]
            if found is not None:
                self.shapes[output], self.types[output] = found
            elif not is_constant:
                raise ArchError(
                    f"{self._path}: the shape of {output!r}, which {proto.op_type} {name!r} gives, is not "
                    "known before it runs: expected standard operators whose shapes follow from the image's"
                )

    def _inferred_types(self, proto: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        domain = "" if proto.domain in _STANDARD else proto.domain
        inputs = [name for name in proto.input if name in self.shapes]
        try:
            schema = onnx.defs.get_schema(proto.op_type, self._opsets.get(domain, 1), domain)
            return shape_inference.infer_node_outputs(
                schema,
                proto,
                {i: helper.make_tensor_type_proto(self.types[i], self.shapes[i]) for i in inputs},
                {i: numpy_helper.from_array(self.values[i]) for i in inputs if i in self.values},
                opset_imports=[helper.make_opsetid(d, v) for d, v in self._opsets.items()],
                ir_version=self._context.ir_version,
            )
        except (
            onnx.defs.SchemaError,
            shape_inference.InferenceError,
            onnx.checker.ValidationError,
            RuntimeError,
        ):
            return {}


def _static(kind: onnx.TypeProto | None) -> tuple[Shape, int] | None:
    """Return shape and element type of a tensor type without free sizes."""
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return tuple(d.dim_value for d in dims), kind.tensor_type.elem_type
