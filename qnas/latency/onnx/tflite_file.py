"""A TFLite file stated as an ONNX graph: a flatbuffer with channels last, read without any runtime.

A pad before a convolution is the convolution's own, as XNNPACK fuses it. Numbers of fields, types and
operators are those of TensorFlow's schema.fbs, where they never change.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from qnas.common.errors import ArchError
from qnas.common.reading import read_bytes
from qnas.latency.onnx.statement import TO_FIRST, TO_LAST, Statement, damage
from qnas.latency.onnx.values import LARGEST_VALUE, Array, is_mean

_FILE_BYTES = 512_000_000  # limit for a file
_MOST_TABLES = 100_000  # limit for a list of tables
_MOST_OPERANDS = 64  # limit for the tensors that one operator reads or writes
_MOST_DIMENSIONS = 32
_TYPES = {
    **{0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 6: np.bool_, 7: np.int16},
    **{9: np.int8, 10: np.float64},
}
_FLOATS = (0, 1, 10)
_SAME_PADDING = 0


class _Table:
    """A table of a flatbuffer; its fields are numbered from 0."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at
        self._fields = at - self._read("<i", at)  # where each field is, beside the table
        self._size = self._read("<H", self._fields)

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise ValueError("a place before the file's begin")
        value: int = struct.unpack_from(form, self._content, at)[0]
        return value

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        offset = self._read("<H", self._fields + entry) if entry + 2 <= self._size else 0
        return self._at + offset if offset else None

    def number(self, field: int, form: str = "<i", default: int = 0) -> int:
        """Return a number; `form` is that of `struct`."""
        at = self._place(field)
        return default if at is None else self._read(form, at)

    def table(self, field: int) -> "_Table":
        """Return a table; one without any fields where it is left out."""
        at = self._place(field)
        return _Table(self._content, at + self._read("<I", at)) if at is not None else _EMPTY

    def numbers(self, field: int, dtype: type[np.generic] = np.int32) -> Array:
        """Return a list of numbers, empty where it is left out."""
        at = self._place(field)
        if at is None:
            return np.zeros(0, dtype)
        at += self._read("<I", at)
        return np.frombuffer(self._content, dtype, self._read("<I", at), at + 4)

    def tables(self, field: int) -> "list[_Table]":
        """Return a list of tables."""
        at = self._place(field)
        if at is None:
            return []
        at += self._read("<I", at)
        count = self._read("<I", at)
        if count > _MOST_TABLES:
            raise ValueError(f"a list of {count:,}")
        places = range(at + 4, at + 4 + 4 * count, 4)
        return [_Table(self._content, place + self._read("<I", place)) for place in places]


_EMPTY = _Table(struct.pack("<iHH", -4, 4, 0), 0)


class _Tensor:
    """A tensor: its name in the graph, and what the file says of it."""

    def __init__(self, number: int, table: _Table, buffers: Sequence[_Table]) -> None:
        self.name = f"t{number}"
        shape = table.numbers(0)
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{len(shape)} dimensions")
        self.shape = tuple(map(int, shape))
        self._kind = table.number(1, "<b")
        signature = table.numbers(7)
        self.free = tuple(map(int, signature)) if len(signature) == len(shape) else self.shape
        self._scales = table.table(4)
        self._buffer = buffers[table.number(2, "<I")]

    @cached_property
    def is_constant(self) -> bool:
        """Whether the file has its values."""
        return len(self._buffer.numbers(0, np.uint8)) > 0 or self._buffer.number(1, "<Q") > 1

    def state(self, to: Statement) -> None:
        """State a constant; values in steps are stated as what they stand for."""
        is_small = math.prod(self.shape) <= LARGEST_VALUE and self._kind in _TYPES
        content = self._buffer.numbers(0, np.uint8)
        if not is_small or not len(content):
            to.weight(self.name, self.shape)
            return
        value: Array = np.frombuffer(content.tobytes(), _TYPES[self._kind]).reshape(self.shape)
        scale, zero = self._scales.numbers(2, np.float32), self._scales.numbers(3, np.int64)
        if self._kind in _FLOATS:
            to.constant(value.astype(np.float32), self.name)
        elif len(scale) == 1:
            to.constant((value - float(zero[0] if len(zero) else 0)) * float(scale[0]), self.name)
        elif len(scale):
            to.weight(self.name, self.shape)
        else:
            to.constant(value, self.name)


@dataclass(frozen=True)
class _Operator:
    """An operator with its tensors; an input that is left out is None."""

    code: int
    custom: str
    options: _Table
    inputs: tuple[_Tensor | None, ...]
    outputs: tuple[_Tensor, ...]

    @property
    def names(self) -> list[str]:
        """The names of its inputs."""
        return [tensor.name if tensor is not None else "" for tensor in self.inputs]

    @property
    def x(self) -> _Tensor:
        """The first input."""
        return self.given(0)

    @property
    def y(self) -> _Tensor:
        """The first output."""
        return self.outputs[0]

    def given(self, place: int) -> _Tensor:
        """Return an input that must be there. Raises ValueError where it is left out."""
        tensor = self.inputs[place] if place < len(self.inputs) else None
        if tensor is None:
            raise ValueError("an operator without its inputs")
        return tensor


class _Stating(Statement):
    """A statement that remembers pads and bounds, which the next operator may take up."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "tflite")
        self.pads: dict[str, tuple[str, list[int]]] = {}  # padded map -> the map, its pads in ONNX's order
        self.bounds: dict[str, tuple[str, float, float]] = {}  # bounded map -> the map, its bounds


def read_tflite(path: Path) -> onnx.ModelProto:
    """State the first graph of a TFLite file as an ONNX graph.

    Raises ArchError where it is no TFLite file, or exceeds a limit.
    """
    content = read_bytes(path, ArchError, "a TFLite file", limit=_FILE_BYTES)
    if content[4:8] != b"TFL3":
        raise ArchError(f"{path}: not a TFLite file: its first bytes are not those of one")
    with damage(path, "TFLite"):
        model = _Table(content, struct.unpack_from("<I", content)[0])
        graph, to = model.tables(2)[0], _Stating(path)
        buffers = model.tables(4)
        tensors = [_Tensor(i, table, buffers) for i, table in enumerate(graph.tables(0))]
        for tensor in tensors:
            if tensor.is_constant:
                tensor.state(to)
        for operator in _operators(model, graph, tensors):
            state = _OPERATORS.get(operator.code)
            if state is not None:
                state(to, operator)
            else:
                name = operator.custom or f"BuiltinOperator_{operator.code}"
                names = [n for n in operator.names if n]
                to.add_unknown(name, names, [(y.name, y.shape) for y in operator.outputs])
        images = [(tensors[i].name, tensors[i].free) for i in graph.numbers(1)]
        return to.model(images, [tensors[i].name for i in graph.numbers(2)])


def _operators(model: _Table, graph: _Table, tensors: Sequence[_Tensor]) -> Iterator[_Operator]:
    codes = model.tables(1)
    for table in graph.tables(3):
        code = codes[table.number(0, "<I")]
        ins, outs = table.numbers(1), table.numbers(2)
        if max(len(ins), len(outs)) > _MOST_OPERANDS or not len(outs):
            raise ValueError(f"an operator of {len(ins)} inputs and {len(outs)} outputs")
        custom = code.numbers(1, np.uint8)[:40].tobytes().decode(errors="replace")
        yield _Operator(
            # newer files have the code in the last field, older ones in the first, a byte
            max(code.number(0, "<b"), code.number(3)),
            "".join(filter(str.isalnum, custom)),
            table.table(4),
            tuple(tensors[i] if i >= 0 else None for i in ins),
            tuple(tensors[i] for i in outs),
        )


_State = Callable[[_Stating, _Operator], object]
_FUSED: dict[int, Callable[[Statement, str, str], str]] = {
    1: lambda to, x, y: to.add("Relu", x, output=y),
    2: lambda to, x, y: to.clip(x, -1.0, 1.0, output=y),
    3: lambda to, x, y: to.clip(x, 0.0, 6.0, output=y),
    4: lambda to, x, y: to.add("Tanh", x, output=y),
}


def _with_activation(to: Statement, operator: _Operator, field: int, write: Callable[[str], str]) -> None:
    """Write an operator to a tensor, and the activation that a field names after it."""
    kind = operator.options.number(field, "<b")
    if not kind:
        write(operator.y.name)
    elif kind not in _FUSED:
        raise ValueError(f"the activation {kind}")
    else:
        _FUSED[kind](to, write(to.fresh()), operator.y.name)


def _as(op: str, *, fused: int | None = None) -> _State:
    """State an operator of the same inputs under ONNX's name, with the field of its activation."""

    def state(to: _Stating, operator: _Operator) -> None:
        def write(y: str) -> str:
            return to.add(op, *operator.names, output=y)

        _with_activation(to, operator, fused, write) if fused is not None else write(operator.y.name)

    return state


def _convolution(to: _Stating, operator: _Operator) -> None:
    x, weight, options = operator.x, operator.given(1), operator.options
    is_depthwise = operator.code == _DEPTHWISE
    later = int(is_depthwise)  # its options have the multiplier before the activation
    stride = [options.number(2, default=1), options.number(1, default=1)]
    dilation = [options.number(5 + later, default=1), options.number(4 + later, default=1)]
    values = to.values.get(weight.name)
    if values is not None and values.ndim == 4 and is_mean(values.transpose(TO_FIRST)) and not is_depthwise:
        _mean(to, operator)
        return
    source, pads = x.name, None
    is_same = options.number(0, "<b") == _SAME_PADDING
    if not is_same and source in to.pads:
        source, pads = to.pads[source]
    # weights (O, H, W, I), or (1, H, W, O) of a depthwise one, become (O, I, H, W)
    order = [3, 0, 1, 2] if is_depthwise else TO_FIRST
    groups = x.shape[3] if is_depthwise else x.shape[3] // max(1, weight.shape[3])
    operands = [to.add("Transpose", source, perm=TO_FIRST), to.add("Transpose", weight.name, perm=order)]
    operands += [name for name in operator.names[2:3] if name]

    def write(y: str) -> str:
        result = to.add(
            *("Conv", *operands),
            name=operator.y.name,
            strides=stride,
            dilations=dilation,
            group=groups,
            auto_pad="SAME_UPPER" if is_same else None,
            pads=pads,
        )
        return to.add("Transpose", result, output=y, perm=TO_LAST)

    _with_activation(to, operator, 3 + later, write)


def _mean(to: _Stating, operator: _Operator) -> None:
    """State a convolution that takes the mean over channels as that mean, with its bias."""
    bias = operator.names[2] if len(operator.names) > 2 else ""

    def write(y: str) -> str:
        axes = to.constant([3])
        mean = to.add("ReduceMean", operator.x.name, axes, output="" if bias else y, name=operator.y.name)
        return to.add("Add", mean, bias, output=y) if bias else mean

    _with_activation(to, operator, 3, write)


def _pool(op: str) -> _State:
    def state(to: _Stating, operator: _Operator) -> None:
        options = operator.options

        def write(y: str) -> str:
            pooled = to.add(
                op,
                to.add("Transpose", operator.x.name, perm=TO_FIRST),
                name=operator.y.name,
                strides=[options.number(2, default=1), options.number(1, default=1)],
                kernel_shape=[options.number(4, default=1), options.number(3, default=1)],
                auto_pad="SAME_UPPER" if options.number(0, "<b") == _SAME_PADDING else "VALID",
            )
            return to.add("Transpose", pooled, output=y, perm=TO_LAST)

        _with_activation(to, operator, 5, write)

    return state


def _linear(to: _Stating, operator: _Operator) -> None:
    x, weight = operator.x, operator.given(1)
    source, kept = x.name, operator.options.number(2, "<b")
    if len(x.shape) > 2 and not kept:
        source = to.add("Reshape", source, to.constant([-1, weight.shape[-1]]))
    bias = operator.names[2] if len(operator.names) > 2 else ""

    def write(y: str) -> str:
        product = to.add(
            "MatMul", source, to.add("Transpose", weight.name, perm=[1, 0]), name=operator.y.name
        )
        return to.add("Add", product, bias, output=y) if bias else to.add("Identity", product, output=y)

    _with_activation(to, operator, 0, write)


def _reduction(op: str) -> _State:
    """State a reduction that keeps its dimensions, and the shape that the file has after it.

    So a norm's mean is of the rank of the map, by which it is told.
    """

    def state(to: _Stating, operator: _Operator) -> None:
        axes = operator.given(1).name
        if operator.options.number(0, "<b"):
            to.add(op, operator.x.name, axes, output=operator.y.name)
        else:
            _shaped(to, to.add(op, operator.x.name, axes, name=operator.y.name), operator)

    return state


def _shaped(to: Statement, x: str, operator: _Operator) -> None:
    """State a tensor in the shape of an operator's output."""
    shape = [size if size >= 0 else -1 for size in operator.y.free]
    to.add("Reshape", x, to.constant(shape or np.zeros(0, np.int64)), output=operator.y.name)


def _transpose(to: _Stating, operator: _Operator) -> None:
    order = to.numbers(operator.given(1).name)
    to.add("Transpose", operator.x.name, output=operator.y.name, perm=order)


def _pad(to: _Stating, operator: _Operator) -> None:
    pads = np.array(to.numbers(operator.given(1).name)).reshape(-1, 2)
    starts, ends = pads.T.tolist()
    if len(pads) == 4 and not (pads[0].any() or pads[3].any()) and (pads >= 0).all():
        to.pads[operator.y.name] = operator.x.name, [*starts[1:3], *ends[1:3]]
    to.add("Pad", operator.x.name, to.constant([*starts, *ends]), output=operator.y.name)


def _bound(to: _Stating, operator: _Operator) -> None:
    """State a maximum or minimum with a number; two in a row are a clip."""
    x, bound = operator.x.name, to.values.get(operator.given(1).name)
    if bound is None or bound.size != 1:
        to.add("Max" if operator.code == _MAXIMUM else "Min", *operator.names, output=operator.y.name)
        return
    number = float(bound.reshape(-1)[0])
    source, low, high = to.bounds.get(x, (x, -math.inf, math.inf))
    low, high = (max(low, number), high) if operator.code == _MAXIMUM else (low, min(high, number))
    to.bounds[operator.y.name] = source, low, high
    to.clip(source, low, high, output=operator.y.name)


def _dequantise(to: _Stating, operator: _Operator) -> None:
    """State a tensor in steps, which is stated as what it stands for, under another name."""
    if operator.x.name in to.values:
        to.constant(to.values[operator.x.name], operator.y.name)
    else:
        to.add("Identity", operator.x.name, output=operator.y.name)


def _squared_difference(to: _Stating, operator: _Operator) -> None:
    difference = to.add("Sub", *operator.names, name=operator.y.name)
    to.add("Mul", difference, difference, output=operator.y.name)


def _square(to: _Stating, operator: _Operator) -> None:
    to.add("Mul", operator.x.name, operator.x.name, output=operator.y.name)


def _rsqrt(to: _Stating, operator: _Operator) -> None:
    to.add("Reciprocal", to.add("Sqrt", operator.x.name), output=operator.y.name)


def _concatenation(to: _Stating, operator: _Operator) -> None:
    axis = operator.options.number(0)
    _with_activation(
        to, operator, 1, lambda y: to.add("Concat", *filter(None, operator.names), output=y, axis=axis)
    )


def _clipped(low: float, high: float) -> _State:
    return lambda to, operator: to.clip(operator.x.name, low, high, output=operator.y.name)


_DEPTHWISE, _MAXIMUM = 4, 55
# The operators that have a name in ONNX, by their numbers.
_OPERATORS: dict[int, _State] = {
    3: _convolution,
    _DEPTHWISE: _convolution,
    9: _linear,
    **{1: _pool("AveragePool"), 17: _pool("MaxPool")},
    **{0: _as("Add", fused=0), 41: _as("Sub", fused=0), 18: _as("Mul", fused=0), 42: _as("Div", fused=0)},
    **{19: _as("Relu"), 20: _clipped(-1.0, 1.0), 21: _clipped(0.0, 6.0), 117: _as("HardSwish")},
    **{150: _as("Gelu"), 14: _as("Sigmoid"), 28: _as("Tanh"), 25: _as("Softmax"), 54: _as("PRelu")},
    **{_MAXIMUM: _bound, 57: _bound, 78: _as("Pow"), 47: _as("Exp"), 59: _as("Neg"), 101: _as("Abs")},
    **{75: _as("Sqrt"), 76: _rsqrt, 92: _square, 99: _squared_difference},
    **{40: _reduction("ReduceMean"), 74: _reduction("ReduceSum")},
    **{22: lambda to, operator: _shaped(to, operator.x.name, operator)},  # RESHAPE
    **{43: lambda to, operator: _shaped(to, operator.x.name, operator)},  # SQUEEZE
    **{70: lambda to, operator: _shaped(to, operator.x.name, operator)},  # EXPAND_DIMS
    39: _transpose,
    34: _pad,
    2: _concatenation,
    6: _dequantise,
    114: lambda to, operator: to.requantised(operator.x.name, output=operator.y.name),  # QUANTIZE
}
