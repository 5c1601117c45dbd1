"""TFLite files: their operators, types, metadata and layout."""

import importlib.util
import json
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exported import METADATA, PX, digits, neural_space, trained
from helpers.tflite_files import converted
from torch import nn

from qnas.common.errors import UsageError
from qnas.deploy.export import quantisation, tflite_format
from qnas.deploy.export.formats import check_request, export_files
from qnas.deploy.export.product import Product, Variant
from qnas.deploy.export.tflite_format import DEPTHWISE, changed, operators, read_metadata
from qnas.deploy.timed_files import random_product
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch, only_arch, sample_arch
from qnas.spaces.lower import lower
from qnas.spaces.space import load_space, make_space

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None, reason="the extra tflite is not installed"
)


@pytest.fixture(autouse=True)
def _converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite_format, "convert", converted)


def model_of(content: bytes) -> Any:
    return tflite_format._schema().ModelT.InitFromPackedBuf(content, 0)


def weights(content: bytes) -> dict[str, Any]:
    """Return the weights of layers by their names, as tensors of the flatbuffer."""
    (graph,) = model_of(content).subgraphs
    named = zip(operators(content), graph.operators, strict=True)
    return {read.layer: graph.tensors[op.inputs[1]] for read, op in named if read.layer}


INT8, FLOAT32 = 9, 0  # of the format's TensorType


def expected_operators(product: Product) -> Counter[str]:
    """Return the operators that a network needs, from its layers: six for the norm of a map, no copies."""
    layers = [layer for block in product.blocks for layer in block.layers]
    n = Counter(layer.op for layer in layers)
    pairs = list(pairwise(layer.op for layer in layers))
    # the scale and shift of norms that have no convolution behind them, or one that pads
    scaled = sum(norm == "layernorm" and behind not in ("conv", "linear") for norm, behind in pairs)
    # and the batch norms behind a product, which no convolution takes up
    scaled += sum(before in ("mul", "square") and norm == "batchnorm" for before, norm in pairs)
    pooled = n["layernorm"] and 1  # the norm of pooled features has a mean and a sum for its convolution
    return Counter(
        {
            "CONV_2D": n["conv"] + n["layernorm"] - pooled,
            "DEPTHWISE_CONV_2D": n["dwconv"],
            "FULLY_CONNECTED": n["linear"],
            "GELU": n["gelu"],
            "MEAN": n["layernorm"] + pooled + n["gap"],
            "SUB": n["layernorm"],
            "RSQRT": n["layernorm"],
            "MUL": 2 * n["layernorm"] + scaled + n["mul"] + n["square"],
            "ADD": n["add"] + scaled + pooled,
            "MAXIMUM": n["clip"],
            "MINIMUM": n["clip"],
            "HARD_SWISH": n["hswish"],
        }
    )


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_a_file_has_the_operators_of_its_layers_and_no_others(norm: str) -> None:
    found = Counter(each.kind for each in operators(converted(trained(norm))))
    assert found == +expected_operators(trained(norm))


def test_images_go_in_with_the_channels_last_under_the_names_of_other_formats() -> None:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=converted(trained())).get_signature_runner()
    (given,), (logits,) = runner.get_input_details().items(), runner.get_output_details().items()
    assert (given[0], list(given[1]["shape"]), given[1]["dtype"]) == ("images", [1, PX, PX, 3], np.float32)
    assert (logits[0], list(logits[1]["shape"]), logits[1]["dtype"]) == ("logits", [1, 10], np.float32)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-dynamic"])
def test_every_precision_takes_and_gives_float32(precision: Any, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    tflite_format.write(trained(), Variant(precision), tmp_path / "model.tflite", "file")
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    ends = (*interpreter.get_input_details(), *interpreter.get_output_details())
    assert [end["dtype"] for end in ends] == [np.float32, np.float32]


def test_the_file_holds_its_metadata_and_its_labels_behind_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    product = replace(trained(), classes=("größe", "two\nlines", *trained().classes[2:]))
    path.write_bytes(tflite_format._described(converted(trained()), product, METADATA))
    assert read_metadata(path.read_bytes()) == METADATA
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["labels.txt"]
        labels = archive.read("labels.txt").decode().splitlines()
    assert labels == ["größe", "two\\nlines", *"23456789"]
    assert torch.equal(tflite_format.load(path)(digits(2).take([0])).argmax(1), torch.tensor([classify()]))


def classify() -> int:
    with torch.no_grad():
        return int(trained().network(digits(2).take([0])).argmax())


def test_the_same_network_gives_the_same_file(tmp_path: Path) -> None:
    files = []
    for name in ("a.tflite", "b.tflite"):
        tflite_format.write(trained(), Variant("int8"), tmp_path / name, "file")
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def written(precision: Any, product: Product | None = None, **settings: Any) -> bytes:
    graph = tflite_format._Calibrated(
        converted(product or trained()), digits(40, "train"), Variant(precision, **settings)
    )
    return graph.in_int8(graph.layers)


def test_int8_changes_convolutions_and_linear_layers_and_neither_norms_nor_depthwise_ones() -> None:
    content = written("int8")
    types = {name: tensor.type for name, tensor in weights(content).items()}
    convolutions = {"1_1.expand", "1_1.project", "2_1.expand", "2_1.project"}
    int8 = {"stem.conv", "2_transition.conv", "head.classifier", *convolutions}
    assert {name for name, kind in types.items() if kind == INT8} == int8
    assert set(types.values()) == {INT8, FLOAT32}
    assert Counter(o.kind for o in operators(content))["DEPTHWISE_CONV_2D"] == 6
    scales = weights(content)["1_1.expand"].quantization
    assert len(scales.scale) == weights(content)["1_1.expand"].shape[0] > 1  # one a channel
    assert not np.any(scales.zeroPoint)


def test_a_large_depthwise_convolution_finds_its_range_for_each_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tflite_format, "LARGEST_DEPTHWISE", 2)  # the network has kernels of 3
    content = written("int8")
    (graph,) = model_of(content).subgraphs
    for read, op in zip(operators(content), graph.operators, strict=True):
        if read.kind == "DEPTHWISE_CONV_2D":
            image, kernel = (graph.tensors[place].type for place in op.inputs[:2])
            assert (image, kernel) == (FLOAT32, INT8)
    monkeypatch.setattr(tflite_format, "LARGEST_DEPTHWISE", 3)
    kinds = {each.kind for each in changed(converted(trained()), "int8")}
    assert kinds == {"CONV_2D", "FULLY_CONNECTED"}


def test_xnnpack_gets_no_larger_depthwise_kernel_than_it_has_code_for() -> None:
    """But a GPU gets the operators that its latencies are of."""
    space = make_space(
        "wide",
        input={"channels": 3, "resolution_px": PX},
        norm="batchnorm",
        activation="relu6",
        stem={"channels": 8, "kernel": 2, "stride": 2},
        candidates=[{"block": "quadra", "kernel": 7, "expansion": 2}],
        stages=[{"channels": 8, "positions": 1, "stride": 1}],
        head={"classes": 10},
    )
    wide = random_product(space, only_arch(space), 0)
    split, whole = (converted(replace(wide, on_gpu=on_gpu)) for on_gpu in (False, True))
    kernels = [
        [each.kernel for each in operators(content) if each.kind == DEPTHWISE] for content in (split, whole)
    ]
    assert kernels == [[4, 4, 3, 3] * 3, [7] * 3]
    images = digits(4).take(range(4))
    runs = [tflite_format._running(tflite_format._interpreter(content=file)) for file in (split, whole)]
    expected, found = (run(images) for run in runs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert {each.kind for each in changed(split, "int8")} == {"CONV_2D", "FULLY_CONNECTED"}


def test_half_precision_changes_all_weights_but_those_of_norms(tmp_path: Path) -> None:
    every = changed(converted(trained()), "fp16")
    assert Counter(each.kind for each in every) == {
        "CONV_2D": 6,
        "DEPTHWISE_CONV_2D": 6,
        "FULLY_CONNECTED": 1,
    }
    kinds = Counter(each.kind for each in operators(tflite_format._half(converted(trained()))))
    assert kinds["DEQUANTIZE"] == 13


def input_range(**settings: Any) -> tuple[float, float]:
    graph = tflite_format._Calibrated(converted(trained()), digits(40, "train"), Variant("int8", **settings))
    assert graph.ranges is not None
    (first,) = (o for o in operators(graph.model) if o.layer == "stem.conv")
    limits = graph.ranges[first.source]
    return float(limits["min"][0]), float(limits["max"][0])


def test_ranges_are_those_that_the_calibration_images_reach() -> None:
    images = digits(40, "train").take(range(40))
    assert input_range() == (float(images.min()), float(images.max()))


def test_a_percentile_leaves_out_the_ends_of_a_map() -> None:
    full, percentile = (
        tflite_format._Calibrated(
            converted(trained()), digits(40, "train"), Variant("int8", ranges=ranges)
        ).ranges
        for ranges in ("minmax", "percentile")
    )
    assert full is not None
    assert percentile is not None
    widths = [
        [float(ends[name]["max"][0] - ends[name]["min"][0]) for name in full] for ends in (full, percentile)
    ]
    assert all(part <= 1.01 * whole for whole, part in zip(*widths, strict=True))
    assert sum(widths[1]) < sum(widths[0])


def test_symmetric_maps_have_a_zero_point_of_zero() -> None:
    for symmetric in (False, True):
        (graph,) = model_of(written("int8", symmetric=symmetric)).subgraphs
        points = [t.quantization.zeroPoint for t in graph.tensors if t.type == INT8 and t.quantization]
        assert any(np.any(point) for point in points) is not symmetric


def spoilt() -> bytes:
    """Return the file with a channel of no use that reaches 10,000 between two of its layers."""
    model = model_of(converted(trained()))
    (graph,) = model.subgraphs
    read = operators(converted(trained()))
    by_layer = {each.layer: op for each, op in zip(read, graph.operators, strict=True)}

    def values(place: int) -> Any:
        tensor = graph.tensors[place]
        buffer = model.buffers[tensor.buffer]
        buffer.data = np.array(buffer.data)  # a copy that can be written
        return buffer.data.view(np.float32).reshape(tensor.shape)

    wide, narrow = by_layer["1_1.expand"], by_layer["1_1.project"]
    values(wide.inputs[1])[0] = 0
    values(wide.inputs[2])[0] = 1e4
    values(narrow.inputs[1])[..., 0] = 0
    import flatbuffers

    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_the_layers_that_an_outlier_spoils_stay_in_float_and_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = spoilt()
    monkeypatch.setattr(tflite_format, "convert", lambda *_: file)
    path = tmp_path / "model.tflite"
    tflite_format.write(trained(), Variant("int8"), path, "file")
    types = {name: tensor.type for name, tensor in weights(path.read_bytes()).items()}
    assert (types["1_1.project"], types["2_1.project"]) == (FLOAT32, INT8)
    said = tflite_format.check(trained(), Variant("int8"), path, digits(1), "file")
    stored = json.loads(read_metadata(path.read_bytes())["int8"])
    assert set(stored["in_float"]) <= {"1_1.expand", "1_1.project"}
    assert any("left in float: " in sentence and "1_1.project" in sentence for sentence in said)
    images, right = (
        digits(50).take(range(50)),
        tflite_format._running(tflite_format._interpreter(content=file)),
    )
    error = (tflite_format.load(path)(images) - right(images)).abs().max()
    monkeypatch.setattr(quantisation, "MOST_IN_FLOAT", 0.0)
    tflite_format.write(trained(), Variant("int8", max_drop=1.0), path, "file")
    assert (tflite_format.load(path)(images) - right(images)).abs().max() > 3 * error


def test_checks_say_the_oldest_runtime_of_the_operators(tmp_path: Path) -> None:
    (done,) = export_files(trained(), ["tflite"], Variant(), tmp_path, digits(20))
    total = sum(expected_operators(trained()).values())
    assert done.checks == (f"{total} operators, in float32 of TFLite 2.9.0 or newer",)  # GELU came with 2.9
    assert (done.batch, done.files) == (1, ("model.tflite",))


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tflite_format.write(trained(), Variant("int8"), tmp_path / "model.tflite", "file")
    tflite_format.load(tmp_path / "model.tflite")(digits(1).take([0]))
    assert capfd.readouterr() == ("", "")
    with tflite_format._quiet():
        print("suppressed")
    print("kept")
    assert capfd.readouterr() == ("kept\n", "")


def test_a_missing_extra_is_said_with_the_fix_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(
        UsageError, match=r"format tflite: litert_torch is not installed: pip install 'quadran"
    ):
        check_request(["tflite"], "fp32")


def test_other_batches_are_refused() -> None:
    with pytest.raises(UsageError, match="`batch=4`: files of the format tflite take a batch of 1"):
        check_request(["tflite"], "fp32", 4)


def sampled(space: str, px: int) -> Product:
    found = neural_space(space) if space in ("layernorm", "batchnorm") else load_space(space)
    arch = (
        Arch(tuple(p.names[i] for i, p in enumerate(found.positions)))
        if found.name == "neurons"
        else sample_arch(found, np.random.default_rng(1))
    )
    torch.manual_seed(1)
    network = build_subnet(found, arch, 10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    blocks = lower(found, arch, resolution_px=px, classes=10)
    return replace(trained(), network=network.eval(), blocks=blocks, resolution_px=px)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "px"),
    [
        ("quadranet-mobile", 224),
        ("quadranet-mobile-bn", 224),
        ("proxyless-mobile", 224),
        ("union-mobile", 224),
        ("layernorm", 32),  # every neuron
        ("batchnorm", 32),
    ],
)
def test_shipped_spaces_and_every_neuron_convert_without_a_copy(space: str, px: int, tmp_path: Path) -> None:
    product = sampled(space, px)
    images = digits(4).at(px)
    (done,) = export_files(product, ["tflite"], Variant(), tmp_path, images)
    assert done.parity.max_difference <= 1e-5 * done.parity.scale
    found = Counter(each.kind for each in operators((tmp_path / "model.tflite").read_bytes()))
    found.pop("PAD", None)  # in front of strides: TFLite pads the other side
    assert found == +expected_operators(product)  # activations of convolutions are part of them


def test_weights_behind_the_graph_are_taken_into_it(tmp_path: Path) -> None:
    import flatbuffers

    # the quantiser writes files of some megabytes so, and their places change with the metadata
    schema, content = tflite_format._schema(), converted(trained())
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    largest = max(model.buffers, key=lambda each: 0 if each.data is None else len(each.data))
    weights, largest.data = bytes(largest.data), None
    largest.size, largest.offset = len(weights), 2
    for _ in range(2):  # the second has the place that the first has found
        builder = flatbuffers.Builder(len(content))
        builder.Finish(model.Pack(builder), b"TFL3")
        graph = bytes(builder.Output())
        largest.offset = -len(graph) % 16 + len(graph)
    behind = graph.ljust(largest.offset, b"\0") + weights
    (tmp_path / "model.tflite").write_bytes(tflite_format._described(behind, trained(), trained().metadata))
    images = digits(4).take(range(4))
    with torch.no_grad():
        expected = trained().network(images)
    assert float((tflite_format.load(tmp_path / "model.tflite")(images) - expected).abs().max()) < 1e-4
