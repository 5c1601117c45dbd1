"""Files that are damaged, or made to cost more than they show, are refused in one line."""

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.mutants import MUTANTS, attack, bounded, check_refusal, read_or_refuse
from helpers.onnx_graphs import SAMPLES, graph_model, model_mutants, mutated_models, node, ones, whole
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qnas.common.errors import ArchError
from qnas.latency.device import load_device
from qnas.latency.onnx.graph_file import LARGEST_TENSOR, read_graph
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import predict_file

FAULTS = Path(__file__).parents[4] / "shared" / "faults"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def predict(path: Path) -> None:
    """Read a file and price it."""
    latency_ms = predict_file("device", load_device("cpu"), read_onnx(path)).latency_ms
    assert 0 < latency_ms < math.inf


def refusal(path: Path, model: onnx.ModelProto, resolution_px: int | None = None) -> str:
    """Return why a model is refused, without its path."""
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArchError) as caught:
        read_onnx(path, resolution_px=resolution_px)
    check_refusal(caught.value, path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_are_networks(name: str, file: Path) -> None:
    file.write_bytes(SAMPLES[name]().SerializeToString())
    predict(file)


@bounded
@given(content=st.sampled_from(sorted(SAMPLES)).flatmap(lambda name: mutated_models(SAMPLES[name]())))
def test_a_mutant_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    read_or_refuse(predict, tmp_path_factory.getbasetemp() / "mutant.onnx", content)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_thousands_of_mutants_are_read_or_refused(name: str, file: Path) -> None:
    assert attack(predict, file, model_mutants(SAMPLES[name](), MUTANTS)) == []


@pytest.mark.skipif(not FAULTS.is_dir(), reason="the stored faults are not here")
def test_the_stored_faults_are_refused(tmp_path: Path) -> None:
    stored = [*FAULTS.glob("onnx__*"), FAULTS / "fbomb.onnx", FAULTS / "regex.onnx"]
    assert len(stored) > 2
    assert attack(predict, tmp_path / "fault.onnx", [path.read_bytes() for path in stored]) == []
    with pytest.raises(ArchError, match="with its functions written out"):
        read_onnx(FAULTS / "fbomb.onnx")


def broken(change: str) -> onnx.ModelProto:
    """Return a model of one node, with one change."""
    weight = ones("w", 4, 4, 1, 1)
    model = graph_model([node("Conv", ["x", "w"], ["y"], name="n")], [weight])
    (conv,), (weight,) = model.graph.node, model.graph.initializer
    match change:
        case "type of no element":
            weight.data_type = 12345
        case "type left out":
            weight.data_type = 0
        case "negative size":
            weight.dims[0] = -4
        case "huge size":
            weight.dims[0] = 2**62
        case "many dimensions":
            weight.dims[:] = [1] * 40
        case "other number of values":
            weight.dims[0] = 5
        case "two outputs of one name":
            model.graph.node.append(node("Relu", ["x"], ["y"]))
        case "output of the input's name":
            conv.output[0] = "x"
        case "two weights of one name":
            model.graph.initializer.append(weight)
        case "output that nobody writes":
            model.graph.output[0].name = "z"
        case "no outputs":
            del model.graph.output[:]
        case "circle":
            conv.input[0] = "y"
        case "attribute of a function":
            conv.attribute.add(name="group", type=onnx.AttributeProto.INT, ref_attr_name="g")
        case "attribute of another type":
            conv.attribute.add(name="group", type=onnx.AttributeProto.STRING, s=b"\xff")
        case "no group":
            conv.attribute.add(name="group", type=onnx.AttributeProto.INT, i=0)
        case "weights for other channels":
            weight.dims[:] = [16, 1, 1, 1]
        case "no stride":
            conv.attribute.add(name="strides", type=onnx.AttributeProto.INTS, ints=[0, 0])
        case "inputs left out":
            conv.input[:] = ["", ""]
        case "constant without a value":
            model.graph.node.insert(0, node("Constant", [], ["c"]))
        case "constant of another type":
            model.graph.node.insert(0, node("Constant", [], ["c"], value=1))
        case "constant without a name":
            model.graph.node.insert(0, node("Constant", [], [], value_int=1))
        case "name of control characters":
            conv.name = "\x1b[2J\n" * 900
            conv.input[1] = "\u202e" * 900
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("type of no element", "'w' has elements of the unknown type 12345"),
        ("type left out", "'w' has elements of the unknown type 0"),
        ("negative size", r"the tensor 'w' has the shape \(-4, 4, 1, 1\), expected sizes above 0"),
        ("huge size", "the tensor 'w' has the shape .* at most 2,147,483,647 elements"),
        ("many dimensions", "the tensor 'w' has the shape"),
        ("other number of values", "the values of 'w' cannot be read: expected as many as its shape has"),
        ("two outputs of one name", "two tensors of the name 'y'"),
        ("output of the input's name", "two tensors of the name 'x'"),
        ("two weights of one name", "two tensors of the name 'w'"),
        ("output that nobody writes", "no operator gives the output 'z'"),
        ("no outputs", "no outputs"),
        ("circle", "Conv 'n' reads 'y', whose shape is not known"),
        ("attribute of a function", "'n': an attribute of a function, but it is in none"),
        ("attribute of another type", "not a valid ONNX graph: 'n': "),
        ("no group", r"Conv 'n' does not fit its inputs, \(1, 4, 8, 8\), \(4, 4, 1, 1\)"),
        ("weights for other channels", r"Conv 'n' does not fit its inputs, \(1, 4, 8, 8\), \(16, 1, 1, 1\)"),
        ("no stride", "not a valid ONNX graph: "),
        ("inputs left out", "not a valid ONNX graph: 'n': "),
        ("constant without a value", "a constant without a value"),
        ("constant of another type", "a constant without a value"),
        ("constant without a name", "a constant without a value"),
        ("name of control characters", "reads .*, whose shape is not known"),
    ],
)
def test_a_broken_graph_is_refused_with_the_reason(change: str, message: str, file: Path) -> None:
    file.write_bytes(broken(change).SerializeToString())
    with pytest.raises(ArchError, match=message) as caught:
        read_onnx(file)
    check_refusal(caught.value, file)


# onnx's inference in C++ ends the process, or does not end, for these
@pytest.mark.parametrize(
    "last",
    [
        node("LayerNormalization", ["x", "one"], ["y"], axis=2**31),
        node("LayerNormalization", ["x", "one"], ["y", "m", "v"], axis=-(2**62)),
        node("Split", ["x"], ["y", "b", "c"], axis=1, num_outputs=2),
        node("GatherND", ["x", "i"], ["y"], batch_dims=-(2**31)),
        node("GatherND", ["x", "i"], ["y"], batch_dims=-1),
        node("GatherND", ["x", "empty"], ["y"], batch_dims=-1),
        node("Einsum", ["x"], ["y"], equation="......->..."),
    ],
    ids=lambda last: last.op_type,
)
def test_numbers_that_onnx_does_not_survive_are_refused(last: onnx.NodeProto, file: Path) -> None:
    weights = [ones("one", 8), whole("i", 1, 1), numpy_helper.from_array(np.zeros((2, 0), np.int64), "empty")]
    model = graph_model([last], weights)
    assert attack(predict, file, [model.SerializeToString()]) == []
    assert "not a valid ONNX graph" in refusal(file, model)


@pytest.mark.parametrize("size", [-1, "n", None])
def test_a_free_size_in_any_form_asks_for_a_resolution(size: int | str | None, file: Path) -> None:
    weights = [ones("w", 6, 4, 3, 3)]
    model = graph_model([node("Conv", ["x", "w"], ["y"])], weights, shape=(size, 4, size, size))
    assert refusal(file, model) == (
        "height and width of the images are free: give a resolution in px with --resolution"
    )
    assert read_onnx(file, resolution_px=10).macs == 64 * 6 * 4 * 9
    model = graph_model([node("Conv", ["x", "w"], ["y"])], weights, shape=(size, 4, 10, size))
    assert "--resolution" in refusal(file, model)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 0, 8), r"input 'x' has the shape \(1, 4, 0, 8\), expected sizes above 0, or free ones"),
        ((0, 4, 8, 8), r"\(0, 4, 8, 8\), expected sizes above 0"),
        ((1, 4, -2, 8), r"\(1, 4, -2, 8\), expected sizes above 0"),
        ((1, -1, 8, 8), "a free number of channels"),
        ((1, 4, 2**40, 8), "images are fixed at 1099511627776 x 8 px, not 8"),
    ],
)
def test_a_size_that_no_image_has_is_refused(shape: Sequence[int], message: str, file: Path) -> None:
    file.write_bytes(graph_model([node("Relu", ["x"], ["y"])], shape=shape).SerializeToString())
    with pytest.raises(ArchError, match=message):
        read_onnx(file, resolution_px=8)


def test_a_resolution_has_a_limit(file: Path) -> None:
    model = graph_model([node("Relu", ["x"], ["y"])], shape=("n", 3, "h", "w"))
    side = math.isqrt(LARGEST_TENSOR // 3)
    file.write_bytes(model.SerializeToString())
    assert read_onnx(file, resolution_px=side).height_px == side
    assert "the tensor 'x'" in refusal(file, model, side + 1)
    assert "the tensor 'x'" in refusal(file, model, 10**30)


@pytest.mark.parametrize(
    ("stated", "message"), [(-1, "the shape of 'a', which Odd 'a' gives, is not known"), (0, "has the shape")]
)
def test_a_stated_shape_that_is_none_is_not_used(stated: int, message: str, file: Path) -> None:
    nodes = [node("Odd", ["x"], ["a"], domain="my"), node("Relu", ["a"], ["y"])]
    model = graph_model(nodes, domains=["my"])
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, stated, 8, 8]))
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ArchError, match=message):
        read_graph(file)


def test_constants_of_huge_sizes_are_not_made(file: Path) -> None:
    nodes = [
        node("ConstantOfShape", ["s"], ["a"]),
        node("Range", ["zero", "many", "one"], ["b"]),
        node("Expand", ["one", "s"], ["c"]),
        node("Tile", ["b", "many1"], ["d"]),
        node("Relu", ["x"], ["y"]),
    ]
    scalars = [
        numpy_helper.from_array(np.array(n), name) for name, n in (("zero", 0), ("many", 2**30), ("one", 1))
    ]
    for used in (1, 2, 3):
        model = graph_model([*nodes[:used], nodes[-1]], [whole("s", 2**15, 2**15), *scalars])
        assert attack(predict, file, [model.SerializeToString()]) == []
        predict(file)
    model = graph_model(nodes, [whole("s", 2**15, 2**15), whole("many1", 2**20), *scalars])
    assert "the tensor 'd' has the shape" in refusal(file, model)


@pytest.mark.parametrize("op", ["RegexFullMatch", "StringNormalizer", "StringSplit"])
def test_operators_of_text_are_not_run(op: str, file: Path) -> None:
    text = onnx.TensorProto(name="t", data_type=TensorProto.STRING, dims=[1])
    text.string_data.append(b"a" * 30 + b"!")
    attributes: dict[str, dict[str, str]] = {
        "RegexFullMatch": {"pattern": "(a|a)*$"},
        "StringSplit": {"delimiter": "a"},
    }
    outputs = ["a", "b"] if op == "StringSplit" else ["a"]
    last = helper.make_node(op, ["t"], outputs, **attributes.get(op, {}))
    model = graph_model([last, node("Relu", ["x"], ["y"])], [text])
    assert attack(predict, file, [model.SerializeToString()]) == []
    predict(file)


def timed(path: Path, model: onnx.ModelProto) -> tuple[OnnxNetwork, float]:
    path.write_bytes(model.SerializeToString())
    start = time.process_time()
    return read_onnx(path), time.process_time() - start


@pytest.mark.parametrize("kind", ["activations", "sums", "chain of constants", "wide sum", "views"])
def test_a_large_graph_does_not_take_longer_than_its_nodes(kind: str, file: Path) -> None:
    # 2,000 activations in a row once took 20 s
    count = 2000
    weights = [numpy_helper.from_array(np.array(1, np.float32), "one")]
    names = ["x", *(f"v{i}" for i in range(1, count)), "y"]
    match kind:
        case "activations":
            nodes = [node("Sigmoid", [a], [b]) for a, b in itertools.pairwise(names)]
        case "sums":
            nodes = [node("Add", [a, "one"], [b]) for a, b in itertools.pairwise(names)]
        case "chain of constants":
            names[0] = "one"
            nodes = [node("Mul", [a, a], [b]) for a, b in itertools.pairwise(names)]
            nodes[-1] = node("Mul", ["x", names[-2]], ["y"])
        case "wide sum":
            nodes = [node("Max", ["x"] * count, ["v"]), node("Min", ["v"] * count, ["y"])]
        case _:
            nodes = [node("Identity", [a], [b]) for a, b in itertools.pairwise(names)]
            nodes[-1] = node("Relu", [names[-2]], ["y"])
    found, seconds = timed(file, graph_model(nodes, weights))
    assert found.operators
    assert seconds < 5


def test_chains_that_could_be_anything_are_refused_before_they_take_long(file: Path) -> None:
    nodes = [
        node("Sigmoid", [f"v{i}"], [f"v{i + 1}"])
        if i % 16 < 4
        else node("Mul", [f"v{i}", "c"], [f"v{i + 1}"])
        for i in range(10_000)
    ]
    nodes[0].input[0], nodes[-1].output[0] = "x", "y"
    model = graph_model(nodes, [numpy_helper.from_array(np.array(1.5, np.float32), "c")])
    assert attack(predict, file, [model.SerializeToString()]) == []
    assert "too many chains of elementwise operators" in refusal(file, model)


def test_data_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "net.onnx"
    shape = whole("s", 1, -1)
    for place in (tmp_path / "data.bin", tmp_path / "in" / "data.bin"):
        place.write_bytes(shape.raw_data)
    (tmp_path / "in" / "link.bin").symlink_to(tmp_path / "data.bin")

    def stored(location: str, **more: Any) -> onnx.ModelProto:
        tensor = whole("s", 1, -1)
        onnx.external_data_helper.set_external_data(tensor, location, **more)
        tensor.ClearField("raw_data")
        return graph_model([node("Reshape", ["x", "s"], ["a"]), node("Relu", ["a"], ["y"])], [tensor])

    some: tuple[dict[str, int], ...] = ({}, {"length": 16}, {"offset": 0, "length": 16})
    for more in some:
        file.write_bytes(stored("data.bin", **more).SerializeToString())
        assert len(read_onnx(file).operators) == 1
    message = "the values of 's' cannot be read: put the data file that belongs to this ONNX file beside it"
    for location in ("../data.bin", str(tmp_path / "data.bin"), "link.bin", "none.bin", "", "\x00", "."):
        assert refusal(file, stored(location)) == message
    assert refusal(file, stored("data.bin", length=15)) == message
    assert refusal(file, stored("data.bin", offset=9)) == message
    assert refusal(file, stored("data.bin", length=2**40)) == message
    assert refusal(file, stored("data.bin", offset=-(2**40))) == message
