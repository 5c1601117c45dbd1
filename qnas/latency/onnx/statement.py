"""A graph of another format stated as an ONNX graph, so that all formats are read by one reader.

Only shapes, attributes and small constants are stated: no weights. The tensors keep the layout that they have
in the file; convolutions with channels last stand between two transpositions, which are free.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qnas.common.errors import ArchError, one_line
from qnas.latency.onnx.model_file import NODES
from qnas.latency.onnx.values import LARGEST_VALUE, Array

OPSET = 21  # the first whose GroupNormalization is not deprecated
TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # transpositions between (N, H, W, C) and (N, C, H, W)

# What wrong numbers and missing parts of a file raise while it is read.
_MISFITS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error)


@contextmanager
def damage(path: Path, form: str) -> Iterator[None]:
    """Raise what a damaged file raises as an ArchError that calls it no file of this form."""
    try:
        yield
    except _MISFITS as error:
        raise ArchError(f"{path}: not a valid {form} file: {one_line(error, 150)}") from error


class Statement:
    """The nodes and constants of a graph while it is stated."""

    def __init__(self, path: Path, form: str) -> None:
        self.path, self.form = path, form  # form: the domain of operators that have no name in ONNX
        self.values: dict[str, Array] = {}  # of the small constants
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._weights: list[onnx.SparseTensorProto] = []
        self._stated: dict[str, list[int]] = {}  # shapes by tensor
        self._made = 0

    def fresh(self) -> str:
        """Return a name that no tensor has."""
        self._made += 1
        return f"qnas:{self._made}"

    def weight(self, name: str, shape: Sequence[int], *, element: int = TensorProto.FLOAT) -> str:
        """State a constant without its values; return its name."""
        # a sparse tensor is a constant of which only the shape is read
        values = TensorProto(name=name, data_type=element)
        self._weights.append(onnx.SparseTensorProto(values=values, dims=list(shape)))
        return name

    def constant(self, value: Any, name: str = "", *, dtype: Any = None) -> str:
        """State a small constant, numbers in float32 or int64; return its name."""
        given = np.asarray(value)
        kind = dtype or (np.float32 if given.dtype.kind == "f" else np.int64)
        name, array = name or self.fresh(), given.astype(kind)
        if array.size > LARGEST_VALUE:
            return self.weight(name, array.shape, element=helper.np_dtype_to_tensor_dtype(array.dtype))
        self.values[name] = array
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def numbers(self, name: str) -> list[int]:
        """Return the whole numbers of a constant. Raises ValueError where it is none."""
        if name not in self.values:
            raise ValueError("axes or sizes that are not constant")
        return [int(n) for n in self.values[name].reshape(-1)]

    def add(self, op: str, *inputs: str, output: str = "", name: str = "", **attributes: Any) -> str:
        """State a node of one output; return the output's name. Attributes that are None are left out."""
        return self.add_all(op, inputs, [output or self.fresh()], name=name, **attributes)[0]

    def add_all(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, name: str = "", **attributes: Any
    ) -> Sequence[str]:
        """State a node of any number of outputs."""
        if len(self._nodes) >= NODES:
            raise ArchError(f"{self.path}: more than {NODES:,} nodes, expected a network of images")
        given = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name or outputs[0], **given))
        return outputs

    def add_unknown(
        self, op: str, inputs: Sequence[str], outputs: Sequence[tuple[str, Sequence[int]]], *, name: str = ""
    ) -> None:
        """State an operator that has no name in ONNX, with the shapes of its outputs."""
        for output, shape in outputs:
            self.state(output, [max(1, size) for size in shape])
        self.add_all(op, inputs, [output for output, _ in outputs], name=name, domain=self.form)

    def state(self, tensor: str, shape: Sequence[int]) -> None:
        """State the shape of a tensor."""
        self._stated[tensor] = list(shape)

    def layer_norm(self, x: str, channels: int, *, output: str = "", name: str = "") -> str:
        """State a layer norm over the last dimension, without a scale of its own."""
        return self.add(
            "LayerNormalization", x, self.weight(self.fresh(), [channels]), output=output, name=name
        )

    def requantised(self, x: str, *, output: str, name: str = "") -> str:
        """State that a tensor is rounded to the steps of another precision: two changes, which are free."""
        half = self.add("Cast", x, name=name, to=TensorProto.FLOAT16)
        return self.add("Cast", half, output=output, to=TensorProto.FLOAT)

    def clip(
        self, x: str, low: float, high: float, *, output: str = "", name: str = "", dtype: Any = np.float32
    ) -> str:
        """State a clip; a bound that is not finite is left out."""
        bounds = [self.constant(float(b), dtype=dtype) if math.isfinite(b) else "" for b in (low, high)]
        return self.add("Clip", x, *bounds, output=output, name=name)

    def model(self, inputs: Sequence[tuple[str, Sequence[int]]], outputs: Sequence[str]) -> onnx.ModelProto:
        """Return the graph. A size below zero is free."""
        stated = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self._stated.items()]
        graph = helper.make_graph(
            self._nodes,
            "stated",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n, shape in inputs],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, self._stated.get(n)) for n in outputs],
            self._constants,
            value_info=stated,
            sparse_initializer=self._weights,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(self.form, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
