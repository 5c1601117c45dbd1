"""A program of torch.export, a .pt2, stated as an ONNX graph.

Only the JSON of its graph is read. torch.export.load also reads pickles, which can run anything, so it is not
used, and torch is not needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qnas.common.arrays import DAMAGE, check_member, open_zip
from qnas.common.errors import ArchError, one_line
from qnas.common.reading import parse_json
from qnas.latency.onnx.statement import Statement, damage

_END = 2**31 - 1  # an end beyond any dimension
_GRAPH = "/models/model.json"  # the member of the archive, in a folder of any name
_GRAPH_BYTES = 32_000_000  # limit; a network of a hundred layers has half a million
_HALF = 6  # torch's number of the type


@dataclass(frozen=True)
class _Call:
    """A call of an operator: its arguments by name, and the names of its outputs."""

    op: str
    name: str
    arguments: Mapping[str, Any]  # tensors as their names
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors; a free size is -1
    dtype: type[np.floating[Any]]  # of the first output

    def get(self, key: str, default: Any = None) -> Any:
        """Return an argument."""
        value = self.arguments.get(key)
        return default if value is None else value

    @property
    def x(self) -> str:
        """The first tensor."""
        first, *_ = self.arguments.values()
        return str(first)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.shapes[self.outputs[0]]


def read_program(path: Path) -> onnx.ModelProto:
    """State a program as an ONNX graph. Raises ArchError where it is none, or exceeds a limit."""
    with damage(path, "torch.export"):
        module = _graph_module(path)
        graph, statement = module["graph"], Statement(path, "torch")
        values = graph["tensor_values"]
        shapes = {name: tuple(s.get("as_int", -1) for s in v["sizes"]) for name, v in values.items()}
        images = []
        for spec in module["signature"]["input_specs"]:
            ((kind, given),) = spec.items()
            if kind == "user_input":
                images.append((_name(given["arg"]), shapes[_name(given["arg"])]))
            elif "name" in given.get("arg", {}):
                name = given["arg"]["name"]
                statement.weight(name, shapes[name], element=_element(values[name]))
        for node in graph["nodes"]:
            _state(statement, node, shapes, values)
        outputs = module["signature"]["output_specs"]
        names = [_name(spec["user_output"]["arg"]) for spec in outputs if "user_output" in spec]
        return statement.model(images, names)


def _graph_module(path: Path) -> Mapping[str, Any]:
    try:
        with open_zip(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(_GRAPH)]
            if len(members) != 1:
                raise ArchError(
                    f"{path}: expected one graph of torch.export in it, found {len(members)}; a compiled "
                    "package has none: give the file that it was made of"
                )
            check_member(members[0])
            with archive.open(members[0]) as member:
                content = member.read(_GRAPH_BYTES + 1)
    except FileNotFoundError:
        raise ArchError(f"{path}: no such file, expected a program of torch.export") from None
    except OSError as error:
        raise ArchError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    except DAMAGE as error:
        raise ArchError(f"{path}: not a program of torch.export, or a damaged one") from error
    if len(content) > _GRAPH_BYTES:
        raise ArchError(f"{path}: a graph of more than {_GRAPH_BYTES:,} bytes")
    module: Mapping[str, Any] = parse_json(content.decode(), str(path), ArchError)["graph_module"]
    return module


def _element(tensor: Mapping[str, Any]) -> int:
    """Return the ONNX type of a tensor: all but half precision counts as single."""
    return TensorProto.FLOAT16 if tensor["dtype"] == _HALF else TensorProto.FLOAT


def _name(argument: Mapping[str, Any]) -> str:
    return str(argument["as_tensor"]["name"])


def _value(argument: Mapping[str, Any]) -> Any:
    """Return an argument's value: a tensor's name, a number, a list of them, or None."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind in ("as_tensor", "as_sym_int", "as_sym_float"):
        return value.get("name", value.get("as_int", -1))
    if kind in ("as_tensors", "as_sym_ints"):
        return [each.get("name", each.get("as_int", -1)) for each in value]
    return value


def _state(
    to: Statement,
    node: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Any],
) -> None:
    outputs: list[str] = []
    for output in node["outputs"]:
        tensors = output.get("as_tensors") or [output["as_tensor"]] if _is_tensor(output) else []
        outputs += [tensor["name"] for tensor in tensors]
    if not outputs:  # arithmetic on sizes, and assertions
        return
    arguments = {each["name"]: _value(each["arg"]) for each in node["inputs"]}
    op = str(node["target"]).removeprefix("torch.ops.aten.")
    name = one_line(node.get("name") or outputs[0], 100)
    dtype = np.float16 if values[outputs[0]]["dtype"] == _HALF else np.float32
    call = _Call(op, name, arguments, tuple(outputs), shapes, dtype)
    if op in _OPERATORS:
        _OPERATORS[op](to, call)
        return
    tensors = [each["arg"] for each in node["inputs"] if _is_tensor(each["arg"])]
    read = [name for tensor in tensors for name in _names(_value(tensor))]
    to.add_unknown(op, read, [(output, shapes[output]) for output in outputs], name=name)


def _is_tensor(argument: Mapping[str, Any]) -> bool:
    return "as_tensor" in argument or "as_tensors" in argument


def _names(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


_State = Callable[[Statement, _Call], object]


def _operand(to: Statement, call: _Call, value: Any) -> str:
    """Return the name of a tensor, or of a number as a constant."""
    return value if isinstance(value, str) else to.constant(float(value), dtype=call.dtype)


def _of_one(op: str, **attributes: Any) -> _State:
    """State an operator of one tensor."""
    return lambda to, call: to.add(op, call.x, output=call.outputs[0], name=call.name, **attributes)


def _of_two(op: str) -> _State:
    """State an operator of two tensors, or of a tensor and a number."""

    def state(to: Statement, call: _Call) -> None:
        a, b, *_ = call.arguments.values()
        operands = _operand(to, call, a), _operand(to, call, b)
        if call.get("alpha", 1) != 1:
            operands = operands[0], to.add("Mul", operands[1], _operand(to, call, call.get("alpha")))
        to.add(op, *operands, output=call.outputs[0], name=call.name)

    return state


def _convolution(to: Statement, call: _Call) -> None:
    if call.get("transposed", False):
        raise ValueError("a transposed convolution, which is not supported")
    operands = [call.get(key) for key in ("input", "weight", "bias")]
    padding = call.get("padding", [0, 0])
    is_same = padding == "same"
    if isinstance(padding, str):
        padding = [0, 0]
    to.add(
        *("Conv", *[name for name in operands if name]),
        output=call.outputs[0],
        name=call.name,
        strides=call.get("stride"),
        dilations=call.get("dilation"),
        pads=None if is_same else [*padding, *padding],
        auto_pad="SAME_UPPER" if is_same else None,
        group=call.get("groups", 1),
    )


def _layer_norm(to: Statement, call: _Call) -> None:
    axes = call.get("normalized_shape")
    scale = call.get("weight") or to.weight(to.fresh(), axes)
    operands = [scale, call.get("bias")] if call.get("bias") else [scale]
    to.add("LayerNormalization", call.x, *operands, output=call.outputs[0], name=call.name, axis=-len(axes))


def _batch_norm(to: Statement, call: _Call) -> None:
    size = call.shapes[call.x][1:2]
    given = [call.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    operands = [name or to.weight(to.fresh(), size) for name in given]
    to.add("BatchNormalization", call.x, *operands, output=call.outputs[0], name=call.name)


def _clamp(to: Statement, call: _Call) -> None:
    if call.op.startswith("hardtanh"):
        low, high = call.get("min_val", -1.0), call.get("max_val", 1.0)
    else:
        low, high = call.get("min", -math.inf), call.get("max", math.inf)
    to.clip(call.x, float(low), float(high), output=call.outputs[0], name=call.name, dtype=call.dtype)


def _product(to: Statement, call: _Call) -> None:
    """State a product of matrices, with the addend of addmm or linear."""
    if call.op == "linear.default":
        a, b, addend = call.x, to.add("Transpose", call.get("weight"), perm=[1, 0]), call.get("bias")
    elif call.op == "addmm.default":
        a, b, addend = call.get("mat1"), call.get("mat2"), call.x
    else:
        (a, b), addend = list(call.arguments.values())[:2], None
    if addend is None:
        to.add("MatMul", a, b, output=call.outputs[0], name=call.name)
    else:
        to.add("Add", to.add("MatMul", a, b, name=call.name), addend, output=call.outputs[0])


def _reduction(op: str) -> _State:
    def state(to: Statement, call: _Call) -> None:
        axes, keeps = call.get("dim", []), int(call.get("keepdim", False))
        to.add(op, call.x, to.constant(axes), output=call.outputs[0], name=call.name, keepdims=keeps)

    return state


def _reshape(to: Statement, call: _Call) -> None:
    to.add("Reshape", call.x, to.constant(call.shape, dtype=np.int64), output=call.outputs[0], name=call.name)


def _permute(to: Statement, call: _Call) -> None:
    to.add("Transpose", call.x, output=call.outputs[0], name=call.name, perm=call.get("dims"))


def _exchange(to: Statement, call: _Call) -> None:
    """State a transposition of two dimensions."""
    _, a, b, *_ = call.arguments.values()
    order = list(range(len(call.shape)))
    order[a], order[b] = order[b], order[a]
    to.add("Transpose", call.x, output=call.outputs[0], name=call.name, perm=order)


def _slice(to: Statement, call: _Call) -> None:
    ends = (call.get("start", 0), call.get("end", _END), call.get("dim", 0), call.get("step", 1))
    to.add("Slice", call.x, *(to.constant([end]) for end in ends), output=call.outputs[0], name=call.name)


def _selection(to: Statement, call: _Call) -> None:
    index = to.constant(call.get("index", 0))
    to.add("Gather", call.x, index, output=call.outputs[0], name=call.name, axis=call.get("dim", 0))


def _split(to: Statement, call: _Call) -> None:
    axis = call.get("dim", 0)
    if len(call.outputs) == 1:
        to.add("Identity", call.x, output=call.outputs[0], name=call.name)
        return
    sizes = to.constant([call.shapes[output][axis] for output in call.outputs])
    to.add_all("Split", [call.x, sizes], call.outputs, name=call.name, axis=axis)


def _unbind(to: Statement, call: _Call) -> None:
    axis = call.get("dim", 0)
    parts = [to.fresh() for _ in call.outputs]
    to.add_all("Split", [call.x, to.constant([1] * len(parts))], parts, name=call.name, axis=axis)
    for part, output in zip(parts, call.outputs, strict=True):
        to.add("Squeeze", part, to.constant([axis]), output=output)


def _stack(to: Statement, call: _Call) -> None:
    axis = call.get("dim", 0)
    parts = [to.add("Unsqueeze", tensor, to.constant([axis])) for tensor in call.get("tensors")]
    to.add("Concat", *parts, output=call.outputs[0], name=call.name, axis=axis)


def _roll(to: Statement, call: _Call) -> None:
    """State a roll as exporters write it: along each dimension, two slices that change places."""
    x, dims = call.x, call.get("dims", [])
    for shift, axis in zip(call.get("shifts"), dims, strict=True):
        first, second = [-shift, _END], [0, -shift]
        parts = [to.add("Slice", x, *(to.constant([n]) for n in (*ends, axis))) for ends in (first, second)]
        x = to.add("Concat", *parts, output=call.outputs[0] if axis == dims[-1] else "", axis=axis)


def _sizes(to: Statement, call: _Call) -> str:
    """Return the sizes of the first output as a constant; what is free is the batch, of one image here."""
    return to.constant([max(1, size) for size in call.shape], dtype=np.int64)


def _expansion(to: Statement, call: _Call) -> None:
    to.add("Expand", call.x, _sizes(to, call), output=call.outputs[0], name=call.name)


def _pad(to: Statement, call: _Call) -> None:
    """State a padding: torch lists its sizes from the last dimension on, before and after each."""
    given, rank = call.get("pad"), len(call.shape)
    before, after = given[::2], given[1::2]
    unpadded = [0] * (rank - len(before))
    sizes = to.constant([*unpadded, *reversed(before), *unpadded, *reversed(after)])
    to.add("Pad", call.x, sizes, output=call.outputs[0], name=call.name)


def _resize(to: Statement, call: _Call) -> None:
    to.add("Resize", call.x, "", "", _sizes(to, call), output=call.outputs[0], name=call.name)


def _attention(to: Statement, call: _Call) -> None:
    """State attention as its products, with the scores between them."""
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    order = list(range(len(call.shapes[key])))
    turned = to.add("Transpose", key, perm=[*order[:-2], order[-1], order[-2]])
    scores = to.add("MatMul", query, turned, name=call.name)
    if call.get("attn_mask"):
        scores = to.add("Add", scores, call.get("attn_mask"))
    to.add("MatMul", to.add("Softmax", scores, axis=-1), value, output=call.outputs[0])


def _softmax(op: str) -> _State:
    return lambda to, call: to.add(
        op, call.x, output=call.outputs[0], name=call.name, axis=call.get("dim", -1)
    )


def _einsum(to: Statement, call: _Call) -> None:
    equation = call.get("equation").replace(" ", "")
    to.add("Einsum", *call.get("tensors"), output=call.outputs[0], name=call.name, equation=equation)


def _group_norm(to: Statement, call: _Call) -> None:
    channels = call.shapes[call.x][1:2]
    operands = [call.get(key) or to.weight(to.fresh(), channels) for key in ("weight", "bias")]
    groups = call.get("num_groups", call.get("group", 1))
    to.add("GroupNormalization", call.x, *operands, output=call.outputs[0], name=call.name, num_groups=groups)


def _square(to: Statement, call: _Call) -> None:
    to.add("Mul", call.x, call.x, output=call.outputs[0], name=call.name)


def _made(to: Statement, call: _Call) -> None:
    """State a tensor of which only the size may depend on the image."""
    to.weight(call.outputs[0], call.shape)


def _cast(to: Statement, call: _Call) -> None:
    to.add("Cast", call.x, output=call.outputs[0], name=call.name, to=_element(call.arguments))


def _concatenation(to: Statement, call: _Call) -> None:
    tensors: Sequence[str] = call.get("tensors")
    to.add("Concat", *tensors, output=call.outputs[0], name=call.name, axis=call.get("dim", 0))


def _pool(op: str) -> _State:
    def state(to: Statement, call: _Call) -> None:
        window, padding = call.get("kernel_size"), call.get("padding", [0, 0])
        to.add(
            op,
            call.x,
            output=call.outputs[0],
            name=call.name,
            kernel_shape=window,
            strides=call.get("stride", window),
            pads=[*padding, *padding],
            ceil_mode=int(call.get("ceil_mode", False)),
        )

    return state


def _adaptive_pool(kind: str) -> _State:
    """State a pooling to a size, as one of windows of the same size, over the whole map, or as none."""

    def state(to: Statement, call: _Call) -> None:
        before, after = call.shapes[call.x][2:], call.shape[2:]
        if after == (1, 1):
            to.add(f"Global{kind}", call.x, output=call.outputs[0], name=call.name)
        elif before == after:
            to.add("Identity", call.x, output=call.outputs[0], name=call.name)
        elif all(n % m == 0 for n, m in zip(before, after, strict=True)):
            window = [n // m for n, m in zip(before, after, strict=True)]
            to.add(kind, call.x, output=call.outputs[0], name=call.name, kernel_shape=window, strides=window)
        else:
            raise ValueError("an adaptive pooling whose windows differ in size, which is not supported")

    return state


def _silu(to: Statement, call: _Call) -> None:
    to.add("Mul", call.x, to.add("Sigmoid", call.x), output=call.outputs[0], name=call.name)


def _rsqrt(to: Statement, call: _Call) -> None:
    to.add("Reciprocal", to.add("Sqrt", call.x), output=call.outputs[0], name=call.name)


_VIEWS = (
    *("view", "_unsafe_view", "reshape", "flatten.using_ints", "squeeze.dims", "squeeze.dim", "unsqueeze"),
    *("as_strided", "unflatten.int", "reshape_as", "view_as"),
)
_RESIZES = tuple(
    f"upsample_{kind}2d{form}" for kind in ("nearest", "bilinear", "bicubic") for form in ("", ".vec")
)
_COPIES = (
    "clone",
    "alias",
    "dropout",
    "dropout_",
    "feature_dropout",
    "contiguous",
    "detach",
    "lift_fresh_copy",
)
_NORMS = ("_native_batch_norm_legit_no_training", "batch_norm")


def _overloads(state: _State, *names: str) -> dict[str, _State]:
    return {name if "." in name else f"{name}.default": state for name in names}


# The operators that have a name in ONNX; an overload is `default` where none is named.
_OPERATORS: dict[str, _State] = {
    **_overloads(_convolution, "convolution", "conv2d", "conv2d.padding"),
    **_overloads(_attention, "scaled_dot_product_attention"),
    **_overloads(_einsum, "einsum"),
    **_overloads(_layer_norm, "native_layer_norm", "layer_norm"),
    **_overloads(_batch_norm, *_NORMS),
    **_overloads(_group_norm, "group_norm", "native_group_norm"),
    **_overloads(_clamp, "clamp", "clamp_", "clamp_min", "hardtanh", "hardtanh_"),
    **_overloads(_product, "linear", "addmm", "mm", "bmm", "matmul"),
    **_overloads(_reduction("ReduceMean"), "mean.dim"),
    **_overloads(_reduction("ReduceSum"), "sum.dim_IntList"),
    **_overloads(_reduction("ReduceMax"), "amax"),
    **_overloads(_reduction("ReduceL2"), "linalg_vector_norm"),
    **_overloads(_softmax("Softmax"), "softmax.int", "_softmax"),
    **_overloads(_softmax("LogSoftmax"), "log_softmax.int", "_log_softmax"),
    **_overloads(_reshape, *_VIEWS),
    **_overloads(_expansion, "expand", "expand_as"),
    **_overloads(_of_one("Identity"), *_COPIES),
    **_overloads(_permute, "permute"),
    **_overloads(_exchange, "transpose.int", "swapaxes", "swapdims"),
    **_overloads(_slice, "slice.Tensor"),
    **_overloads(_selection, "select.int"),
    **_overloads(_split, "split.Tensor", "split_with_sizes", "chunk", "split.sizes"),
    **_overloads(_unbind, "unbind.int"),
    **_overloads(_stack, "stack"),
    **_overloads(_roll, "roll"),
    **_overloads(_pad, "pad", "constant_pad_nd", "reflection_pad2d"),
    **_overloads(_resize, *_RESIZES),
    **_overloads(_made, "new_zeros", "new_ones", "zeros_like", "zeros", "ones", "arange", "full", "eye.m"),
    **_overloads(_cast, "_to_copy", "to.dtype"),
    **_overloads(_concatenation, "cat"),
    **_overloads(_pool("AveragePool"), "avg_pool2d"),
    **_overloads(_pool("MaxPool"), "max_pool2d_with_indices", "max_pool2d"),
    **_overloads(_adaptive_pool("AveragePool"), "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    **_overloads(_adaptive_pool("MaxPool"), "adaptive_max_pool2d"),
    **_overloads(_of_one("Relu"), "relu", "relu_"),
    **_overloads(_of_one("HardSwish"), "hardswish", "hardswish_"),
    **_overloads(_of_one("HardSigmoid", alpha=1 / 6, beta=0.5), "hardsigmoid"),
    **_overloads(_silu, "silu", "silu_"),
    **_overloads(_rsqrt, "rsqrt"),
    **_overloads(_square, "square"),
    **_overloads(_of_one("LeakyRelu"), "leaky_relu", "leaky_relu_"),
    **_overloads(_of_one("Gelu"), "gelu_"),
    **_overloads(_of_one("Sigmoid"), "sigmoid_"),
    **_overloads(_of_one("HardSigmoid", alpha=1 / 6, beta=0.5), "hardsigmoid_"),
    **{
        f"{op.lower()}.default": _of_one(op)
        for op in (
            "Gelu",
            "Sigmoid",
            "Tanh",
            "Erf",
            "Exp",
            "Sqrt",
            "Neg",
            "Elu",
            "Mish",
            "Softplus",
            "Abs",
            "Log",
        )
    },
    **_overloads(_of_one("Reciprocal"), "reciprocal"),
    **_overloads(_of_two("Add"), "add.Tensor", "add.Scalar", "add_.Tensor"),
    **_overloads(_of_two("Sub"), "sub.Tensor", "sub.Scalar", "sub_.Tensor"),
    **_overloads(_of_two("Mul"), "mul.Tensor", "mul.Scalar", "mul_.Tensor"),
    **_overloads(_of_two("Div"), "div.Tensor", "div.Scalar", "div_.Tensor"),
    **_overloads(_of_two("Pow"), "pow.Tensor_Scalar", "pow.Tensor_Tensor"),
}
