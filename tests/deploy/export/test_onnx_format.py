from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers.exported import digits, trained
from onnx import numpy_helper

from qnas.common.errors import ExportError
from qnas.deploy.export import onnx_format
from qnas.deploy.export.onnx_format import QUANTISED, quantise
from qnas.deploy.export.product import RealImages, Variant
from qnas.deploy.export.tracing import check_form


@pytest.fixture(scope="module")
def graphs() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The same network in float32 and in int8."""
    product = trained()
    floats, int8 = (onnx_format.graph_of(product, Variant(p), "file") for p in ("fp32", "int8"))
    return floats, int8


def test_convolutions_and_linear_layers_read_int8_and_all_else_stays(
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
) -> None:
    before, after = graphs
    check_form(after, "file")
    made_by = {output: node.op_type for node in after.graph.node for output in node.output}
    for node in after.graph.node:
        if node.op_type in QUANTISED:
            assert all(made_by[name] == "DequantizeLinear" for name in node.input if name), node.name
    kinds = ("QuantizeLinear", "DequantizeLinear")
    assert sorted(n.op_type for n in after.graph.node if n.op_type not in kinds) == sorted(
        n.op_type for n in before.graph.node
    )


def test_weights_are_signed_with_a_scale_for_each_channel_and_as_near_as_a_step(
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
) -> None:
    before, after = ({t.name: numpy_helper.to_array(t) for t in g.graph.initializer} for g in graphs)
    found = 0
    for node in graphs[1].graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0].removesuffix("_quantized") not in before:
            continue
        weight = before[node.input[0].removesuffix("_quantized")]
        if weight.ndim != 4:
            continue
        found += 1
        quantised, scale = after[node.input[0]], after[node.input[1]]
        assert quantised.dtype == np.int8
        assert scale.shape == (weight.shape[0],)
        back = quantised.astype(np.float64) * scale[:, None, None, None]
        assert np.abs(back - weight).max() <= 0.51 * scale.max()
    assert found == sum(node.op_type == "Conv" for node in graphs[1].graph.node)


def test_ranges_are_those_that_the_calibration_images_reach() -> None:
    def input_scale(images: RealImages) -> float:
        model = quantise(onnx_format.graph_of(trained(), Variant(), "file"), images, "file")
        (first,) = [node for node in model.graph.node if node.input and node.input[0] == "images"]
        scales = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        return float(scales[first.input[1]])

    images = digits(64, "train")
    for given in (images, replace(images, std=tuple(2 * s for s in images.std))):
        pixels = given.take(range(64))
        # the range holds zero
        reach = max(0.0, float(pixels.max())) - min(0.0, float(pixels.min()))
        assert input_scale(given) == pytest.approx(reach / 255, rel=1e-4)


def test_what_cannot_be_quantised_is_refused_in_one_line() -> None:
    graph = onnx_format.graph_of(trained(), Variant(), "file")
    graph.graph.input[0].name = "photographs"
    with pytest.raises(ExportError, match="file: onnxruntime cannot quantise this network: ") as error:
        quantise(graph, digits(8), "file")
    assert "\n" not in str(error.value)
