import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qnas.latency.onnx import values
from qnas.latency.onnx.values import LARGEST_VALUE, Node, evaluate

F = np.array([[0.5, -2.5, 7.25], [1.5, 3.0, -0.125]], np.float32)
I = np.array([[7, -5, 3], [2, 9, -4]])  # noqa: E741  # integers
B = np.array([[True, False, True]])
AXIS = np.array([1])


def whole(*numbers: int) -> Any:
    return np.array(numbers)


def scalar(number: float, kind: Any = np.int64) -> Any:
    return np.array(number, kind)


# operator, attributes, inputs; an opset where an older one is meant
CASES: list[tuple[Any, ...]] = [
    ("Identity", {}, [I]),
    ("Cast", {"to": onnx.TensorProto.INT32}, [F]),
    ("Cast", {"to": onnx.TensorProto.BOOL}, [I]),
    ("CastLike", {}, [I, F]),
    ("Concat", {"axis": 0}, [I, I, I]),
    ("Concat", {"axis": -1}, [I, I]),
    ("Gather", {}, [I, whole(1, 0, 1)]),
    ("Gather", {"axis": 1}, [I, scalar(-1)]),
    ("Slice", {}, [I, whole(0), whole(1)]),
    ("Slice", {}, [I, whole(-1, 0), whole(-10, 2**63 - 1), whole(1, 0), whole(-1, 1)]),
    ("Slice", {"starts": [1], "ends": [2**63 - 1], "axes": [1]}, [I], 9),
    ("Slice", {"starts": [0, 1], "ends": [1, -1]}, [I], 9),
    ("Squeeze", {}, [I[:1], whole(0)]),
    ("Squeeze", {}, [I[:1]]),
    ("Squeeze", {"axes": [0]}, [I[:1]], 11),
    ("Unsqueeze", {}, [I, whole(0, -1)]),
    ("Unsqueeze", {"axes": [1]}, [I], 11),
    ("Reshape", {}, [I, whole(0, -1, 1)]),
    ("Reshape", {"allowzero": 1}, [I[:0], whole(0, 5)]),
    ("Transpose", {}, [I]),
    ("Transpose", {"perm": [1, 0]}, [I]),
    ("Expand", {}, [I[:1], whole(2, 1)]),
    ("Range", {}, [scalar(2), scalar(11), scalar(3)]),
    ("Range", {}, [scalar(4), scalar(-3), scalar(-2)]),
    ("Range", {}, [scalar(0), scalar(-3), scalar(2)]),
    ("Range", {}, [scalar(0.5, np.float32), scalar(3, np.float32), scalar(0.75, np.float32)]),
    ("ConstantOfShape", {}, [whole(2, 3)]),
    ("ConstantOfShape", {"value": numpy_helper.from_array(whole(7))}, [whole(3)]),
    ("ScatterND", {}, [whole(1, 2, 3, 4), np.array([[1], [3]]), whole(8, 9)]),
    ("Where", {}, [B, I, -I]),
    ("Equal", {}, [I, I[0]]),
    ("Less", {}, [I, I[0]]),
    ("LessOrEqual", {}, [I, I[0]]),
    ("Greater", {}, [I, I[0]]),
    ("GreaterOrEqual", {}, [I, I[0]]),
    ("And", {}, [B, ~B]),
    ("Or", {}, [B, B]),
    ("Not", {}, [B]),
    ("Add", {}, [I, I[0]]),
    ("Sub", {}, [F, F[0]]),
    ("Mul", {}, [I, scalar(3)]),
    ("Div", {}, [F, F[0]]),
    ("Div", {}, [np.abs(I), scalar(2)]),
    ("Mod", {}, [I, scalar(4)]),
    ("Mod", {"fmod": 1}, [F, scalar(2, np.float32)]),
    ("Pow", {}, [F, scalar(2, np.float32)]),
    ("Pow", {}, [F, scalar(3)]),
    ("Min", {}, [F, F[0], scalar(1, np.float32)]),
    ("Max", {}, [F, F[0], scalar(1, np.float32)]),
    ("Neg", {}, [I]),
    ("Abs", {}, [I]),
    ("Floor", {}, [F]),
    ("Ceil", {}, [F]),
    ("Round", {}, [F]),
    ("Sqrt", {}, [np.abs(F)]),
    ("Reciprocal", {}, [F]),
    *((f"Reduce{kind}", {}, [I, AXIS]) for kind in ("Sum", "Prod", "Min", "Max")),
    ("ReduceSum", {"keepdims": 0}, [I]),
    ("ReduceSum", {"noop_with_empty_axes": 1}, [I]),
    ("ReduceProd", {"axes": [0], "keepdims": 0}, [I], 13),
    ("ReduceMean", {"keepdims": 1}, [F, AXIS]),
    ("ReduceMean", {"axes": [-1]}, [F], 13),
    ("Exp", {}, [F]),
    ("Erf", {}, [F]),
    ("Tanh", {}, [F]),
    ("Sigmoid", {}, [F]),
    ("HardSigmoid", {}, [F]),
    ("HardSigmoid", {"alpha": 0.5, "beta": 0.25}, [F]),
    ("Clip", {}, [F, scalar(-1, np.float32), scalar(2, np.float32)]),
    ("Clip", {}, [F, None, scalar(2, np.float32)]),
    ("Clip", {"min": 0.0, "max": 6.0}, [F], 6),
    ("Relu", {}, [F]),
]


def made(op: str, attributes: Mapping[str, Any], count: int) -> Node:
    names = tuple(f"i{i}" for i in range(count))
    return Node("n", op, names, ("y",), helper.make_node(op, names, ["y"], **attributes))


def by_onnx(node: Node, inputs: Sequence[Any], opset: int) -> Any:
    """Return what onnx's own evaluator gives."""
    feeds = {name: value for name, value in zip(node.inputs, inputs, strict=True) if value is not None}
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[:] = [name if name in feeds else "" for name in node.inputs]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    graph = helper.make_graph([proto], "g", infos, [helper.make_empty_tensor_value_info("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    (result,) = ReferenceEvaluator(model).run(None, feeds)
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_value_is_what_onnx_computes(case: tuple[Any, ...]) -> None:
    op, attributes, inputs, *opset = case
    node = made(op, attributes, len(inputs))
    expected = by_onnx(node, inputs, (opset or [20])[0])
    found = evaluate(node, inputs)
    assert found is not None
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_operator_that_is_evaluated_is_compared_with_onnx() -> None:
    assert {case[0] for case in CASES} == set(values._APPLY)


def test_integers_are_divided_towards_zero() -> None:
    # as the standard says; onnx's evaluator rounds down
    found = evaluate(made("Div", {}, 2), [np.array([-7, 7]), np.array(2)])
    assert found is not None
    assert found.tolist() == [-3, 3]


@pytest.mark.parametrize(
    "op",
    ["Loop", "If", "Scan", "RegexFullMatch", "StringNormalizer", "TfIdfVectorizer", "my.own.Add", "Tile"],
)
def test_other_operators_are_not_run(op: str) -> None:
    assert evaluate(made(op, {}, 2), [I, I]) is None


@pytest.mark.parametrize(
    ("op", "attributes", "inputs"),
    [
        ("Range", {}, [scalar(0), scalar(10**12), scalar(1)]),
        ("Range", {}, [scalar(0), scalar(5), scalar(0)]),
        ("Range", {}, [scalar(0.0, float), scalar(np.inf, float), scalar(1.0, float)]),
        ("ConstantOfShape", {}, [whole(10**6, 10**6)]),
        ("ConstantOfShape", {}, [whole(-1)]),
        ("Expand", {}, [I, whole(10**12, 1, 1)]),
        ("Gather", {}, [np.zeros((1, 1024)), np.zeros(1024, int)]),
        ("Reshape", {}, [I, whole(7, -1)]),
        ("Concat", {"axis": 0}, [np.zeros(900)] * 50),
        ("Add", {}, [np.zeros((1024, 1)), np.zeros((1, 1024))]),
        ("Add", {}, [np.array(["text"], dtype=object)] * 2),
        ("Mul", {}, [np.array(["text"]), scalar(10**9)]),
        ("Cast", {"to": onnx.TensorProto.STRING}, [I]),
        ("Cast", {"to": 99}, [I]),
        ("Cast", {"to": onnx.TensorProto.FLOAT}, [np.array(["9" * 100])]),
        ("Slice", {}, [I, whole(0), whole(1), whole(5)]),
        ("Slice", {}, [I, whole(0), whole(1), whole(0), whole(0)]),
        ("Squeeze", {}, [I, whole(0)]),
        ("Transpose", {"perm": [0]}, [I]),
        ("Add", {}, [I]),
        ("Pow", {}, [I, scalar(-1)]),
    ],
)
def test_what_is_large_or_does_not_fit_is_unknown(
    op: str, attributes: dict[str, Any], inputs: list[Any]
) -> None:
    assert evaluate(made(op, attributes, len(inputs)), inputs) is None


def test_values_have_a_largest_size() -> None:
    full = np.zeros(LARGEST_VALUE)
    assert evaluate(made("Neg", {}, 1), [full]) is not None
    assert evaluate(made("Neg", {}, 1), [np.zeros(LARGEST_VALUE + 1)]) is None


def test_the_evaluator_of_onnx_is_not_used() -> None:
    assert "reference" not in inspect.getsource(values)
