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
    to.add(
        *("Conv", *[name for name in operands if name]),
        output=call.outputs[0],
        name=call.name,
        strides=call.get("stride"),
        dilations=call.get("dilation"),
        pads=[*padding, *padding],
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
    to.add("Reshape", call.x, to.constant(call.shape), output=call.outputs[0], name=call.name)


def _permute(to: Statement, call: _Call) -> None:
    to.add("Transpose", call.x, output=call.outputs[0], name=call.name, perm=call.get("dims"))


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


def _adaptive_pool(to: Statement, call: _Call) -> None:
    if call.shape[2:] != (1, 1):
        raise ValueError("an adaptive pooling to more than one pixel, which is not supported")
    to.add("GlobalAveragePool", call.x, output=call.outputs[0], name=call.name)


def _silu(to: Statement, call: _Call) -> None:
    to.add("Mul", call.x, to.add("Sigmoid", call.x), output=call.outputs[0], name=call.name)


def _rsqrt(to: Statement, call: _Call) -> None:
    to.add("Reciprocal", to.add("Sqrt", call.x), output=call.outputs[0], name=call.name)


_VIEWS = (
    *("view", "_unsafe_view", "reshape", "flatten.using_ints", "squeeze.dims", "squeeze.dim", "unsqueeze"),
    "as_strided",
)
_COPIES = ("clone", "alias", "dropout", "dropout_", "contiguous", "detach", "lift_fresh_copy")
_NORMS = ("_native_batch_norm_legit_no_training", "batch_norm")


def _overloads(state: _State, *names: str) -> dict[str, _State]:
    return {name if "." in name else f"{name}.default": state for name in names}


# The operators that have a name in ONNX; an overload is `default` where none is named.
_OPERATORS: dict[str, _State] = {
    **_overloads(_convolution, "convolution", "conv2d"),
    **_overloads(_layer_norm, "native_layer_norm", "layer_norm"),
    **_overloads(_batch_norm, *_NORMS),
    **_overloads(_clamp, "clamp", "hardtanh", "hardtanh_"),
    **_overloads(_product, "linear", "addmm", "mm", "bmm", "matmul"),
    **_overloads(_reduction("ReduceMean"), "mean.dim"),
    **_overloads(_reduction("ReduceSum"), "sum.dim_IntList"),
    **_overloads(_reshape, *_VIEWS),
    **_overloads(_of_one("Identity"), *_COPIES),
    **_overloads(_permute, "permute"),
    **_overloads(_cast, "_to_copy", "to.dtype"),
    **_overloads(_concatenation, "cat"),
    **_overloads(_pool("AveragePool"), "avg_pool2d"),
    **_overloads(_pool("MaxPool"), "max_pool2d_with_indices", "max_pool2d"),
    **_overloads(_adaptive_pool, "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    **_overloads(_of_one("Relu"), "relu", "relu_"),
    **_overloads(_of_one("HardSwish"), "hardswish", "hardswish_"),
    **_overloads(_of_one("HardSigmoid", alpha=1 / 6, beta=0.5), "hardsigmoid"),
    **_overloads(_silu, "silu", "silu_"),
    **_overloads(_rsqrt, "rsqrt"),
    **{
        f"{op.lower()}.default": _of_one(op)
        for op in ("Gelu", "Sigmoid", "Tanh", "Erf", "Exp", "Sqrt", "Neg")
    },
    **_overloads(_of_one("Reciprocal"), "reciprocal"),
    **_overloads(_of_two("Add"), "add.Tensor", "add.Scalar", "add_.Tensor"),
    **_overloads(_of_two("Sub"), "sub.Tensor", "sub.Scalar"),
    **_overloads(_of_two("Mul"), "mul.Tensor", "mul.Scalar"),
    **_overloads(_of_two("Div"), "div.Tensor", "div.Scalar"),
    **_overloads(_of_two("Pow"), "pow.Tensor_Scalar", "pow.Tensor_Tensor"),
}
