"""TFLite files are read as the operators that they run, and refused in one line where they are damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_tflite import CONV, DEPTHWISE, LINEAR, RELU, RELU6, SAME, VALID, Step, tflite_file
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, mutated_bytes, read_or_refuse
from hypothesis import given

from qnas.common.errors import ArchError
from qnas.latency.device import load_device
from qnas.latency.kernels import Kernel
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import DEVICE, predict_file

ADD, MUL, SUB, MEAN, RSQRT, RESHAPE, PAD, GELU = 0, 18, 41, 40, 76, 22, 34, 150
MAXIMUM, MINIMUM, QUANTIZE, DEQUANTIZE, SQUARED_DIFFERENCE, HARD_SWISH = 55, 57, 114, 6, 99, 117
MAX_POOL, TRANSPOSE, CONCATENATION, POW = 17, 39, 2, 78


def floats(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def whole(*values: int) -> Any:
    return np.array(values, np.int32)


def number(value: float) -> Any:
    return np.array(value, np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.tflite"


def read(file: Path, tensors: dict[str, Any], steps: list[Step], **rest: Any) -> OnnxNetwork:
    file.write_bytes(tflite_file(tensors, steps, **rest))
    return read_onnx(file)


def kinds(network: OnnxNetwork) -> list[str]:
    return [operator.kernel.kind for operator in network.operators]


def stride(px: int, *, padding: int = SAME, activation: int = 0) -> dict[int, int]:
    return {0: padding, 1: px, 2: px, 3: activation}


W, B = floats(6, 3, 3, 4), floats(6)
NORM: list[Step] = [  # of t into y, with the dimensions that a mean drops
    (MEAN, "t last", "m", {0: 1}),
    (SUB, "t m", "d"),
    (MUL, "d d", "s"),
    (MEAN, "s last", "v"),
    (ADD, "v eps", "e"),
    (RESHAPE, "e four", "f"),
    (RSQRT, "f", "r"),
    (MUL, "d r", "n"),
    (MUL, "n w", "o"),
    (ADD, "o b", "y"),
]
MAP = (1, 8, 8, 6)
NORM_TENSORS = {
    **{"t": MAP, "d": MAP, "s": MAP, "n": MAP, "o": MAP, "y": MAP, "v": (1, 8, 8), "e": (1, 8, 8)},
    **{"m": (1, 8, 8, 1), "f": (1, 8, 8, 1), "r": (1, 8, 8, 1), "eps": number(1e-6), "last": whole(3)},
    **{"four": whole(1, 8, 8, 1), "w": floats(1, 1, 1, 6), "b": floats(1, 1, 1, 6), "p": floats(6, 1, 1, 4)},
}

# name -> tensors, steps, kernels of the operators
FILES: dict[str, tuple[dict[str, Any], list[Step], list[Kernel]]] = {
    "convolution with a fused ReLU6": (
        {"w": W, "b": B, "y": (1, 4, 4, 6)},
        [(CONV, "x w b", "y", stride(2, activation=RELU6))],
        [Kernel("conv", 8, 4, 6, 3, 2), Kernel("relu6", 4, 6, 6)],
    ),
    "convolution without padding": (
        {"w": W, "b": B, "y": (1, 6, 6, 6)},
        [(CONV, "x w b", "y", stride(1, padding=VALID))],
        [Kernel("conv", 6, 4, 6, 3, 1)],
    ),
    "pad before a convolution": (
        {"w": W, "pads": whole(0, 0, 1, 1, 1, 1, 0, 0), "p": (1, 10, 10, 4), "y": (1, 4, 4, 6)},
        [(PAD, "x pads", "p"), (CONV, "p w", "y", stride(2, padding=VALID))],
        [Kernel("conv", 8, 4, 6, 3, 2)],
    ),
    "pad of channels": (
        {"pads": whole(0, 0, 0, 0, 0, 0, 0, 2), "y": (1, 8, 8, 6)},
        [(PAD, "x pads", "y")],
        [Kernel("pad", 8, 6, 6)],
    ),
    "depthwise convolution": (
        {"w": floats(1, 5, 5, 4), "b": floats(4), "y": (1, 8, 8, 4)},
        [(DEPTHWISE, "x w b", "y", {0: SAME, 1: 1, 2: 1, 3: 1, 4: RELU})],
        [Kernel("dwconv", 8, 4, 4, 5), Kernel("relu", 8, 4, 4)],
    ),
    "layer norm by means": (
        NORM_TENSORS,
        [(CONV, "x p", "t", stride(1)), *NORM],
        [Kernel("conv", 8, 4, 6), Kernel("layernorm", 8, 6, 6)],
    ),
    "clip by a maximum and a minimum": (
        {"low": number(-6), "high": number(6), "a": (1, 8, 8, 4), "y": (1, 8, 8, 4)},
        [(MAXIMUM, "x low", "a"), (MINIMUM, "a high", "y")],
        [Kernel("clip", 8, 4, 4)],
    ),
    "neuron and residual": (
        {"a": (1, 8, 8, 4), "y": (1, 8, 8, 4), "b": (1, 8, 8, 4)},
        [(GELU, "x", "a"), (MUL, "a x", "b"), (ADD, "b x", "y", {0: RELU})],
        [*(Kernel(kind, 8, 4, 4) for kind in ("gelu", "mul", "add", "relu"))],
    ),
    "head": (
        {"axes": whole(1, 2), "a": (1, 4), "w": floats(10, 4), "b": floats(10), "y": (1, 10)},
        [(MEAN, "x axes", "a"), (LINEAR, "a w b", "y", {0: 0})],
        [Kernel("gap", 8, 4, 4), Kernel("linear", 1, 4, 10)],
    ),
    "linear layer of maps": (
        {"w": floats(10, 4), "y": (1, 8, 8, 10)},
        [(LINEAR, "x w -", "y", {2: 1})],
        [Kernel("conv", 8, 4, 10)],
    ),
    "maps whose channels come first": (
        {"order": whole(0, 2, 3, 1), "a": (1, 8, 8, 4), "w": W, "y": (1, 8, 8, 6)},
        [(TRANSPOSE, "x order", "a"), (CONV, "a w", "y", stride(1))],
        [Kernel("conv", 8, 4, 6, 3)],
    ),
    "pooling and concatenation": (
        {"a": (1, 4, 4, 4), "y": (1, 4, 4, 8)},
        [(MAX_POOL, "x", "a", {0: SAME, 1: 2, 2: 2, 3: 2, 4: 2}), (CONCATENATION, "a a", "y", {0: 3})],
        [Kernel("maxpool", 8, 4, 4, 2, 2), Kernel("concat", 4, 8, 8)],
    ),
    "hard swish": ({"y": (1, 8, 8, 4)}, [(HARD_SWISH, "x", "y")], [Kernel("hswish", 8, 4, 4)]),
}


@pytest.mark.parametrize("name", FILES)
def test_an_operator_of_tflite_is_that_of_our_names(name: str, file: Path) -> None:
    tensors, steps, expected = FILES[name]
    image = (1, 4, 8, 8) if name.startswith("maps") else (1, 8, 8, 4)
    network = read(file, tensors, steps, image=image)
    assert [operator.kernel for operator in network.operators] == expected
    assert (network.channels, network.height_px, network.width_px) == (4, 8, 8)


def test_multiply_adds_are_exact(file: Path) -> None:
    tensors, steps, _ = FILES["convolution with a fused ReLU6"]
    assert read(file, tensors, steps).macs == 4 * 4 * 6 * 3 * 3 * 4
    tensors, steps, _ = FILES["depthwise convolution"]
    assert read(file, tensors, steps).macs == 8 * 8 * 4 * 5 * 5


def test_a_map_in_steps_is_priced_as_the_same_network(file: Path) -> None:
    """Numbers in steps stand for their values: here an exponent of -0.5 is 50 steps of 0.01."""
    tensors, steps, expected = FILES["layer norm by means"]
    power = np.array(-40, np.int8)
    tensors = {**tensors, "q": (1, 8, 8, 4), "z": MAP, "half": power}
    swapped = [(POW, "f half", "r") if step[0] == RSQRT else step for step in steps]
    swapped = [(QUANTIZE, "x", "q"), (CONV, "q p", *swapped[0][2:]), *swapped[1:], (DEQUANTIZE, "y", "z")]
    network = read(file, tensors, swapped, scales={"half": (0.01, 10)})
    assert [operator.kernel for operator in network.operators] == expected
    assert network.changes_of_precision == 2
    other = read(file, tensors, swapped, scales={"half": (0.02, 10)})
    assert "layernorm" not in kinds(other)


def test_a_free_batch_is_one_image(file: Path) -> None:
    tensors, steps, expected = FILES["hard swish"]
    network = read(file, tensors, steps, image_signature=(-1, 8, 8, 4))
    assert [operator.kernel for operator in network.operators] == expected


def test_an_operator_without_a_name_of_ours_is_named(file: Path) -> None:
    with pytest.raises(ArchError, match=r"these operators are not known.*: tflite.BuiltinOperator_63 \(1\)$"):
        read(file, {"y": (1, 8, 8, 4)}, [(63, "x", "y")])
    with pytest.raises(ArchError, match=r"tflite.Mine \(1\)$"):
        read(file, {"y": (1, 8, 8, 4)}, [("Mine", "x", "y")])


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x1c\0\0\0TFL3", b"\xff" * 4 + b"TFL3" + b"\xff" * 99])
def test_a_file_that_is_no_tflite_is_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ArchError, match=r"not a (valid )?TFLite file"):
        read_onnx(file)
    with pytest.raises(ArchError, match="no such file, expected a TFLite file"):
        read_onnx(file.with_name("other.tflite"))


def whole_network() -> bytes:
    last: list[Step] = [(MEAN, "y axes", "a"), (LINEAR, "a h -", "z")]
    tensors = {**NORM_TENSORS, "axes": whole(1, 2), "a": (1, 6), "h": floats(10, 6), "z": (1, 10)}
    return tflite_file(tensors, [(CONV, "x p", "t", stride(1, activation=RELU)), *NORM, *last])


def predict(path: Path) -> None:
    assert predict_file(DEVICE, load_device("cpu"), read_onnx(path)).latency_ms > 0


@bounded
@given(content=mutated_bytes(whole_network()))
def test_a_mutant_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    read_or_refuse(predict, tmp_path_factory.getbasetemp() / "mutant.tflite", content)


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(file: Path) -> None:
    assert attack(predict, file, byte_mutants(whole_network(), MUTANTS)) == []
