from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qnas.common.errors import ArchError
from qnas.latency.onnx.graph_file import read_graph


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *shapes: Sequence[int | str | None],
    weights: Sequence[onnx.TensorProto] = (),
    domain: str = "",
) -> Path:
    """Write a graph from inputs x0, x1, ... of these shapes to `y`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    return path


RELU = [helper.make_node("Relu", ["x0"], ["y"], name="first")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def test_free_sizes_are_one_image_of_the_resolution(file: Path) -> None:
    graph = read_graph(write(file, RELU, ["n", 3, "h", "w"]), resolution_px=48)
    assert graph.shapes["y"] == (1, 3, 48, 48)


def test_a_free_and_a_fixed_side_may_agree_with_the_resolution(file: Path) -> None:
    assert read_graph(write(file, RELU, [None, 3, 32, None]), resolution_px=32).shapes["y"] == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("shapes", "resolution_px", "message"),
    [
        ([["n", 3, "h", 8]], None, "height and width of the images are free: give a resolution in px"),
        ([[1, 3, 8, 8]], 16, "images are fixed at 8 x 8 px, not 16: leave the resolution out"),
        ([[1, 3, 16, 8]], 16, "images are fixed at 16 x 8 px, not 16"),
        ([[4, 3, 8, 8]], None, "batch is fixed at 4 images, expected 1 or a free batch size"),
        ([[1, "c", 8, 8]], None, "input 'x0' has a free number of channels"),
        ([[1, 3, 16, 8, 8]], None, r"input 'x0' has the shape \(1, 3, 16, 8, 8\), expected images"),
        ([["n", 10]], None, r"input 'x0' has the shape \(\?, 10\), expected images: four dimensions"),
        ([[1, 3, 8, 8], [1, 3, 8, 8]], None, "expected one input, a batch of images; found x0, x1"),
        ([], None, "expected one input, a batch of images; found none"),
    ],
)
def test_an_input_that_is_not_one_image_is_refused(
    shapes: list[list[int | str]], resolution_px: int | None, message: str, file: Path
) -> None:
    with pytest.raises(ArchError, match=message) as caught:
        read_graph(write(file, RELU, *shapes), resolution_px=resolution_px)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no model", b"{}", bytes(range(256)) * 8])
def test_a_file_that_is_no_onnx_is_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ArchError, match="not an ONNX file"):
        read_graph(file)


def test_a_file_cut_short_is_refused(file: Path) -> None:
    weights = [numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")]
    write(file, [helper.make_node("Conv", ["x0", "w"], ["y"])], [1, 3, 8, 8], weights=weights)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ArchError, match="not an ONNX file, or a damaged one"):
        read_graph(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchError, match="no such file, expected an ONNX file"):
        read_graph(tmp_path / "none.onnx")
    with pytest.raises(ArchError, match="a folder, expected an ONNX file"):
        read_graph(tmp_path)


def test_a_shape_that_depends_on_data_is_refused(file: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x0"], ["i"]), helper.make_node("Cast", ["i"], ["y"], to=1)]
    with pytest.raises(ArchError, match="the shape of 'i', which NonZero 'i' gives, is not known"):
        read_graph(write(file, nodes, [1, 3, 8, 8]))


def test_an_operator_of_others_has_the_shape_that_the_file_states(file: Path) -> None:
    nodes = [helper.make_node("Odd", ["x0"], ["a"], domain="my.own"), helper.make_node("Relu", ["a"], ["y"])]
    write(file, nodes, [1, 3, 8, 8], domain="my.own")
    with pytest.raises(ArchError, match="which Odd 'a' gives, is not known before it runs"):
        read_graph(file)
    model = onnx.load(file)
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 3, 4, 4]))
    onnx.save(model, file)
    graph = read_graph(file)
    assert [node.op for node in graph.nodes] == ["my.own.Odd", "Relu"]
    assert graph.shapes["y"] == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Relu", [], ["y"], name="n"), "not a valid ONNX graph: 'n': "),
        (helper.make_node("Shape", [], ["y"], name="n"), "not a valid ONNX graph: 'n': "),
        (helper.make_node("Constant", [], ["y"], name="n"), "not a valid ONNX graph: 'n': "),
        (helper.make_node("Conv", ["x0"], ["y"], name="n"), "not a valid ONNX graph: 'n': "),
        (helper.make_node("NoSuchOperator", ["x0"], ["y"], name="n"), "not a valid ONNX graph: 'n': "),
        (
            helper.make_node("Add", ["x0", "gone"], ["y"], name="n"),
            "Add 'n' reads 'gone', whose shape is not",
        ),
    ],
)
def test_a_graph_that_is_not_valid_is_refused(node: onnx.NodeProto, message: str, file: Path) -> None:
    with pytest.raises(ArchError, match=message):
        read_graph(write(file, [node], [1, 3, 8, 8]))


def external(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a tensor whose data lie in a file that is not there."""
    onnx.external_data_helper.set_external_data(tensor, "gone.bin", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    return tensor


def test_weights_in_a_file_that_is_missing_are_not_needed(file: Path) -> None:
    weight = external(numpy_helper.from_array(np.ones((64, 3, 3, 3), np.float32), "w"))
    node = helper.make_node("Conv", ["x0", "w"], ["y"])
    assert read_graph(write(file, [node], [1, 3, 8, 8], weights=[weight])).shapes["y"] == (1, 64, 6, 6)


def test_a_missing_value_that_shapes_may_need_is_named(file: Path) -> None:
    shape = external(numpy_helper.from_array(np.array([1, -1]), "s"))
    node = helper.make_node("Reshape", ["x0", "s"], ["y"])
    with pytest.raises(ArchError, match="the values of 's' cannot be read: put the data file"):
        read_graph(write(file, [node], [1, 3, 8, 8], weights=[shape]))


def test_arithmetic_on_shapes_is_followed_and_does_not_run(file: Path) -> None:
    def value(name: str, *numbers: int) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(np.array(numbers), name)
        return helper.make_node("Constant", [], [name], value=tensor)

    nodes = [
        value("two", 2),
        value("three", 3),
        helper.make_node("Shape", ["x0"], ["all"]),
        helper.make_node("Slice", ["all", "two", "three"], ["h"]),
        helper.make_node("Div", ["h", "two"], ["half"]),
        helper.make_node("Shape", ["x0"], ["head"], start=0, end=2),
        helper.make_node("Concat", ["head", "two", "half", "h"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x0", "shape"], ["y"]),
    ]
    graph = read_graph(write(file, nodes, ["n", 3, "h", "w"]), resolution_px=8)
    assert [node.op for node in graph.nodes] == ["Reshape"]
    assert graph.shapes["y"] == (1, 3, 2, 4, 8)


def test_functions_of_the_file_are_written_out(file: Path) -> None:
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.own", 1)]
    function = helper.make_function("my.own", "Twice", ["a"], ["c"], body, opsets[:1])
    write(file, [helper.make_node("Twice", ["x0"], ["y"], domain="my.own")], [1, 3, 8, 8], domain="my.own")
    model = onnx.load(file)
    model.functions.append(function)
    onnx.save(model, file)
    assert [node.op for node in read_graph(file).nodes] == ["Relu", "Neg"]
