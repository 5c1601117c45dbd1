"""What a graph does not need is not in it, and the rest computes the same."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.onnx_graphs import graph_model, node
from helpers.tiny import TINY_SPACE
from onnx.reference import ReferenceEvaluator

from qnas.deploy.export.lean import cancel_transpositions
from qnas.deploy.export.lowering import OPERATORS
from qnas.deploy.export.onnx_format import load
from qnas.deploy.export.tracing import trace_onnx
from qnas.nn.blocks import ChannelLayerNorm
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch
from qnas.spaces.space import parse_space

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def transpositions_in_a_row(model: onnx.ModelProto) -> list[str]:
    moved = {n.output[0] for n in model.graph.node if n.op_type == "Transpose"}
    return [n.name for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in moved]


# empty stages, so that norms stand in a row
@pytest.mark.parametrize(
    "choices",
    [("identity",) * 4, ("quadra_k3_e2", "identity", "identity", "identity")],
    ids=["no block", "one block"],
)
def test_no_two_transpositions_stand_in_a_row(choices: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_subnet(parse_space(TINY_SPACE, "tiny.yaml"), Arch(choices), 10).eval()
    norms = [module for module in network.modules() if isinstance(module, ChannelLayerNorm)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    model = trace_onnx(network, (3, 32, 32), "network", forms=OPERATORS)
    assert transpositions_in_a_row(model) == []
    onnx.save(model, tmp_path / "lean.onnx")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
    assert torch.allclose(load(tmp_path / "lean.onnx")(images), expected, atol=1e-5)


def lean(*nodes: onnx.NodeProto) -> list[str]:
    """Return the operators that are left, after a check that they compute the same."""
    model = graph_model(nodes, shape=(1, 2, 3, 4), opset=20)
    before, changed = model.SerializeToString(), cancel_transpositions(model)
    assert model.SerializeToString() == before
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)
    (expected,), (found,) = (ReferenceEvaluator(each).run(None, {"x": x}) for each in (model, changed))
    assert np.array_equal(expected, found)
    return [each.op_type for each in changed.graph.node]


def move(x: str, y: str, order: list[int]) -> onnx.NodeProto:
    return node("Transpose", [x], [y], perm=order)


def test_a_pair_that_cancels_is_removed() -> None:
    assert lean(move("x", "a", LAST), move("a", "b", FIRST), node("Relu", ["b"], ["y"])) == ["Relu"]


def test_the_first_of_a_pair_stays_for_other_readers() -> None:
    pair = move("x", "a", LAST), move("a", "b", FIRST)
    both = node("Relu", ["a"], ["c"]), move("c", "d", FIRST), node("Add", ["b", "d"], ["y"])
    assert lean(*pair, *both) == ["Transpose", "Relu", "Transpose", "Add"]


def test_pairs_inside_pairs_are_removed() -> None:
    moves = move("x", "a", LAST), move("a", "b", FIRST), move("b", "c", LAST), move("c", "d", FIRST)
    assert lean(*moves, node("Relu", ["d"], ["y"])) == ["Relu"]


def test_a_pair_that_moves_data_stays() -> None:
    assert lean(move("x", "a", LAST), move("a", "b", LAST), node("Relu", ["b"], ["y"])) == [
        *("Transpose", "Transpose", "Relu"),
    ]


def test_an_output_keeps_its_name() -> None:
    assert lean(move("x", "a", LAST), move("a", "y", FIRST)) == ["Transpose", "Transpose"]
