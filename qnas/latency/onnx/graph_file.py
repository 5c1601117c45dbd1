"""An ONNX file as a graph for one image: the nodes that run, and the shape of every tensor.

OpenVINO's IRs, TFLite files and programs of torch.export are stated as ONNX graphs first.

A node whose inputs are all constants (weights, arithmetic on shapes) is computed when a runtime loads
the file, not for each image, and is left out. Such values are followed as far as shapes depend on them.
Weights are never read, so a file whose weights lie in another file is priced without them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.external_data_helper import ExternalDataInfo

from qnas.common.errors import ArchError, one_line
from qnas.common.reading import open_regular
from qnas.latency.onnx.einsum import parse_einsum
from qnas.latency.onnx.model_file import VALUE_BYTES, read_model
from qnas.latency.onnx.openvino_ir import read_ir
from qnas.latency.onnx.tflite_file import read_tflite
from qnas.latency.onnx.torch_program import read_program
from qnas.latency.onnx.values import LARGEST_VALUE, NUMBERS, Array, Node, evaluate

Shape = tuple[int, ...]

LARGEST_TENSOR = 2**31 - 1  # limit for the elements of a tensor, which onnx counts in 32 bits in places
_MOST_DIMENSIONS = 32
_LARGEST_IMAGE_CHANNELS = 4  # tells (1, C, H, W) from (1, H, W, C)
_STANDARD = ("", "ai.onnx")
# operators for which onnx infers no shape; they keep that of their input
_KEEP_SHAPE = ("GroupNormalization", "InstanceNormalization", "MeanVarianceNormalization")
_CONSTANT_VALUES = {  # attribute of a Constant -> its type, and that of the elements
    "value": (onnx.AttributeProto.TENSOR, None),
    "sparse_value": (onnx.AttributeProto.SPARSE_TENSOR, None),
    "value_float": (onnx.AttributeProto.FLOAT, np.float32),
    "value_floats": (onnx.AttributeProto.FLOATS, np.float32),
    "value_int": (onnx.AttributeProto.INT, np.int64),
    "value_ints": (onnx.AttributeProto.INTS, np.int64),
    "value_string": (onnx.AttributeProto.STRING, None),
    "value_strings": (onnx.AttributeProto.STRINGS, None),
}
_ONNX = ".onnx"
# The ending of a file -> its reader, and what it is called; other endings are read as ONNX.
READERS: dict[str, tuple[Callable[[Path], onnx.ModelProto], str]] = {
    _ONNX: (read_model, "ONNX graph"),
    ".xml": (read_ir, "OpenVINO IR"),
    ".tflite": (read_tflite, "TFLite graph"),
    ".pt2": (read_program, "graph of torch.export"),
}
# What onnx's functions in C++ and in Python raise for a node or a tensor that is not valid.
_ONNX_ERRORS = (
    *(onnx.checker.ValidationError, onnx.defs.SchemaError, shape_inference.InferenceError),
    *(RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
)


def read_graph(path: Path, *, resolution_px: int | None = None) -> "Graph":
    """Read an ONNX file, or one of another form in READERS, for a batch of one image.

    `resolution_px` is used for a height and width that the file leaves free. Raises ArchError where
    the file is none of its form, has other inputs than one image, a batch of more than one, branches, or
    tensors whose shape depends on data; and where free sizes need a resolution, or fixed ones differ from it.
    """
    reader, _ = READERS.get(path.suffix, READERS[_ONNX])
    model = reader(path)
    graph = Graph(model, path, resolution_px)
    for proto in model.graph.node:
        graph.add(proto)
    missing = [name for name in graph.outputs if name not in graph.shapes]
    if missing or not graph.outputs:
        what = f"no operator gives the output {one_line(missing[0], 60)!r}" if missing else "no outputs"
        raise graph.error(what)
    read, used = set(graph.outputs), []  # the nodes that an output depends on
    for node in reversed(graph.nodes):
        if read.intersection(node.outputs):
            read.update(filter(None, node.inputs))
            used.append(node)
    graph.nodes = used[::-1]
    return graph


class Graph:
    """The nodes that run, in order, for one image of shape (1, C, H, W) or (1, H, W, C), and the tensors."""

    def __init__(self, model: onnx.ModelProto, path: Path, resolution_px: int | None) -> None:
        self.path = path
        self._opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
        self._context = onnx.checker.C.CheckerContext()
        self._context.ir_version = model.ir_version
        self._context.opset_imports = self._opsets
        self._stated = {info.name: info.type for info in (*model.graph.value_info, *model.graph.output)}
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

    def error(self, problem: str) -> ArchError:
        """Return the error of a graph that is not valid."""
        _, form = READERS.get(self.path.suffix, READERS[_ONNX])
        return ArchError(f"{self.path}: not a valid {form}: {one_line(problem)}")

    def _set_shape(self, name: str, shape: Iterable[int], element: int, *, least: int) -> None:
        """Set a tensor's shape, of sizes of at least `least`, and the type of its elements."""
        sizes = tuple(shape)
        if name in self.shapes or not name:
            raise self.error(f"two tensors of the name {one_line(name, 60)!r}")
        is_large = len(sizes) > _MOST_DIMENSIONS or math.prod(sizes) > LARGEST_TENSOR
        if is_large or min(sizes, default=least) < least:
            raise ArchError(
                f"{self.path}: the tensor {one_line(name, 60)!r} has the shape "
                f"{one_line(sizes, 100)}, expected sizes above 0 and at most {LARGEST_TENSOR:,} elements"
            )
        self.shapes[name], self.types[name] = sizes, element

    def _set_constant(self, name: str, shape: Iterable[int], element: int) -> None:
        self._set_shape(name, shape, element, least=0)
        self.constants.add(name)

    def _set_value(self, name: str, value: Array) -> None:
        self._set_constant(name, value.shape, helper.np_dtype_to_tensor_dtype(value.dtype))
        self.values[name] = value

    def _set_tensor(self, name: str, tensor: onnx.TensorProto) -> None:
        kind = tensor.data_type
        if kind == onnx.TensorProto.UNDEFINED or kind not in onnx.TensorProto.DataType.values():
            raise self.error(f"{name!r} has elements of the unknown type {kind}")
        self._set_constant(name, tensor.dims, kind)
        if math.prod(tensor.dims) <= LARGEST_VALUE and kind != onnx.TensorProto.STRING:
            value = self._read(tensor, name)
            if value.shape != tuple(tensor.dims):
                raise self.error(f"the values of {name!r} do not fit its shape")
            self.values[name] = value

    def _read(self, tensor: onnx.TensorProto, name: str) -> Array:
        is_elsewhere = tensor.data_location == onnx.TensorProto.EXTERNAL
        try:
            return numpy_helper.to_array(self._with_data(tensor) if is_elsewhere else tensor)
        except (OSError, *_ONNX_ERRORS) as error:
            advice = "expected as many as its shape has"
            if is_elsewhere:
                advice = "put the data file that belongs to this ONNX file beside it"
            raise ArchError(
                f"{self.path}: the values of {one_line(name, 60)!r} cannot be read: {advice}"
            ) from error

    def _with_data(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """Return a small tensor with its data from another file. Raises OSError or ValueError."""
        info = ExternalDataInfo(tensor)
        folder = self.path.parent.resolve()
        file = (folder / info.location).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{info.location} is outside the folder")
        # a tensor without a length has as many bytes as its elements
        of_elements = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = info.length if info.length is not None else of_elements
        if size > VALUE_BYTES:
            raise ValueError(f"{size} bytes")
        with open_regular(file) as data:
            data.seek(info.offset or 0)
            content = data.read(size)
        return onnx.TensorProto(
            name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=content
        )

    def _set_image(
        self, inputs: Sequence[onnx.ValueInfoProto], resolution_px: int | None
    ) -> tuple[str, bool]:
        """Set the input's shape for one image; return its name and whether channels come last."""
        if len(inputs) != 1:
            names = one_line(", ".join(i.name for i in inputs), 100) if inputs else "none"
            raise ArchError(f"{self.path}: expected one input, a batch of images; found {names}")
        (image,) = inputs
        where = f"{self.path}: input {one_line(image.name, 60)!r}"
        # a free size is without a value, and -1 in the files of some writers
        given = [d.dim_value if d.HasField("dim_value") else -1 for d in image.type.tensor_type.shape.dim]
        shape = one_line(", ".join("?" if d == -1 else str(d) for d in given), 100)
        if len(given) != 4:
            raise ArchError(f"{where} has the shape ({shape}), expected images: four dimensions")
        if any(d == 0 or d < -1 for d in given):
            raise ArchError(f"{where} has the shape ({shape}), expected sizes above 0, or free ones")
        dims = [max(0, d) for d in given]
        if dims[0] > 1:
            raise ArchError(
                f"{self.path}: the batch is fixed at {dims[0]} images, expected 1 or a free batch size: "
                "export it so"
            )
        of_image = range(1, _LARGEST_IMAGE_CHANNELS + 1)
        is_last = dims[1] not in of_image and dims[3] in of_image
        channels, places = (3, slice(1, 3)) if is_last else (1, slice(2, 4))
        if not dims[channels]:
            raise ArchError(f"{where} has a free number of channels, expected a fixed one")
        dims[places] = [side or resolution_px or 0 for side in dims[places]]
        if 0 in dims[places]:
            raise ArchError(
                f"{self.path}: height and width of the images are free: give a resolution in px with "
                "--resolution"
            )
        if resolution_px is not None and set(dims[places]) != {resolution_px}:
            size = " x ".join(map(str, dims[places]))
            raise ArchError(
                f"{self.path}: images are fixed at {size} px, not {resolution_px}: leave the resolution out"
            )
        self._set_shape(image.name, (1, *dims[1:]), image.type.tensor_type.elem_type, least=1)
        return image.name, is_last

    def add(self, proto: onnx.NodeProto) -> None:
        """Infer a node's outputs; keep the node if it runs for every image."""
        standard = proto.domain in _STANDARD
        outputs = tuple(filter(None, proto.output))
        node = Node(
            proto.name or next(iter(outputs), proto.op_type),
            proto.op_type if standard else f"{proto.domain}.{proto.op_type}",
            tuple(proto.input),
            outputs,
            proto,
        )
        if any(attribute.ref_attr_name for attribute in proto.attribute):
            raise self._node_error(node, "an attribute of a function, but it is in none")
        if node.op == "Constant":
            self._set_stated_value(node)
            return
        self._check(node)
        operands = list(filter(None, proto.input))
        asks_shape = node.op in ("Shape", "Size")
        is_constant = asks_shape or (bool(operands) and self.constants.issuperset(operands))
        self._infer(node, is_constant)
        if is_constant:
            self.constants.update(outputs)
            self._fold(node)
        elif outputs:
            self.nodes.append(node)

    def _check(self, node: Node) -> None:
        try:
            onnx.checker.check_node(node.proto, self._context)
        except _ONNX_ERRORS as error:
            raise self._node_error(node, error) from error
        unknown = [operand for operand in node.inputs if operand and operand not in self.shapes]
        if unknown:
            raise ArchError(
                f"{self.path}: {one_line(node.op, 40)} {one_line(node.name, 40)!r} reads "
                f"{one_line(unknown[0], 40)!r}, whose shape is not known: "
                "expected operators in running order, with shapes that follow from the image's"
            )

    def _node_error(self, node: Node, problem: object) -> ArchError:
        lines = str(problem).strip().splitlines()
        return self.error(f"{one_line(node.name, 60)!r}: {lines[0] if lines else type(problem).__name__}")

    def _set_stated_value(self, node: Node) -> None:
        stated = list(node.proto.attribute)
        kind, element = _CONSTANT_VALUES.get(stated[0].name, (None, None)) if stated else (None, None)
        if len(stated) != 1 or len(node.outputs) != 1 or stated[0].type != kind:
            raise self._node_error(node, "a constant without a value")
        (attribute,), (output,) = stated, node.outputs
        if attribute.name == "value":
            self._set_tensor(output, attribute.t)
        elif attribute.name == "sparse_value":
            sparse = attribute.sparse_tensor
            self._set_constant(output, sparse.dims, sparse.values.data_type)
        elif element is None:
            shape = (len(attribute.strings),) if attribute.name == "value_strings" else ()
            self._set_constant(output, shape, onnx.TensorProto.STRING)
        else:
            value = np.array(node.attribute(attribute.name), dtype=element)
            self._set_constant(output, value.shape, helper.np_dtype_to_tensor_dtype(value.dtype))
            if value.size <= LARGEST_VALUE:
                self.values[output] = value

    def _fold(self, node: Node) -> None:
        """Follow the value of a constant, where it and those that it depends on are small."""
        if len(node.outputs) != 1:
            return
        (output,) = node.outputs
        value: Array | None
        if node.op in ("Shape", "Size"):
            shape = self.shapes[node.inputs[0]]
            if node.op == "Size":
                value = np.array(math.prod(shape))
            else:
                value = np.array(shape[node.attribute("start", 0) : node.attribute("end")], dtype=np.int64)
        elif all(name in self.values for name in node.inputs if name):
            value = evaluate(node, [self.values[name] if name else None for name in node.inputs])
        else:
            return
        # a shape that onnx infers otherwise is a mistake of one of the two
        if value is None or self.shapes.get(output, value.shape) != value.shape:
            return
        self.shapes[output] = value.shape
        self.types[output] = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.values[output] = value

    def _infer(self, node: Node, is_constant: bool) -> None:
        """Set shape and element type of the outputs; for constants, only if they are known."""
        inferred = self._inferred_types(node)
        for output in node.outputs:
            found = _static(inferred.get(output)) or _static(self._stated.get(output))
            if found is None and node.op in _KEEP_SHAPE and node.inputs[0] in self.shapes:
                found = self.shapes[node.inputs[0]], self.types[node.inputs[0]]
            if found is not None:
                self._set_shape(output, *found, least=0 if is_constant else 1)
            elif output in self.shapes or output in self.constants:
                raise self.error(f"two tensors of the name {one_line(output, 60)!r}")
            elif not is_constant:
                raise ArchError(
                    f"{self.path}: the shape of {one_line(output, 40)!r}, which "
                    f"{one_line(node.proto.op_type, 40)} {one_line(node.name, 40)!r} gives, is not known "
                    "before it runs: expected standard operators whose shapes follow from the image's"
                )

    def _inferred_types(self, node: Node) -> Mapping[str, onnx.TypeProto]:
        """Return the types that onnx infers for a node's outputs; none for operators that are not its own.

        Raises ArchError for inputs or attributes that do not fit the operator.
        """
        proto = node.proto
        domain = "" if proto.domain in _STANDARD else proto.domain
        try:
            schema = onnx.defs.get_schema(proto.op_type, self._opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return {}
        inputs = [name for name in node.inputs if name]
        # those of other types, such as bfloat16, decide no shapes
        known = {name: self.values[name] for name in inputs if name in self.values}
        values = {name: value for name, value in known.items() if value.dtype.kind in NUMBERS}
        self._check_sizes(node)
        try:
            if node.op == "Einsum":
                shapes = [self.shapes[name] for name in node.inputs]
                shape = parse_einsum(node.attribute("equation"), shapes).shape
                return {node.outputs[0]: helper.make_tensor_type_proto(self.types[inputs[0]], shape)}
            return shape_inference.infer_node_outputs(
                schema,
                proto,
                {i: helper.make_tensor_type_proto(self.types[i], self.shapes[i]) for i in inputs},
                {name: numpy_helper.from_array(value) for name, value in values.items()},
                opset_imports=[helper.make_opsetid(d, v) for d, v in self._opsets.items()],
                ir_version=self._context.ir_version,
            )
        except _ONNX_ERRORS as error:
            raise self._node_error(node, error) from error

    def _check_sizes(self, node: Node) -> None:
        """Refuse numbers at which onnx's inference, in C++, ends the process or does not end itself."""
        rank, last = (len(self.shapes[name]) if name else 0 for name in (*node.inputs, "", "")[:2])
        for attribute in node.proto.attribute:
            name, number = attribute.name, attribute.i
            is_place = name != "axis" or -rank - 1 <= number <= rank + 1
            if attribute.type == onnx.AttributeProto.INT and not (is_place and abs(number) < 2**31 - 1):
                raise self._node_error(node, f"{name} is {number}, but its input has {rank} dimensions")
        count = node.attribute("num_outputs")
        if node.op == "Split" and count is not None and count != len(node.proto.output):
            raise self._node_error(node, f"num_outputs is {count}, but it has {len(node.outputs)} outputs")
        if node.op == "GatherND" and last:
            batch, indices = node.attribute("batch_dims", 0), self.shapes[node.inputs[1]][-1]
            if batch < 0 or batch + indices > rank:
                raise self._node_error(
                    node, f"{batch} + {indices} indices, but its input has {rank} dimensions"
                )


def _static(kind: onnx.TypeProto | None) -> tuple[Shape, int] | None:
    """Return shape and element type of a tensor type without free sizes."""
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    if not all(d.HasField("dim_value") and d.dim_value >= 0 for d in dims):
        return None
    return tuple(d.dim_value for d in dims), kind.tensor_type.elem_type
