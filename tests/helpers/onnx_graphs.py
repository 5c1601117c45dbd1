"""Small ONNX graphs of many operators, and mutants of them."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from helpers.mutants import byte_mutants
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node


def ones(name: str, *shape: int, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype), name)


def whole(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def number(name: str, value: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.float32), name)


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto] = (),
    *,
    shape: Sequence[int | str | None] = (1, 4, 8, 8),
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 23,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Return a model from the input `x` to `y`."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def convolutions() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["a", "s", "s", "s", "s"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "d"], ["e"], group=8, pads=[1, 1, 1, 1]),
        node("ConvTranspose", ["e", "t"], ["f"], strides=[2, 2]),
        node("MaxPool", ["f"], ["g"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Concat", ["g", "c"], ["h"], axis=1),
        node("Transpose", ["h"], ["i"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["i", "n", "n"], ["j"], axis=-1),
        node("Transpose", ["j"], ["k"], perm=[0, 3, 1, 2]),
        node("GlobalAveragePool", ["k"], ["l"]),
        node("Flatten", ["l"], ["m"]),
        node("Gemm", ["m", "v", "o"], ["y"], transB=1),
    ]
    weights = [ones("w", 8, 4, 3, 3), ones("s", 8), ones("d", 8, 1, 3, 3), ones("t", 8, 4, 2, 2)]
    return graph_model(nodes, [*weights, ones("n", 12), ones("v", 10, 12), ones("o", 10)])


def shape_arithmetic() -> onnx.ModelProto:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "two"], ["h"]),
        node("Constant", [], ["c"], value=whole("", 2)),
        node("Div", ["h", "c"], ["half"]),
        node("Slice", ["s", "zero", "one"], ["n"]),
        node("Concat", ["n", "four", "half", "c", "minus"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["a"]),
        node("Split", ["a"], ["p", "q"], axis=1, num_outputs=2),
        node("Range", ["i0", "i4", "i1"], ["r"]),
        node("ConstantOfShape", ["four"], ["z"], value=whole("", 1)),
        node("Expand", ["z", "four"], ["u"]),
        node("Add", ["p", "q"], ["b"]),
        node("Squeeze", ["b", "zero"], ["d"]),
        node("Unsqueeze", ["d", "zero"], ["e"]),
        node("Cast", ["e"], ["f"], to=TensorProto.FLOAT16),
        node("Slice", ["f", "zero", "one", "one"], ["y"]),
    ]
    scalars = [numpy_helper.from_array(np.array(n), f"i{n}") for n in (0, 1, 4)]
    weights = [whole("zero", 0), whole("one", 1), whole("two", 2), whole("four", 4), whole("minus", -1)]
    return graph_model(nodes, [*weights, *scalars])


def activations() -> onnx.ModelProto:
    nodes = [
        node("Div", ["x", "r"], ["a"]),
        node("Erf", ["a"], ["b"]),
        node("Add", ["b", "one"], ["c"]),
        node("Mul", ["x", "c"], ["d"]),
        node("Mul", ["d", "half"], ["e"]),
        node("ReduceMean", ["e", "axis"], ["m"]),
        node("Sub", ["e", "m"], ["f"]),
        node("Pow", ["f", "two"], ["g"]),
        node("ReduceMean", ["g", "axis"], ["h"]),
        node("Add", ["h", "eps"], ["i"]),
        node("Sqrt", ["i"], ["j"]),
        node("Div", ["f", "j"], ["k"]),
        node("Clip", ["k", "zero", "six"], ["l"]),
        node("Sigmoid", ["l"], ["n"]),
        node("Mul", ["l", "n"], ["o"]),
        node("Softmax", ["o"], ["y"], axis=1),
    ]
    values = {"r": 2**0.5, "one": 1, "half": 0.5, "two": 2, "eps": 1e-6, "zero": 0, "six": 6}
    return graph_model(nodes, [*(number(n, v) for n, v in values.items()), whole("axis", 1)])


def functions() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    leak = node("LeakyRelu", ["a"], ["b"])
    kind = onnx.AttributeProto.FLOAT
    leak.attribute.append(onnx.AttributeProto(name="alpha", type=kind, ref_attr_name="al"))
    body = [leak, node("Neg", ["b"], ["c"])]
    inner = helper.make_function("own", "In", ["a"], ["c"], body, imports, ["al"])
    calls = [node("In", ["a"], ["b"], domain="own", al=0.1), node("In", ["b"], ["c"], domain="own", al=0.2)]
    outer = helper.make_function("own", "Out", ["a"], ["c"], calls, imports)
    nodes = [node("Out", ["x"], ["a"], domain="own"), node("In", ["a"], ["y"], domain="own", al=0.3)]
    return graph_model(nodes, functions=[inner, outer], domains=["own"])


def own_function(name: str, *calls: str) -> onnx.FunctionProto:
    """Return a function that calls functions, or Relu, one after the other."""
    body = [
        node(call, [f"v{i}"], [f"v{i + 1}"], domain="" if call == "Relu" else "own")
        for i, call in enumerate(calls)
    ]
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["v0"], [f"v{len(calls)}"], body, imports)


def calling(name: str, *made: onnx.FunctionProto) -> onnx.ModelProto:
    """Return a model of one call of a function."""
    return graph_model([node(name, ["x"], ["y"], domain="own")], functions=made, domains=["own"], opset=20)


def nested_functions(depth: int) -> onnx.ModelProto:
    """Return a model of 10 ** depth nodes, in functions that call one another."""
    bodies = [["Relu"] * 10, *([f"f{i}"] * 10 for i in range(1, depth))]
    functions = [own_function(f"f{i}", *body) for i, body in enumerate(bodies, 1)]
    return calling(f"f{depth}", *functions)


def quantised() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["a"]),
        node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        node("Conv", ["b", "v"], ["c"]),
        node("QuantizeLinear", ["c", "s", "z"], ["d"]),
        node("QLinearConv", ["d", "s", "z", "w8", "s", "z", "s", "z"], ["e"]),
        node("ConvInteger", ["e", "w8"], ["f"]),
        node("Cast", ["f"], ["g"], to=TensorProto.FLOAT),
        node("Reshape", ["g", "row"], ["h"]),
        node("DynamicQuantizeLinear", ["h"], ["i", "i_s", "i_z"]),
        node("MatMulInteger", ["i", "m"], ["j"]),
        node("Cast", ["j"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = [number("s", 0.1), numpy_helper.from_array(np.array(0, np.uint8), "z"), whole("row", 1, -1)]
    w, w8, m = ((8, 4, 1, 1), (8, 8, 3, 3), (8 * 4 * 4, 16))
    return graph_model(
        nodes,
        [*weights, *(ones(n, *s, dtype=np.uint8) for n, s in (("w", w), ("w8", w8), ("m", m)))],
    )


def products() -> onnx.ModelProto:
    nodes = [
        node("Reshape", ["x", "rows"], ["a"]),
        node("Einsum", ["a", "w"], ["b"], equation="bld,de->ble"),
        node("LSTM", ["b", "wl", "rl"], ["c", "", "c_c"], hidden_size=4),
        node("Squeeze", ["c", "one"], ["d"]),
        node("GRU", ["d", "wg", "rg"], ["", "e"], hidden_size=4),
        node("Attention", ["a", "a", "a"], ["f"], q_num_heads=2, kv_num_heads=2),
        node("MatMul", ["f", "w"], ["g"]),
        node("DeformConv", ["x", "k", "off"], ["h"], kernel_shape=[1, 1]),
        node("Reshape", ["h", "rows"], ["i"]),
        node("Add", ["g", "i"], ["l"]),
        node("ReduceMax", ["e"], ["o"], keepdims=0),
        node("Mul", ["l", "o"], ["p"]),
        node("Einsum", ["p", "p"], ["y"], equation="...ij,...kj->...ik"),
    ]
    weights = [whole("rows", 1, 64, 4), whole("one", 1), ones("w", 4, 4), ones("k", 4, 4, 1, 1)]
    recurrent = [ones("wl", 1, 16, 4), ones("rl", 1, 16, 4), ones("wg", 1, 12, 4), ones("rg", 1, 12, 4)]
    model = graph_model(nodes, [*weights, *recurrent, ones("off", 1, 2, 8, 8)])
    return model


SAMPLES: dict[str, Callable[[], onnx.ModelProto]] = {
    made.__name__: made
    for made in (convolutions, shape_arithmetic, activations, functions, quantised, products)
}

_NUMBERS = (0, -1, 1, 2, 3, 5, 7, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))
_TEXTS = (
    *("", "x", "y", "a", "Relu", "Conv", "Loop", "RegexFullMatch", "Einsum", "GatherND", "Attention", "LSTM"),
    *(
        "i,j->ij",
        "......->...",
        "...",
        "\x1b[31m",
        "\u2028",
        "n" * 9000,
        "com.microsoft",
        "SAME_UPPER",
        "../../etc/passwd",
    ),
)


_KINDS = {
    FieldDescriptor.TYPE_STRING: str,
    FieldDescriptor.TYPE_BYTES: bytes,
    FieldDescriptor.TYPE_FLOAT: float,
    FieldDescriptor.TYPE_DOUBLE: float,
}
_BOUNDS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def _messages(model: Any) -> Iterator[Any]:
    open_ = [model]
    while open_:
        message = open_.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                repeated = not hasattr(value, "ListFields")
                open_ += list(value) if repeated else [value]


def _value(kind: Any, field: Any, rng: Random, texts: Sequence[str]) -> Any:
    if field.enum_type is not None:
        return rng.choice([value.number for value in field.enum_type.values])
    if kind is str:
        return rng.choice(texts)
    if kind is bytes:
        return rng.choice(texts).encode() if rng.random() < 0.7 else b"\xff" * rng.choice((1, 9, 70))
    if kind is float:
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.randint(-3, 40)
    least, most = _BOUNDS.get(field.type, (-(2**63), 2**63 - 1))
    return max(least, min(most, number))


def _change(model: onnx.ModelProto, rng: Random) -> None:
    messages = list(_messages(model))
    texts = [*_TEXTS, *(m.name for m in messages if hasattr(m, "name"))]
    message = rng.choice(messages)
    field = rng.choice(list(message.DESCRIPTOR.fields) if rng.random() < 0.3 else _set_fields(message))
    held = getattr(message, field.name)
    if field.message_type is not None:
        if not hasattr(held, "append") and not hasattr(held, "add"):
            message.ClearField(field.name) if rng.random() < 0.5 else held.SetInParent()
            return
        # copies, since a message must not be copied into its own parts
        others = [m.SerializeToString() for m in messages if m.DESCRIPTOR is field.message_type]
        parts = [part.SerializeToString() for part in held]
        match rng.randrange(4):
            case 0 if parts:
                del parts[rng.randrange(len(parts))]
            case 1 if others:
                parts.append(rng.choice(others))
            case 2 if others and parts:
                parts[rng.randrange(len(parts))] = rng.choice(others)
            case _:
                rng.shuffle(parts)
        message.ClearField(field.name)
        for part in parts:
            getattr(message, field.name).add().ParseFromString(part)
        return
    value = _value(_KINDS.get(field.type, int), field, rng, texts)
    if not hasattr(held, "append"):
        message.ClearField(field.name) if rng.random() < 0.2 else setattr(message, field.name, value)
    elif held and rng.random() < 0.7:
        held[rng.randrange(len(held))] = value
    elif held and rng.random() < 0.5:
        del held[rng.randrange(len(held))]
    else:
        held.append(value)


def _set_fields(message: Any) -> list[Any]:
    return [field for field, _ in message.ListFields()] or list(message.DESCRIPTOR.fields)


def model_mutants(model: onnx.ModelProto, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of an ONNX file: half with fields, names, numbers and nodes changed, half with bytes."""
    rng = Random(seed)
    for _ in range(count - count // 2):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _change(changed, rng)
        yield changed.SerializeToString()
    yield from byte_mutants(model.SerializeToString(), count // 2, seed=seed)


def mutated_models(model: onnx.ModelProto) -> st.SearchStrategy[bytes]:
    """Draw mutants of an ONNX file for hypothesis."""
    return st.integers(0, 2**32).map(lambda seed: next(model_mutants(model, 1 + seed % 2, seed=seed)))
