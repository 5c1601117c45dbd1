from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from torch import nn

from qnas.deploy.assembly import assemble, export_block
from qnas.deploy.export.tracing import INPUT, trace_onnx
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch
from qnas.spaces.lower import lower
from qnas.spaces.space import parse_space

SPACE = """
schema: qnas.space/1
name: two
source: made for tests
input: {{channels: 3, resolution_px: 16}}
norm: {norm}
activation: gelu
stem: {{channels: 8, kernel: 2, stride: 2}}
transition: conv
candidates: [{{block: quadra, kernel: 3, expansion: 2}}, {{block: identity}}]
stages:
  - {{channels: 8, positions: 1, stride: 1}}
  - {{channels: 16, positions: 2, stride: 2}}
head: {{classes: 10}}
"""
BLOCK, NONE = "quadra_k3_e2", "identity"


def operators(model: onnx.ModelProto) -> list[tuple[str, list[tuple[str, Any]], list[str]]]:
    """Return each node with its attributes and, of its inputs, which are weights."""
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return [
        (
            node.op_type,
            sorted((a.name, str(onnx.helper.get_attribute_value(a))) for a in node.attribute),
            [str(weights.get(name, "map")) for name in node.input],
        )
        for node in model.graph.node
    ]


# in the second network two norms meet, whose transpositions the exporter removes
@pytest.mark.parametrize(
    ("norm", "networks"),
    [
        ("layernorm", [(BLOCK, BLOCK, BLOCK), (NONE, BLOCK, NONE)]),
        ("batchnorm", [(BLOCK, BLOCK, BLOCK)]),
    ],
    ids=["layernorm", "batchnorm"],
)
def test_an_assembled_network_has_the_operators_of_the_exported_one(
    norm: str, networks: list[tuple[str, ...]]
) -> None:
    space = parse_space(SPACE.format(norm=norm), "two.yaml")
    graphs = {}
    for choices in networks:
        blocks = lower(space, Arch(choices))
        for block in blocks:
            if block.layers and block.unnamed not in graphs:
                graphs[block.unnamed] = export_block(block)
        model = assemble(blocks, graphs, np.random.default_rng(0))
        onnx.checker.check_model(model, full_check=True)
        network = build_subnet(space, Arch(choices), 10).eval()
        for module in network.modules():  # a mean of zero, which training leaves, is folded otherwise
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.fill_(0.1)
        assert operators(model) == operators(trace_onnx(network, (3, 16, 16), "two"))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == [1, 3, 16, 16]
        (logits,) = session.run(None, {INPUT: np.ones((1, 3, 16, 16), np.float32)})
        assert logits.shape == (1, 10)
        assert np.isfinite(logits).all()
        # equal blocks have weights of their own, and none that a runtime could leave out
        weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
        assert len({w.tobytes() for w in weights if w.size > 1}) == sum(w.size > 1 for w in weights)
        assert not any(np.ptp(w) == 0 for w in weights if w.size > 1)


def test_a_block_is_exported_with_the_same_weights_each_time() -> None:
    block = lower(parse_space(SPACE.format(norm="batchnorm"), "two.yaml"), Arch((BLOCK,) * 3))[1]
    assert export_block(block).SerializeToString() == export_block(block).SerializeToString()
