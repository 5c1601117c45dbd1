"""OpenVINO's IRs are read as the operators that they run, and refused in one line where they are damaged."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, mutated_bytes, read_or_refuse
from hypothesis import given

from qnas.common.errors import ArchError
from qnas.latency.device import load_device
from qnas.latency.kernels import Kernel
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import DEVICE, predict_file

Shape = Sequence[int]
Layer = tuple[Any, ...]  # type, inputs as numbers of layers, shape of the output[, attributes]
IMAGE: Layer = ("Parameter", (), (-1, 4, 8, 8))


def port(number: int, shape: Shape) -> str:
    dims = "".join(f"<dim>{n}</dim>" for n in shape)
    return f'<port id="{number}" precision="FP32">{dims}</port>'


def shape_of(value: Any) -> Shape:
    """Return the shape of a layer's output, or that of a constant's numbers."""
    return value if isinstance(value, tuple) else (len(value),) if isinstance(value, list) else ()


def ir(layers: Sequence[Layer]) -> tuple[bytes, bytes]:
    """Return the .xml and the .bin of layers, the last of which is the output.

    A constant is given as its shape, or as a list of whole numbers, or as a number.
    """
    content, texts, edges = b"", [], []
    for i, (op, inputs, shape, *rest) in enumerate([*layers, ("Result", (len(layers) - 1,), None)]):
        data = dict(rest[0]) if rest else {}
        out = shape
        if op == "Const":
            values = shape if isinstance(shape, list) else [shape] if isinstance(shape, float) else []
            out = shape_of(shape)
            kind = "f32" if isinstance(shape, float) or not values else "i64"
            packed = struct.pack(f"<{len(values)}{'f' if kind == 'f32' else 'q'}", *values)
            packed = packed or bytes(4 * 4096)
            data = {"element_type": kind, "offset": len(content), "size": len(packed)}
            if isinstance(shape, tuple):
                data["size"] = 4
                for n in shape:
                    data["size"] *= n
            content += packed
        attributes = " ".join(f'{key}="{value}"' for key, value in data.items())
        ins = "".join(port(n, shape_of(layers[source][2])) for n, source in enumerate(inputs))
        outs = port(len(inputs), out) if out is not None else ""
        texts.append(
            f'<layer id="{i}" name="layer {i}" type="{op}" version="opset1"><data {attributes}/>'
            f"<input>{ins}</input><output>{outs}</output></layer>"
        )
        for n, source in enumerate(inputs):
            from_port = len(layers[source][1])
            edges.append(
                f'<edge from-layer="{source}" from-port="{from_port}" to-layer="{i}" to-port="{n}"/>'
            )
    text = (
        f'<net name="n" version="11"><layers>{"".join(texts)}</layers><edges>{"".join(edges)}</edges></net>'
    )
    return text.encode(), content


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.xml"


def write(file: Path, layers: Sequence[Layer]) -> Path:
    text, content = ir(layers)
    file.write_bytes(text)
    file.with_suffix(".bin").write_bytes(content)
    return file


def kernels(network: OnnxNetwork) -> list[Kernel]:
    return [operator.kernel for operator in network.operators]


WINDOW = {"strides": "1, 1", "dilations": "1, 1", "pads_begin": "1, 1", "pads_end": "1, 1"}
NETWORK: list[Layer] = [
    IMAGE,
    ("Const", (), (6, 4, 3, 3)),
    ("Convolution", (0, 1), (-1, 6, 8, 8), {**WINDOW, "auto_pad": "explicit"}),
    ("Const", (), (6, 1, 1, 5, 5)),
    ("GroupConvolution", (2, 3), (-1, 6, 8, 8), {**WINDOW, "auto_pad": "same_upper"}),
    ("Const", (), [1]),
    ("MVN", (4, 5), (-1, 6, 8, 8), {"eps": "1e-6", "normalize_variance": "true"}),
    ("Const", (), (1, 6, 1, 1)),
    ("Multiply", (6, 7), (-1, 6, 8, 8)),
    ("Gelu", (8,), (-1, 6, 8, 8)),
    ("Clamp", (9,), (-1, 6, 8, 8), {"min": "0", "max": "6"}),
    ("Const", (), [2, 3]),
    ("ReduceMean", (10, 11), (-1, 6), {"keep_dims": "false"}),
    ("Const", (), (10, 6)),
    ("MatMul", (12, 13), (-1, 10), {"transpose_a": "false", "transpose_b": "true"}),
]


def test_the_layers_of_an_ir_are_those_of_our_names(file: Path) -> None:
    network = read_onnx(write(file, NETWORK))
    assert kernels(network) == [
        Kernel("conv", 8, 4, 6, 3),
        Kernel("dwconv", 8, 6, 6, 5),
        Kernel("layernorm", 8, 6, 6),
        Kernel("gelu", 8, 6, 6),
        Kernel("relu6", 8, 6, 6),
        Kernel("gap", 8, 6, 6),
        Kernel("linear", 1, 6, 10),
    ]
    assert network.macs == 64 * 6 * 4 * 9 + 64 * 6 * 25 + 60


@pytest.mark.parametrize(
    ("axes", "kind"),
    [([1], "layernorm"), ([3], "layernorm"), ([2, 3], "elementwise"), ([1, 2], "elementwise")],
)
def test_a_norm_over_channels_alone_is_a_layer_norm(axes: list[int], kind: str, file: Path) -> None:
    layers: list[Layer] = [IMAGE, ("Const", (), axes), ("MVN", (0, 1), (-1, 4, 8, 8))]
    (kernel,) = kernels(read_onnx(write(file, layers)))
    assert kernel.kind == kind


def test_a_map_in_steps_is_priced_as_the_same_network(file: Path) -> None:
    bounds: list[Layer] = [("Const", (), 1.0)] * 4
    steps: Layer = ("FakeQuantize", (0, 1, 2, 3, 4), (-1, 4, 8, 8), {"levels": "256"})
    network = read_onnx(write(file, [IMAGE, *bounds, steps, ("HSwish", (5,), (-1, 4, 8, 8))]))
    assert kernels(network) == [Kernel("hswish", 8, 4, 4)]
    assert network.changes_of_precision == 2


def test_a_hard_sigmoid_has_its_slope_and_shift_as_inputs(file: Path) -> None:
    line: list[Layer] = [("Const", (), 1 / 6), ("Const", (), 0.5)]
    network = read_onnx(write(file, [IMAGE, *line, ("HardSigmoid", (0, 1, 2), (-1, 4, 8, 8))]))
    assert kernels(network) == [Kernel("hsigmoid", 8, 4, 4)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([IMAGE, ("Odd", (0,), (-1, 4, 8, 8))], r"not known.*: openvino.Odd \(1\)$"),
        ([("Parameter", (), (-1, 4, 8))], "expected images: four dimensions"),
        ([IMAGE, ("MVN", (0, 0), (-1, 4, 8, 8))], "axes or sizes that are not constant"),
        ([IMAGE, ("Const", (), (6, 5, 1, 1)), ("Convolution", (0, 1), (-1, 6, 8, 8))], "not a valid"),
    ],
)
def test_what_has_no_latency_is_refused_with_the_reason(
    layers: list[Layer], message: str, file: Path
) -> None:
    with pytest.raises(ArchError, match=message):
        read_onnx(write(file, layers))


def test_weights_are_not_needed_but_axes_are(file: Path) -> None:
    write(file, NETWORK).with_suffix(".bin").unlink()
    with pytest.raises(ArchError, match=r"the values of 'layer 5' cannot be read: put net.bin, which"):
        read_onnx(file)
    write(file, [IMAGE, NETWORK[1], ("Convolution", (0, 1), (-1, 6, 8, 8), WINDOW)])
    file.with_suffix(".bin").unlink()
    assert kernels(read_onnx(file)) == [Kernel("conv", 8, 4, 6, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not XML"),
        ("<net>", "not XML"),
        ("<html/>", "expected an OpenVINO IR"),
        ("<net/>", "not an ONNX file|no outputs|expected one input"),
        ('<!DOCTYPE net [<!ENTITY a "aaaa">]><net>&a;</net>', "a document type, which no IR has"),
        ("<net>" + "<a/>" * 1_000_001 + "</net>", "more than 1,000,000 elements"),
    ],
)
def test_a_text_that_is_no_ir_is_refused(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ArchError, match=message):
        read_onnx(file)


def predict(path: Path) -> None:
    assert predict_file(DEVICE, load_device("cpu"), read_onnx(path)).latency_ms > 0


@bounded
@given(content=mutated_bytes(ir(NETWORK)[0]))
def test_a_mutant_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = write(tmp_path_factory.getbasetemp() / "mutant.xml", NETWORK)
    read_or_refuse(predict, file, content)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(file: Path) -> None:
    write(file, NETWORK)
    assert attack(predict, file, byte_mutants(file.read_bytes(), MUTANTS)) == []
