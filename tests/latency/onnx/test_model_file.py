import os
from pathlib import Path

import onnx
import pytest
from helpers.onnx_graphs import (
    calling,
    convolutions,
    functions,
    graph_model,
    nested_functions,
    node,
    ones,
    own_function,
)
from onnx import TensorProto, helper

from qnas.common.errors import ArchError
from qnas.latency.onnx import model_file
from qnas.latency.onnx.model_file import read_model
from qnas.latency.onnx.networks import read_onnx


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def put(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    """Return why a file is refused, without its path."""
    with pytest.raises(ArchError) as caught:
        read_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) - len(str(path)) <= 300
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


def test_what_is_kept_of_a_file_is_what_onnx_reads(file: Path) -> None:
    model = convolutions()
    model.graph.node[0].doc_string = "explained"
    read = read_model(put(file, model))
    model.graph.node[0].ClearField("doc_string")
    assert read == model


def test_weights_are_skipped_whatever_their_size(file: Path) -> None:
    model = convolutions()
    weight = model.graph.initializer[0]
    weight.dims[:] = [2**16, 4, 3, 3]
    weight.raw_data = bytes(2**16 * 36 * 4)
    read = read_model(put(file, model))
    assert read.graph.initializer[0].dims == weight.dims
    assert not read.graph.initializer[0].HasField("raw_data")
    assert read.ByteSize() < 4000


@pytest.mark.parametrize("cut", [1, 20, 200, 1000])
def test_a_file_cut_anywhere_is_damaged(cut: int, file: Path) -> None:
    put(file, convolutions())
    os.truncate(file, file.stat().st_size - cut)
    assert refusal(file) == "not an ONNX file, or a damaged one"


def test_a_length_beyond_the_message_is_damage(file: Path) -> None:
    # a node of 3 bytes whose name would have 100, and whose rest is another field of the model
    file.write_bytes(b"\x3a\x05\x0a\x03\x1a\x64n" + b"\x42\x02\x10\x14")
    assert refusal(file) == "not an ONNX file, or a damaged one"


def test_a_name_that_is_no_text_is_damage(file: Path) -> None:
    model = graph_model([node("Relu", ["x"], ["y"], name="aname")])
    file.write_bytes(model.SerializeToString().replace(b"aname", b"\xff\xfe\xff\xfe\xff"))
    assert refusal(file) == "not an ONNX file, or a damaged one"


def test_a_pipe_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    assert refusal(file) == "cannot be read: not a regular file"


@pytest.mark.parametrize("where", ["ir_version", "opset"])
@pytest.mark.parametrize("version", [-1, 1001, 2**62])
def test_a_version_of_no_onnx_is_refused(where: str, version: int, file: Path) -> None:
    model = convolutions()
    if where == "ir_version":
        model.ir_version = version
    else:
        model.opset_import[0].version = version
    assert f"version {version} of {'ir_version' if where == 'ir_version' else 'ai.onnx'}" in refusal(
        put(file, model)
    )


def delimited(number: int, content: bytes) -> bytes:
    """Return a field of protobuf with a length."""
    size = len(content)
    length = bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def test_empty_messages_are_counted_before_they_are_made(file: Path) -> None:
    file.write_bytes(delimited(7, b"\x0a\x00" * 3_000_000))  # 6 MB, as nodes some gigabytes
    assert refusal(file) == "more than 400,000 fields, expected a network of images"


def test_messages_in_messages_are_bounded(file: Path) -> None:
    content = b""
    for _ in range(30):  # a graph in an attribute of a node
        content = delimited(1, delimited(5, delimited(6, content)))
    file.write_bytes(delimited(7, content))
    assert "nested more than 40 deep" in refusal(file)


def test_names_and_lists_are_bounded(file: Path) -> None:
    put(file, graph_model([node("Relu", ["x"], ["y"], name="n" * 10_001)]))
    assert refusal(file) == "`name` of 10,001 bytes, expected an ONNX file"
    put(file, graph_model([node("Relu", ["x"], ["y"], text="s" * 1_000_001)]))
    assert refusal(file) == "`s` of 1,000,001 bytes, expected an ONNX file"
    put(file, graph_model([node("Relu", ["x"], ["y"], axes=[0] * 400_000)]))
    assert refusal(file) == "more than 400,000 fields, expected a network of images"
    put(file, graph_model([node("Relu", ["x"], ["y"], text="s" * 999_999)] * 33))
    assert refusal(file) == "more than 32,000,000 bytes besides its weights"


def test_functions_are_written_out(file: Path) -> None:
    read = read_model(put(file, functions()))
    assert [n.op_type for n in read.graph.node] == ["LeakyRelu", "Neg"] * 3
    assert [round(n.attribute[0].f, 1) for n in read.graph.node if n.attribute] == [0.1, 0.2, 0.3]
    assert len(read_onnx(file).operators) == 6


def test_the_nodes_of_functions_are_counted_before_they_are_written_out(file: Path) -> None:
    message = "with its functions written out: expected a network of images"
    for depth in (60, 5):
        assert message in refusal(put(file, nested_functions(depth)))
    assert [n.op_type for n in read_model(put(file, nested_functions(4))).graph.node] == ["Relu"] * 10**4
    # few nodes, but each gets the long names of its call
    long = own_function("long", *["Relu"] * 9000)
    model = graph_model([node("long", ["x" * 9000], ["y"], domain="own")], functions=[long], domains=["own"])
    assert message in refusal(put(file, model))


def test_functions_that_call_themselves_are_refused(file: Path) -> None:
    message = "is not supported: it calls itself, or more than 64 functions call one another"
    assert message in refusal(put(file, calling("a", own_function("a", "a"))))
    assert message in refusal(put(file, calling("a", own_function("a", "b"), own_function("b", "Relu", "a"))))
    chain = [own_function("f0", "Relu"), *(own_function(f"f{i}", f"f{i - 1}") for i in range(1, 500))]
    assert message in refusal(put(file, calling("f499", *chain)))
    # nobody calls them
    assert len(read_model(put(file, calling("f9", *chain, own_function("a", "a")))).graph.node) == 1


def test_two_functions_of_one_name_are_refused(file: Path) -> None:
    assert "two functions of one name" in refusal(
        put(file, calling("a", own_function("a", "Relu"), own_function("a", "Neg")))
    )


BRANCH = helper.make_graph([node("Relu", ["x"], ["b"])], "b", [], [helper.make_empty_tensor_value_info("b")])


@pytest.mark.parametrize("place", ["graph", "function"])
@pytest.mark.parametrize("op", ["If", "Loop"])
def test_valid_branches_and_loops_are_not_supported_rather_than_not_valid(
    op: str, place: str, file: Path
) -> None:
    if op == "If":
        steps = [node("If", ["yes"], ["y"], name="choice", then_branch=BRANCH, else_branch=BRANCH)]
    else:
        body = helper.make_graph(
            [node("Identity", ["go"], ["on"]), node("Relu", ["s"], ["t"])],
            "b",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("t", TensorProto.FLOAT, None),
            ],
        )
        steps = [node("Loop", ["", "yes", "x"], ["y"], name="choice", body=body)]
    yes = node("Constant", [], ["yes"], value=ones("", dtype=bool))
    model = graph_model([yes, *steps])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 8, 8)))
    onnx.checker.check_model(model)
    if place == "function":
        imports = [helper.make_opsetid("", 23)]
        made = helper.make_function("own", "f", ["x"], ["y"], [yes, *steps], imports)
        model = calling("f", made)
    assert refusal(put(file, model)) == (
        f"{op} 'choice' is not supported: expected a network without branches and loops, whose operators "
        "always run"
    )


def test_the_count_of_nodes_is_limited(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "NODES", 10)
    put(file, graph_model([node("Relu", ["x"], ["y"])] * 10))
    assert len(read_model(file).graph.node) == 10
    put(file, graph_model([node("Relu", ["x"], ["y"])] * 11))
    assert refusal(file).startswith("more than 10 nodes")
