"""ONNX networks assembled from blocks that are exported once each.

Exporting a network takes torch seconds, and a space has far fewer distinct blocks than networks. So each
block goes through the exporter once, and a network is the chain of its blocks' graphs. The operators are
those that `trace_onnx` writes for the whole network (tests/deploy/test_assembly.py), since the exporter's
last pass, which removes operators of adjacent blocks that cancel out, runs on the assembled network too.

The files are for timing only. All their weights are random and differ, those of norms included: a runtime
that drops scales of one and shifts of zero, or stores equal weights once, would be faster than with a
trained network.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxscript.optimizer import optimize
from torch import nn

from qnas.deploy.export.lean import cancel_transpositions
from qnas.deploy.export.opset import TRACED_OPSET
from qnas.deploy.export.tracing import INPUT, OUTPUT, trace_onnx
from qnas.nn.blocks import build_block
from qnas.spaces.lower import BlockSpec

_JITTER = 0.1  # standard deviation of norms and biases around 1 and 0


def export_block(block: BlockSpec) -> onnx.ModelProto:
    """Return a block's graph, `images` (batch, c_in, px, px) -> `logits`, with random weights.

    Raises ExportError if torch cannot export it.
    """
    first = block.layers[0]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # `assemble` draws new weights with the deviations of these
        module = build_block(block).eval()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                # with a mean of zero, the exporter would fold it into a convolution without a bias
                assert norm.running_mean is not None
                norm.running_mean.normal_(0.0, _JITTER)
    shape = (first.c_in, first.resolution_px, first.resolution_px)
    return trace_onnx(module, shape, f"block {block.name}")


def assemble(
    blocks: Iterable[BlockSpec], graphs: Mapping[BlockSpec, onnx.ModelProto], rng: np.random.Generator
) -> onnx.ModelProto:
    """Return the network of these blocks, `images` (1, channels, H, W) -> `logits` (1, classes).

    `graphs` has the graph of every block (`export_block`) by `BlockSpec.unnamed`. All weights are drawn anew.
    """
    run = [block for block in blocks if block.layers]
    first, last = run[0].layers[0], run[-1].layers[-1]
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    passed = INPUT
    for block in run:
        graph = graphs[block.unnamed].graph
        at_end = OUTPUT if block is run[-1] else f"{block.name}/out"
        names = {"": "", graph.input[0].name: passed, graph.output[0].name: at_end}
        for template in graph.initializer:
            names[template.name] = f"{block.name}/{template.name}"
            weights.append(_drawn(template, names[template.name], rng))
        for original in graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            node.name = f"{block.name}/{original.name}"
            del node.input[:], node.output[:]
            node.input.extend(names.setdefault(name, f"{block.name}/{name}") for name in original.input)
            node.output.extend(names.setdefault(name, f"{block.name}/{name}") for name in original.output)
            nodes.append(node)
        passed = at_end
    float32 = onnx.TensorProto.FLOAT
    px = first.resolution_px
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [onnx.helper.make_tensor_value_info(INPUT, float32, (1, first.c_in, px, px))],
        [onnx.helper.make_tensor_value_info(OUTPUT, float32, (1, last.c_out))],
        weights,
    )
    of_blocks = graphs[run[0].unnamed]
    assert [entry.version for entry in of_blocks.opset_import if entry.domain == ""] == [TRACED_OPSET]
    model = onnx.helper.make_model(
        graph, opset_imports=of_blocks.opset_import, ir_version=of_blocks.ir_version, producer_name="qnas"
    )
    return cancel_transpositions(optimize(model))


def _drawn(template: onnx.TensorProto, name: str, rng: np.random.Generator) -> onnx.TensorProto:
    """Return a tensor as random as the template; constants that are no weights (bounds, axes) stay."""
    values = numpy_helper.to_array(template)
    if values.dtype == np.float32 and values.size > 1:
        noise = rng.standard_normal(values.shape, dtype=np.float32)
        drawn = values + _JITTER * noise if values.ndim == 1 else np.std(values, dtype=np.float32) * noise
        values = drawn.astype(np.float32)
    return numpy_helper.from_array(values, name)
