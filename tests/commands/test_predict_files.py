"""`qnas predict` of ONNX files that are no networks of ours."""

import json
from pathlib import Path

import onnx
import pytest
from helpers.command_line import joined, qnas
from helpers.onnx_graphs import graph_model, nested_functions, node, ones, products


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def put(file: Path, model: onnx.ModelProto) -> Path:
    file.write_bytes(model.SerializeToString())
    return file


def free_convolution() -> onnx.ModelProto:
    return graph_model([node("Conv", ["x", "w"], ["y"])], [ones("w", 8, 3, 3, 3)], shape=(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            free_convolution(),
            "height and width of the images are free: give a resolution in px",
        ),
        (
            graph_model([node("Flatten", ["x"], ["y"])]),
            "no layers that compute, expected a network",
        ),
        (
            nested_functions(60),
            "more than 20,000 nodes, or 32,000,000 bytes of them",
        ),
        (graph_model([node("Det", ["x"], ["y"])]), "no total: these operators are not known"),
    ],
)
def test_what_has_no_latency_is_one_line(
    model: onnx.ModelProto, message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("predict", put(file, model)) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"qnas: error: {file}: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_resolution_sets_what_is_free(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas("predict", put(file, free_convolution()), "--resolution", "32", "--device", "cpu") == 0
    assert "at 32 x 32 px, one image" in joined(capsys.readouterr().out)


def test_estimated_operators_are_marked_in_text_and_json(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qnas("predict", put(file, products()), "--device", "cpu") == 0
    text = joined(capsys.readouterr().out)
    marked = (
        "estimated, each priced by its multiply-adds: Einsum (2), LSTM (1), GRU (1), Attention (1), "
        "DeformConv (1)"
    )
    assert marked in text
    assert "(estimated)" in text
    assert qnas("predict", file, "--device", "cpu", "--json") == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert marked in facts["note"]
    assert facts["coverage"] < 1
    assert "estimated" in {layer["kind"] for layer in facts["dearest"]}
