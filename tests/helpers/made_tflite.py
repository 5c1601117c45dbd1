"""Small TFLite files, written field by field with flatbuffers, of which onnxruntime needs the package."""

from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np

# Fields are those of TensorFlow's schema.fbs, numbered from 0.
CONV, DEPTHWISE, LINEAR = 3, 4, 9
SAME, VALID = 0, 1
RELU, RELU6 = 1, 3

_TYPES = {"float32": 0, "float16": 1, "int32": 2, "int64": 4, "int8": 9}

Step = tuple[Any, ...]  # code of the operator, inputs, outputs[, its options by field]


def tflite_file(
    tensors: Mapping[str, Any],
    steps: Sequence[Step],
    *,
    image: Sequence[int] = (1, 8, 8, 4),
    scales: Mapping[str, tuple[float, int]] | None = None,
    image_signature: Sequence[int] = (),
) -> bytes:
    """Return a file from the input `x` to the last step's output.

    A tensor is given as its shape, or as an array of its values; `scales` are scale and zero point of those
    in steps. Names of inputs and outputs are separated by blanks; `-` is an input that is left out.
    """
    given = {"x": tuple(image), **tensors}
    numbers = {name: i for i, name in enumerate(given)}
    file = flatbuffers.Builder()
    buffers = [_table(file, {})]
    written = []
    for name, value in given.items():
        is_constant = isinstance(value, np.ndarray)
        fields: dict[int, Any] = {
            0: _numbers(file, np.array(value.shape if is_constant else value, np.int32)),
            1: _TYPES[str(value.dtype)] if is_constant else 0,
            3: _text(file, name),
        }
        if is_constant:
            fields[2] = len(buffers)
            buffers.append(_table(file, {0: _numbers(file, np.frombuffer(value.tobytes(), np.uint8))}))
        if name in (scales or {}):
            scale, zero = (scales or {})[name]
            points = _numbers(file, np.array([zero], np.int64))
            fields[4] = _table(file, {2: _numbers(file, np.array([scale], np.float32)), 3: points})
        if name == "x" and image_signature:
            fields[7] = _numbers(file, np.array(image_signature, np.int32))
        written.append(_table(file, fields))
    codes, operators = [], []
    for i, (code, inputs, outputs, *options) in enumerate(steps):
        named = {0: 32, 1: code, 3: 32} if isinstance(code, str) else {3: code, 0: min(code, 127)}
        codes.append(_table(file, {k: _text(file, v) if isinstance(v, str) else v for k, v in named.items()}))
        ins = [numbers.get(name, -1) for name in inputs.split()]
        outs = [numbers[name] for name in outputs.split()]
        fields = {
            0: i,
            1: _numbers(file, np.array(ins, np.int32)),
            2: _numbers(file, np.array(outs, np.int32)),
        }
        if options:
            fields[4] = _table(file, options[0])
        operators.append(_table(file, fields))
    ends = _numbers(file, np.array([numbers[steps[-1][2].split()[0]]], np.int32))
    graph = {0: _list(file, written), 1: _numbers(file, np.array([0], np.int32)), 2: ends}
    graphs = _list(file, [_table(file, {**graph, 3: _list(file, operators)})])
    root = _table(file, {0: 3, 1: _list(file, codes), 2: graphs, 4: _list(file, buffers)})
    file.Finish(root.at, b"TFL3")
    return bytes(file.Output())


class _Place:
    """Where something was written: a field that refers to it."""

    def __init__(self, at: int) -> None:
        self.at = at


def _numbers(file: Any, values: Any) -> _Place:
    return _Place(file.CreateNumpyVector(values))


def _text(file: Any, text: str) -> _Place:
    return _Place(file.CreateString(text))


def _list(file: Any, tables: Sequence[_Place]) -> _Place:
    file.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        file.PrependUOffsetTRelative(table.at)
    return _Place(file.EndVector())


def _table(file: Any, fields: Mapping[int, Any]) -> _Place:
    """Write a table; numbers have four bytes, of which a reader of fewer takes the lowest."""
    file.StartObject(max(fields, default=0) + 1)
    for field, value in fields.items():
        if isinstance(value, _Place):
            file.PrependUOffsetTRelativeSlot(field, value.at, 0)
        else:
            file.PrependInt32Slot(field, value, -(2**31))
    return _Place(file.EndObject())
