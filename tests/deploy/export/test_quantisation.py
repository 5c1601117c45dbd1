import copy
import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.exported import digits, every_candidate, neural_space, trained, wired_space
from onnx import numpy_helper
from onnxruntime import quantization as ort
from torch import nn

from qnas.common.errors import ExportError
from qnas.deploy.export import onnx_format, quantisation
from qnas.deploy.export.formats import export_files
from qnas.deploy.export.lowering import ARITHMETIC, OPERATORS
from qnas.deploy.export.onnx_runtime import running
from qnas.deploy.export.parity import TOLERANCES, Tolerance
from qnas.deploy.export.product import Product, RealImages, Variant
from qnas.deploy.export.quantisation import METADATA, QUANTISED, Quantised, precision_facts, quantise
from qnas.deploy.export.tracing import check_form, trace_onnx
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import sample_arch
from qnas.spaces.space import load_space
from qnas.training.scoring import recalibrate

INT8 = Variant("int8")
QDQ = ("QuantizeLinear", "DequantizeLinear")
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


@cache
def floats(norm: str = "layernorm", opset: int | None = None) -> onnx.ModelProto:
    """Return the graph of the trained network in float32: not to be changed."""
    return onnx_format.graph_of(trained(norm), Variant(opset=opset), "file")


@cache
def int8(norm: str = "layernorm", symmetric: bool = False) -> onnx.ModelProto:
    """Return the same in int8: not to be changed."""
    model: onnx.ModelProto = quantise(
        floats(norm), digits(128, "train"), replace(INT8, symmetric=symmetric), "file"
    ).model
    return model


def makers(graph: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.graph.node for output in node.output}


def constants(graph: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def layer_of(node: onnx.NodeProto) -> str:
    """Return the name of a layer, in float or in int8."""
    name = str(node.input[1].removesuffix("_DequantizeLinear_Output"))
    return name.removesuffix(".weight")


def in_int8(graph: onnx.ModelProto) -> set[str]:
    """Return the names of the layers that read their weights in int8."""
    made_by = makers(graph)
    return {
        layer_of(node)
        for node in graph.graph.node
        if node.op_type in QUANTISED and made_by.get(node.input[1], node).op_type == "DequantizeLinear"
    }


def difference(graph: onnx.ModelProto, product: Product) -> float:
    """Return the largest difference from the network's logits, as a share of the largest."""
    images = digits(200).take(range(200))
    with torch.no_grad():
        expected = product.network(images)
    return float((running(graph.SerializeToString())(images) - expected).abs().max() / expected.abs().max())


def test_convolutions_and_linear_layers_read_int8_and_all_else_stays() -> None:
    before, after = floats(), int8()
    check_form(after, "file")
    made_by = makers(after)
    for node in after.graph.node:
        if node.op_type in QUANTISED:
            assert all(made_by[name].op_type == "DequantizeLinear" for name in node.input if name), node.name
    assert sorted(n.op_type for n in after.graph.node if n.op_type not in QDQ) == sorted(
        n.op_type for n in before.graph.node
    )


def test_weights_are_signed_with_a_scale_for_each_channel_and_as_near_as_a_step() -> None:
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in g.graph.initializer} for g in (floats(), int8())
    )
    found = 0
    for node in int8().graph.node:
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
    assert found == sum(node.op_type == "Conv" for node in int8().graph.node)


def input_scale(images: RealImages, variant: Variant) -> float:
    model = quantise(floats(), images, variant, "file").model
    (first,) = [node for node in model.graph.node if node.input and node.input[0] == "images"]
    return float(constants(model)[first.input[1]])


def test_ranges_are_those_that_the_calibration_images_reach() -> None:
    images = digits(64, "train")
    for given in (images, replace(images, std=tuple(2 * s for s in images.std))):
        pixels = given.take(range(64))
        # the range holds zero
        reach = max(0.0, float(pixels.max())) - min(0.0, float(pixels.min()))
        assert input_scale(given, replace(INT8, max_drop=1.0)) == pytest.approx(reach / 255, rel=1e-4)


def test_a_percentile_leaves_out_single_values_and_entropy_more() -> None:
    images = digits(400, "train")
    pixels = images.pixels // 2
    pixels[0, 0, 0, 0] = 255  # the only bright one of 77,000
    given = replace(images, pixels=pixels)
    scales = [
        input_scale(given, replace(INT8, ranges=ranges, max_drop=1.0))
        for ranges in ("minmax", "percentile", "entropy")
    ]
    assert scales[1] < 0.8 * scales[0]
    assert scales[2] < scales[0]


def test_batches_of_calibration_images_are_small_where_the_images_are_large() -> None:
    images = digits(70, "train")
    sizes = [len(batch) for batch in quantisation._batches(images, 70)]
    assert sizes == [32, 32, 6]
    assert [len(batch) for batch in quantisation._batches(images.at(224), 5)] == [2, 2, 1]
    assert [len(batch) for batch in quantisation._batches(images.at(512), 2)] == [1, 1]


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_symmetric_zero_points_are_all_zero_and_signed_and_biases_are_in_float(norm: str) -> None:
    model = int8(norm, symmetric=True)
    check_form(model, "file")
    zeros, asymmetric = (
        [constants(graph)[node.input[2]] for node in graph.graph.node if node.op_type in QDQ]
        for graph in (model, int8(norm))
    )
    assert len(zeros) > 30
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert in_int8(model) == in_int8(int8(norm))  # all layers
    assert any(zero.any() for zero in asymmetric)
    assert difference(model, trained(norm)) < 0.15


def test_what_is_not_symmetric_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ort.QDQQuantizer

    def older(*given: object) -> object:  # one that quantises biases whatever is asked for
        return right(*given[:-1], {"ActivationSymmetric": True})

    monkeypatch.setattr(ort, "QDQQuantizer", older)
    with pytest.raises(ExportError, match=r"^file: not written: onnxruntime left .*bias.* asymmetric$"):
        quantise(floats(), digits(32, "train"), replace(INT8, symmetric=True), "file")


def test_a_residual_sum_reads_its_map_as_it_was_before_it_was_rounded() -> None:
    # in a network with batch norms, convolutions read the sums themselves
    before, after = floats("batchnorm"), int8("batchnorm")
    made_by, sums = makers(after), 0
    for node in after.graph.node:
        for name in node.input if node.op_type == "Add" else ():
            rounded = made_by.get(name)
            if rounded is not None and rounded.op_type == "DequantizeLinear":
                (source,) = [n for n in after.graph.node if rounded.input[0] in n.output]
                assert made_by[source.input[0]].op_type in QUANTISED, node.name
            sums += 1
    assert sums == 2 * sum(node.op_type == "Add" for node in before.graph.node) > 4


@pytest.mark.parametrize(("opset", "symmetric", "batch"), [(13, False, 3), (17, True, None)])
def test_graphs_of_other_opsets_and_of_a_fixed_batch_are_quantised(
    opset: int, symmetric: bool, batch: int | None
) -> None:
    product = replace(trained(), batch=batch)
    variant = Variant("int8", opset, symmetric=symmetric)
    graph = onnx_format.graph_of(product, variant, "file", ARITHMETIC if opset == 13 else OPERATORS)
    assert graph.opset_import[0].version == opset
    assert len(in_int8(graph)) == json.loads(onnx_format.metadata_of(graph)[METADATA])["layers"] == 13
    images = digits(3).take(range(3))
    with torch.no_grad():
        expected = product.network(images)
    logits = running(graph.SerializeToString())(images)
    assert (logits - expected).abs().max() < 0.2 * expected.abs().max()
    if batch:
        with pytest.raises(Exception, match="Got: 2 Expected: 3"):
            running(graph.SerializeToString())(images[:2])


SPOILT = ("1_1.expand", "1_1.project", "2_1.expand", "2_1.project")


@cache
def spoilt() -> Product:
    """Return the network with a channel of no use that reaches 10,000 between each two of these layers."""
    network = copy.deepcopy(trained().network)
    for i in (0, 2):
        wide, narrow = (network.get_submodule(name) for name in SPOILT[i : i + 2])
        assert isinstance(wide, nn.Conv2d)
        assert isinstance(narrow, nn.Conv2d)
        assert wide.bias is not None
        with torch.no_grad():
            wide.weight[0], wide.bias[0], narrow.weight[:, 0] = 0.0, 1e4, 0.0
    return replace(trained(), network=network)


@cache
def spoilt_floats() -> onnx.ModelProto:
    return onnx_format.graph_of(spoilt(), Variant(), "file")


def test_the_layers_that_an_outlier_spoils_stay_in_float_and_no_others() -> None:
    graph = spoilt_floats()
    result = quantise(graph, digits(128, "train"), INT8, "file")
    assert sorted(result.in_float) == sorted(SPOILT)
    assert result.layers == 13
    every = {layer_of(node) for node in graph.graph.node if node.op_type in QUANTISED}
    assert in_int8(result.model) == every - set(SPOILT)
    assert difference(result.model, spoilt()) < 0.1


def test_without_layers_in_float_a_spoilt_network_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "MOST_IN_FLOAT", 0.0)
    result = quantise(spoilt_floats(), digits(128, "train"), replace(INT8, max_drop=1.0), "file")
    assert result.in_float == ()
    assert difference(result.model, spoilt()) > 0.3


def test_a_file_that_keeps_layers_in_float_says_which(tmp_path: Path) -> None:
    formats = ("onnx", "openvino") if HAS_OPENVINO else ("onnx",)
    for done in export_files(spoilt(), formats, INT8, tmp_path, digits(100)):
        (said,) = done.checks
        assert said.startswith("9 of 13 layers in int8, ranges by minmax; left in float: ")
        assert all(name in said for name in SPOILT), done.format
    stored = json.loads(onnx_format.metadata_of(onnx.load(tmp_path / "model_int8.onnx"))[METADATA])
    assert set(stored["in_float"]) == set(SPOILT)
    assert (stored["layers"], stored["ranges"], stored["symmetric"]) == (13, "minmax", False)


def test_the_metadata_of_int8_say_how_it_was_made() -> None:
    variant = Variant("int8", ranges="percentile", symmetric=True)
    assert precision_facts(Quantised(floats(), 13, (), variant).metadata()) == (
        "13 of 13 layers in int8, ranges by percentile",
        "all zero points are 0, and biases are in float",
    )
    assert precision_facts(Quantised(floats(), 13, ("stem.conv", "head"), INT8).metadata()) == (
        "11 of 13 layers in int8, ranges by minmax; left in float: stem.conv, head",
    )
    assert precision_facts(onnx_format.metadata_of(floats())) == ()


def test_too_many_spoilt_layers_are_refused_with_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "MOST_IN_FLOAT", 1 / 13)
    with pytest.raises(
        ExportError,
        match=r"^file: not written: even with 1 of 13 layers in float \(\d_1\.(expand|project)\), on "
        r"calibration images .*of 128 images .*drop of .*95% interval \d+\.\d% to \d+\.\d%\)",
    ) as error:
        quantise(spoilt_floats(), digits(128, "train"), INT8, "file")
    assert len(str(error.value)) <= 300


def test_what_cannot_be_quantised_is_refused_in_one_line() -> None:
    graph = copy.deepcopy(floats())
    graph.graph.input[0].name = "photographs"
    with pytest.raises(ExportError, match="file: onnxruntime cannot quantise this network: ") as error:
        quantise(graph, digits(8), INT8, "file")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "space",
    [
        *("quadranet-mobile", "quadranet-mobile-bn", "proxyless-mobile", "union-mobile", "wired"),
        *("all neurons", "all neurons, batch norm"),
    ],
)
def test_networks_of_every_space_are_quantised(
    space: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the networks are not trained: neither their classes nor their logits say anything
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(10.0, 0.0, 1.0))
    if space.startswith("all neurons"):
        found = neural_space("batchnorm" if "batch" in space else "layernorm")
    else:
        found = wired_space() if space == "wired" else load_space(space)
    torch.manual_seed(1)
    arch = every_candidate(found) if space == "wired" else sample_arch(found, np.random.default_rng(1))
    network = build_subnet(found, arch, 10).eval()
    pixels = torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    images = RealImages(pixels, torch.zeros(24, dtype=torch.int64), (0.5,) * 3, (0.29,) * 3, "noise")
    recalibrate(network, [(images.take(range(24)), images.labels)])
    graph = trace_onnx(network.eval(), (3, 32, 32), "file")
    result = quantise(graph, images, Variant("int8", symmetric=symmetric), "file")
    check_form(result.model, "file")
    every = {layer_of(node) for node in graph.graph.node if node.op_type in QUANTISED}
    assert in_int8(result.model) == every
    with torch.no_grad():
        expected = network(images.take(range(24)))
    logits = running(result.model.SerializeToString())(images.take(range(24)))
    assert logits.isfinite().all()
    assert float((logits - expected).norm() / expected.norm()) > 1e-4
