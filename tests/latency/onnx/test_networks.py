import itertools
import json
import math
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from helpers.exported import neural_product, neural_space, trained
from helpers.networks import all_candidates
from onnx import TensorProto, helper, numpy_helper

from qnas.common.errors import ArchError, TableError
from qnas.deploy.export.onnx_format import graph_of
from qnas.deploy.export.product import FilePrecision, Variant
from qnas.deploy.export.tracing import trace_onnx
from qnas.latency.device import Device, device_names, load_device, parse_device
from qnas.latency.device_table import predict_blocks
from qnas.latency.kernels import Kernel
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import predict_file, predict_onnx
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch, sample_arch
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import SearchSpace, load_space

Step = tuple[Any, ...]  # operator, inputs, outputs[, attributes]


def write(
    path: Path,
    steps: Sequence[Step],
    *,
    shape: Sequence[int | str] = (1, 4, 8, 8),
    weights: Mapping[str, Any] | None = None,
    output: str = "y",
    opset: int = 20,
) -> Path:
    """Write a graph from input `x` to outputs; a weight given as a shape is made of ones."""
    nodes = [
        helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **(rest or [{}])[0])
        for op, inputs, outputs, *rest in steps
    ]
    constants = [
        numpy_helper.from_array(
            np.ones(value, np.float32) if isinstance(value, tuple) else np.asarray(value), name
        )
        for name, value in (weights or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in output.split()],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def number(value: float) -> Any:
    return np.float32(value)


def kinds(network: OnnxNetwork) -> list[str]:
    return [operator.kernel.kind for operator in network.operators]


def made_device(fusion: str = "edge", **launch_ms: float) -> Device:
    """Return a device on which a kernel of each kind takes so long, and a tenth more for a million MACs."""
    model = {
        kind: {"kind": "fitted", "terms": {"launch": ms, "mmacs": ms / 10}} for kind, ms in launch_ms.items()
    }
    content = {
        "schema": "qnas.device/1",
        "name": "made",
        "title": "made for tests",
        "runtime": "none",
        "precision": "float32",
        "batch": 1,
        "unit": "ms",
        "kind": "fitted",
        "source": "made up",
        "date": "2026-11-21",
        "fusion": fusion,
        "model": model,
    }
    return parse_device(json.dumps(content), "made")


def check_export_equals_arch(space: SearchSpace, arch: Arch, file: Path, resolution_px: int) -> None:
    network = build_subnet(space, arch, space.head.classes)
    shape = (space.input.channels, resolution_px, resolution_px)
    file.write_bytes(trace_onnx(network.eval(), shape, "network").SerializeToString())
    found = read_onnx(file)
    blocks = lower(space, arch, resolution_px=resolution_px)
    assert (found.channels, found.height_px, found.width_px) == (3, resolution_px, resolution_px)
    assert found.macs == count_macs(blocks)
    assert not found.uncovered
    for name in device_names():
        device = load_device(name)
        ours, theirs = predict_blocks(device, blocks), predict_onnx(device, found)
        assert Counter(row.kernel for row in theirs) == Counter(row.kernel for row in ours)
        assert Counter((r.kernel.kind, r.kind) for r in theirs) == Counter(
            (r.kernel.kind, r.kind) for r in ours
        )
        total = math.fsum(row.latency_ms for row in ours)
        assert math.fsum(row.latency_ms for row in theirs) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", ["quadranet-small", "proxyless-mobile"])
def test_an_exported_network_takes_what_its_arch_takes(name: str, file: Path) -> None:
    space = load_space(name)
    arch = all_candidates(space)
    assert set(arch.choices) == {c for p in space.positions for c in p.names}
    check_export_equals_arch(space, arch, file, 32 if name == "quadranet-small" else 64)


@pytest.mark.parametrize(
    ("norm", "precision"),
    [
        ("layernorm", "fp32"),
        ("batchnorm", "fp32"),
        pytest.param("layernorm", "fp16", marks=pytest.mark.slow),
        pytest.param("batchnorm", "int8", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_any_neuron_takes_what_its_arch_takes(
    norm: str, precision: FilePrecision, file: Path
) -> None:
    product, space, arch = neural_product(norm)
    assert len(set(arch.choices)) == len(NEURONS)
    file.write_bytes(graph_of(product, Variant(precision), "file").SerializeToString())
    found, blocks = read_onnx(file), lower(space, arch)
    assert found.macs == count_macs(blocks)
    assert not found.uncovered
    for name in device_names():
        device = load_device(name)
        ours, theirs = predict_blocks(device, blocks), predict_onnx(device, found)
        assert Counter(row.kernel for row in theirs) == Counter(row.kernel for row in ours)
        assert math.fsum(row.latency_ms for row in theirs) == pytest.approx(
            math.fsum(row.latency_ms for row in ours), rel=1e-9
        )


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_every_neuron_has_a_latency_of_its_own_and_no_layer_is_free(norm: str) -> None:
    space = neural_space(norm)
    arch = all_candidates(space)
    for name in device_names():
        device = load_device(name)
        rows = predict_blocks(device, lower(space, arch))
        assert all(row.latency_ms > 0 for row in rows)
        totals: dict[str, float] = {}
        for position, choice in zip(space.positions, arch.choices, strict=True):
            of_block = (row.latency_ms for row in rows if row.name == position.name)
            totals[str(position.candidate(choice).parameters["neuron"])] = math.fsum(of_block)
        # type4 and factored differ in biases only, which cost nothing
        # a device may run type2 and type3, a square before and after the convolution, in one time; a compiler
        # fuses the squares with the passes beside them
        alike = 3 if device.fusion in ("inductor", "triton") else 2
        assert len({round(ms, 9) for ms in totals.values()}) >= len(NEURONS) - alike, name
        cheapest_first = ["linear", "type2", "type4", "quadranet", "fan"]
        if norm == "layernorm":
            ms = [totals[neuron] for neuron in cheapest_first]
            assert ms == sorted(ms), name


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_of_another_precision_is_priced_as_the_same_network(
    precision: FilePrecision, file: Path
) -> None:
    product = trained("batchnorm")
    operators = []
    for each in ("fp32", precision):
        file.write_bytes(graph_of(product, Variant(each), "file").SerializeToString())
        network = read_onnx(file)
        assert not network.uncovered
        assert (network.changes_of_precision > 0) == (each != "fp32")
        operators.append(Counter(operator.kernel for operator in network.operators))
    assert operators[0] == operators[1]
    prediction = predict_file("device", load_device("vpu"), network)
    assert f"{network.changes_of_precision} changes of precision, not priced" in prediction.note


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("quadranet-small", "proxyless-mobile", "quadranet-mobile", "quadranet-mobile-bn"),
        *("quadranet36-xxs", "quadranet-small-mixed"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_exported_network_takes_what_its_arch_takes(name: str, seed: int, file: Path) -> None:
    space = load_space(name)
    arch = sample_arch(space, np.random.default_rng(seed))
    check_export_equals_arch(space, arch, file, space.input.resolution_px)


# Kinds of operators in the published architectures, batch normalisation folded by the exporter.
TORCHVISION: dict[str, tuple[str, dict[str, int]]] = {
    "resnet18": (
        "ResNet18_Weights",
        {"conv": 20, "relu": 17, "add": 8, "maxpool": 1, "gap": 1, "linear": 1},
    ),
    "mobilenet_v2": (
        "MobileNet_V2_Weights",
        {"conv": 35, "dwconv": 17, "relu6": 35, "add": 10, "gap": 1, "linear": 1},
    ),
    # 9 of 11 blocks with squeeze and excite: pooling, two convolutions, hard sigmoid, product
    "mobilenet_v3_small": (
        "MobileNet_V3_Small_Weights",
        {
            "conv": 41,
            "dwconv": 11,
            "relu": 14,
            "hswish": 19,
            "hsigmoid": 9,
            "scale": 9,
            "add": 6,
            "gap": 10,
            "linear": 2,
        },
    ),
    # 16 units, 3 of them with a stride, which need no split
    "shufflenet_v2_x1_0": (
        "ShuffleNet_V2_X1_0_Weights",
        {
            "conv": 37,
            "dwconv": 19,
            "relu": 37,
            "concat": 16,
            "shuffle": 16,
            "split": 13,
            "maxpool": 1,
            "gap": 1,
            "linear": 1,
        },
    ),
}


def check_torchvision(name: str, found: OnnxNetwork) -> None:
    weights, expected = TORCHVISION[name]
    published = getattr(torchvision.models, weights).DEFAULT.meta["_ops"]  # in 10^9 multiply-adds
    assert found.macs / 1e9 == pytest.approx(published, abs=6e-4)
    assert Counter(kinds(found)) == expected
    for device in map(load_device, device_names()):
        rows = predict_onnx(device, found)
        assert min(row.latency_ms for row in rows) > 0
    edge = Counter(row.kernel.kind for row in predict_onnx(load_device("cortex-a76"), found))
    assert "relu" not in edge  # each follows a convolution or a sum


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_network_of_torchvision_has_its_published_operators(name: str, file: Path) -> None:
    network = getattr(torchvision.models, name)(weights=None).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the old exporter: free sizes, so that shapes are computed by operators in the graph
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        args = (torch.zeros(1, 3, 224, 224),)
        torch.onnx.export(network, args, str(file), input_names=["x"], dynamic_axes=axes, dynamo=False)
    check_torchvision(name, read_onnx(file, resolution_px=224))
    with pytest.raises(ArchError, match="height and width of the images are free: give a resolution in px"):
        read_onnx(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_both_exporters_of_torch_write_the_same_operators(name: str, file: Path) -> None:
    network = getattr(torchvision.models, name)(weights=None).eval()
    torch.onnx.export(network, (torch.zeros(1, 3, 224, 224),), str(file), dynamo=True, verbose=False)
    check_torchvision(name, read_onnx(file))


ROOT_HALF = number(math.sqrt(0.5))
CUBIC = number(0.044715)
ROOT_2_PI = number(math.sqrt(2 / math.pi))
COMPOSITIONS: dict[str, tuple[str, list[Step], dict[str, Any]]] = {
    "gelu, halved last": (
        "gelu",
        [
            ("Div", "x r", "a"),
            ("Erf", "a", "b"),
            ("Add", "b one", "c"),
            ("Mul", "x c", "d"),
            ("Mul", "d half", "y"),
        ],
        {"r": number(math.sqrt(2)), "one": number(1), "half": number(0.5)},
    ),
    "gelu, halved first": (
        "gelu",
        [
            ("Mul", "half x", "h"),
            ("Mul", "x r", "a"),
            ("Erf", "a", "b"),
            ("Add", "one b", "c"),
            ("Mul", "h c", "y"),
        ],
        {"r": ROOT_HALF, "one": number(1), "half": number(0.5)},
    ),
    "gelu with tanh": (
        "gelu",
        [
            ("Pow", "x three", "p"),
            ("Mul", "p k", "q"),
            ("Add", "x q", "s"),
            ("Mul", "s r", "t"),
            ("Tanh", "t", "u"),
            ("Add", "u one", "v"),
            ("Mul", "x v", "w"),
            ("Mul", "w half", "y"),
        ],
        {"three": number(3), "k": CUBIC, "r": ROOT_2_PI, "one": number(1), "half": number(0.5)},
    ),
    "swish": ("swish", [("Sigmoid", "x", "s"), ("Mul", "x s", "y")], {}),
    "quick gelu": (
        "swish",
        [("Mul", "x k", "t"), ("Sigmoid", "t", "s"), ("Mul", "s x", "y")],
        {"k": number(1.702)},
    ),
    "hswish with a clip": (
        "hswish",
        [
            ("Add", "x three", "a"),
            ("Clip", "a zero six", "b"),
            ("Mul", "x b", "c"),
            ("Div", "c six", "y"),
        ],
        {"three": number(3), "zero": number(0), "six": number(6)},
    ),
    "hswish with a hard sigmoid": (
        "hswish",
        [("HardSigmoid", "x", "s", {"alpha": 1 / 6, "beta": 0.5}), ("Mul", "s x", "y")],
        {},
    ),
    "hsigmoid": (
        "hsigmoid",
        [("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Div", "b six", "y")],
        {"three": number(3), "zero": number(0), "six": number(6)},
    ),
    "hsigmoid with its shift in the bias before": (
        "hsigmoid",
        [("Clip", "x zero six", "b"), ("Mul", "b sixth", "y")],
        {"zero": number(0), "six": number(6), "sixth": number(1 / 6)},
    ),
    "layernorm over the channels of a map": (
        "layernorm",
        [
            ("ReduceMean", "x one", "m"),
            ("Sub", "x m", "d"),
            ("Pow", "d two", "q"),
            ("ReduceMean", "q one", "v"),
            ("Sub", "x m", "e"),  # computed again, as by ConvNeXt's own module
            ("Add", "v eps", "w"),
            ("Sqrt", "w", "s"),
            ("Div", "e s", "n"),
            ("Mul", "gain n", "g"),
            ("Add", "g bias", "y"),
        ],
        {"one": [1], "two": number(2), "eps": number(1e-6), "gain": (4, 1, 1), "bias": (4, 1, 1)},
    ),
    "layernorm between transpositions": (
        "layernorm",
        [
            ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
            ("ReduceMean", "t last", "m"),
            ("Sub", "t m", "d"),
            ("Mul", "d d", "q"),
            ("ReduceMean", "q last", "v"),
            ("Add", "v eps", "w"),
            ("Sqrt", "w", "s"),
            ("Div", "d s", "n"),
            ("Mul", "n gain", "g"),
            ("Add", "g bias", "o"),
            ("Transpose", "o", "y", {"perm": [0, 3, 1, 2]}),
        ],
        {"last": [-1], "eps": number(1e-6), "gain": (4,), "bias": (4,)},
    ),
    "layernorm as one": (
        "layernorm",
        [
            ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
            ("LayerNormalization", "t gain bias", "o"),
            ("Transpose", "o", "y", {"perm": [0, 3, 1, 2]}),
        ],
        {"gain": (4,), "bias": (4,)},
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_is_what_it_computes(name: str, file: Path) -> None:
    kind, steps, weights = COMPOSITIONS[name]
    (operator,) = read_onnx(write(file, steps, weights=weights)).operators
    assert operator.kernel == Kernel(kind, 8, 4, 4)
    assert operator.status == "direct"


@pytest.mark.parametrize("change", ["other constant", "other reader", "output"])
def test_what_computes_something_else_stays_apart(change: str, file: Path) -> None:
    _, steps, weights = COMPOSITIONS["hswish with a clip"]
    if change == "other constant":
        weights = {**weights, "three": number(2)}
    elif change == "other reader":
        steps = [*steps[:-1], ("Div", "c six", "z"), ("Add", "z b", "y")]
    found = read_onnx(write(file, steps, weights=weights, output="c y" if change == "output" else "y"))
    assert "hswish" not in kinds(found)
    assert len(found.operators) >= 3


def test_a_norm_over_pixels_is_no_layer_norm(file: Path) -> None:
    _, steps, weights = COMPOSITIONS["layernorm over the channels of a map"]
    steps = [(op, inputs.replace("one", "axes"), *rest) for op, inputs, *rest in steps]
    found = read_onnx(write(file, steps, weights={**weights, "axes": [2, 3]}))
    assert "layernorm" not in kinds(found)


CONV: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def test_branches_that_run_in_turns_fuse_each_by_itself(file: Path) -> None:
    steps: list[Step] = [
        ("Conv", "x w", "a", CONV),
        ("Conv", "x w", "b", CONV),
        ("BatchNormalization", "a s s s s", "c"),
        ("BatchNormalization", "b s s s s", "d"),
        ("Relu", "c", "e"),
        ("Relu", "d", "f"),
        ("Add", "e f", "g"),
        ("Relu", "g", "y"),
    ]
    found = read_onnx(write(file, steps, weights={"w": (4, 4, 3, 3), "s": (4,)}))
    rows = predict_onnx(load_device("cortex-a76"), found)
    assert [(row.kernel.kind, row.name) for row in rows] == [
        ("conv", "a+c+e"),
        ("conv", "b+d+f"),
        ("addrelu", "g+y"),
    ]
    eager = predict_onnx(made_device("eager", conv=1, relu=1, add=1), found)
    assert [row.name for row in eager] == ["a+c", "e", "b+d", "f", "g", "y"]


@pytest.mark.parametrize("reader", ["another operator", "the output"])
def test_an_activation_stays_apart_from_a_convolution_that_others_read(reader: str, file: Path) -> None:
    steps: list[Step] = [("Conv", "x w", "a", CONV), ("Relu", "a", "b")]
    if reader == "another operator":
        steps.append(("Add", "a b", "y"))
    path = write(file, steps, weights={"w": (4, 4, 3, 3)}, output="a b" if reader == "the output" else "y")
    rows = predict_onnx(load_device("cortex-a76"), read_onnx(path))
    assert [row.kernel.kind for row in rows][:2] == ["conv", "relu"]


def test_chains_are_in_an_order_that_can_run(file: Path) -> None:
    steps: list[Step] = [
        ("Relu", "x", "a"),
        ("Sigmoid", "a", "p"),
        ("Exp", "a", "q"),
        ("Neg", "q", "r"),
        ("Add", "p r", "s"),
        ("Abs", "p", "t"),
        ("Add", "s t", "y"),
    ]
    found = read_onnx(write(file, steps))
    inputs = {outputs: inputs.split() for _, inputs, outputs in steps}
    done = {"x"}
    for operator in found.operators:
        assert set(inputs[operator.name]) <= done
        done.add(operator.name)
    assert done == {"x", *inputs}
    for chain in found.chains:
        for before, after in itertools.pairwise(chain):
            assert before.name in inputs[after.name]


def test_each_node_is_in_one_row(file: Path) -> None:
    steps: list[Step] = [
        ("Conv", "x w", "a", CONV),
        ("Add", "a gain", "b"),
        ("Sigmoid", "b", "c"),
        ("Mul", "b c", "d"),
        ("Conv", "d w", "e", CONV),
        ("Relu", "e", "f"),
        ("Add", "d f", "y"),
    ]
    path = write(file, steps, weights={"w": (4, 4, 3, 3), "gain": (4, 1, 1)})
    rows = predict_onnx(load_device("cortex-a76"), read_onnx(path))
    assert [row.name for row in rows] == ["a+b", "c+d", "e+f", "y"]


FREE: dict[str, tuple[list[Step], dict[str, Any]]] = {
    "identity": ([("Identity", "x", "y")], {}),
    "dropout": ([("Dropout", "x", "y")], {}),
    "flatten": ([("Flatten", "x", "y")], {}),
    "reshape": ([("Reshape", "x s", "y")], {"s": [1, -1]}),
    "squeeze": ([("Squeeze", "x a", "t"), ("Unsqueeze", "t a", "y")], {"a": [0]}),
    "cast to the same type": ([("Cast", "x", "y", {"to": TensorProto.FLOAT})], {}),
    "layout": ([("Transpose", "x", "y", {"perm": [0, 2, 3, 1]})], {}),
    "layout and back": (
        [("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}), ("Transpose", "t", "y", {"perm": [0, 3, 1, 2]})],
        {},
    ),
    "arithmetic on shapes": (
        [
            ("Shape", "x", "s"),
            ("Gather", "s zero", "n"),
            ("Unsqueeze", "n axis", "u"),
            ("Concat", "u rest", "t", {"axis": 0}),
            ("Reshape", "x t", "y"),
        ],
        {"zero": np.int64(0), "axis": [0], "rest": [-1]},
    ),
    "arithmetic on weights": (
        [("Transpose", "w", "v"), ("Mul", "v v", "u"), ("Identity", "x", "y")],
        {"w": (4, 8)},
    ),
    "what nobody reads": ([("Relu", "x", "z"), ("Identity", "x", "y")], {}),
}


@pytest.mark.parametrize("name", FREE)
def test_what_moves_no_data_is_no_operator(name: str, file: Path) -> None:
    steps, weights = FREE[name]
    found = read_onnx(write(file, [*steps, ("Relu", "y", "z_")], weights=weights, output="z_"))
    assert kinds(found) == ["relu"]


@pytest.mark.parametrize("perm", [[0, 1, 3, 2], [0, 3, 1, 2]])
def test_a_transposition_that_moves_data_is_counted(perm: list[int], file: Path) -> None:
    found = read_onnx(write(file, [("Transpose", "x", "y", {"perm": perm})]))
    assert kinds(found) == ["transpose"]


OPERATORS: dict[str, tuple[list[Step], dict[str, Any], Kernel, int]] = {
    "convolution": (
        [("Conv", "x w", "y", CONV)],
        {"w": (6, 4, 3, 3)},
        Kernel("conv", 8, 4, 6, 3),
        64 * 9 * 24,
    ),
    "strided": (
        [("Conv", "x w", "y", {**CONV, "strides": [2, 2]})],
        {"w": (6, 4, 3, 3)},
        Kernel("conv", 8, 4, 6, 3, 2),
        16 * 9 * 24,
    ),
    "not padded": (  # 6 x 6 out, which a padded convolution has of 6 x 6
        [("Conv", "x w", "y")],
        {"w": (6, 4, 3, 3)},
        Kernel("conv", 6, 4, 6, 3),
        36 * 9 * 24,
    ),
    "depthwise": (
        [("Conv", "x w", "y", {**CONV, "group": 4})],
        {"w": (4, 1, 3, 3)},
        Kernel("dwconv", 8, 4, 4, 3),
        64 * 9 * 4,
    ),
    "in groups": (
        [("Conv", "x w", "y", {**CONV, "group": 2})],
        {"w": (6, 2, 3, 3)},
        Kernel("gconv", 8, 4, 6, 3, groups=2),
        64 * 9 * 2 * 6,
    ),
    "kernel of 1 x 3": (
        [("Conv", "x w", "y", {"pads": [0, 1, 0, 1]})],
        {"w": (6, 4, 1, 3)},
        Kernel("conv", 8, 4, 6, 2),
        64 * 3 * 24,
    ),
    "transposed": (
        [("ConvTranspose", "x w", "y", {"strides": [2, 2]})],
        {"w": (4, 6, 2, 2)},
        Kernel("conv", 8, 4, 6, 2),
        64 * 4 * 24,
    ),
    "product of a map with itself": ([("Mul", "x x", "y")], {}, Kernel("square", 8, 4, 4), 0),
    "product of two views of a map": (
        [("Identity", "x", "i"), ("Mul", "x i", "y")],
        {},
        Kernel("square", 8, 4, 4),
        0,
    ),
    "power of two": ([("Pow", "x p", "y")], {"p": number(2)}, Kernel("square", 8, 4, 4), 0),
    "linear": (
        [("Flatten", "x", "f"), ("Gemm", "f w b", "y", {"transB": 1})],
        {"w": (10, 256), "b": (10,)},
        Kernel("linear", 1, 256, 10),
        2560,
    ),
    "linear with its bias behind": (
        [("Flatten", "x", "f"), ("MatMul", "f w", "m"), ("Add", "m b", "y")],
        {"w": (256, 10), "b": (10,)},
        Kernel("linear", 1, 256, 10),
        2560,
    ),
    "linear at every pixel": (
        [
            ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
            ("MatMul", "t w", "m"),
            ("Add", "m b", "a"),
            ("Transpose", "a", "y", {"perm": [0, 3, 1, 2]}),
        ],
        {"w": (4, 6), "b": (6,)},
        Kernel("conv", 8, 4, 6),
        64 * 24,
    ),
    "weights times columns": (
        [("Reshape", "x s", "t"), ("MatMul", "w t", "y")],
        {"s": [4, 64], "w": (6, 4)},
        Kernel("conv", 8, 4, 6),
        64 * 24,
    ),
    "product of two activations": (
        [("Reshape", "x s", "a"), ("Reshape", "x t", "b"), ("MatMul", "a b", "y")],
        {"s": [16, 16], "t": [16, 16]},
        Kernel("matmul", 4, 16, 16),
        16**3,
    ),
    "max pooling": (
        [("MaxPool", "x", "y", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]})],
        {},
        Kernel("maxpool", 8, 4, 4, 3, 2),
        0,
    ),
    "average pooling": (
        [("AveragePool", "x", "y", {"kernel_shape": [2, 2], "strides": [2, 2]})],
        {},
        Kernel("avgpool", 8, 4, 4, 2, 2),
        0,
    ),
    "mean of a map": (
        [("ReduceMean", "x a", "y", {"keepdims": 0})],
        {"a": [-1, -2]},
        Kernel("gap", 8, 4, 4),
        0,
    ),
    "global pooling": ([("GlobalAveragePool", "x", "y")], {}, Kernel("gap", 8, 4, 4), 0),
    "pooling of all": ([("AveragePool", "x", "y", {"kernel_shape": [8, 8]})], {}, Kernel("gap", 8, 4, 4), 0),
    "relu6": ([("Clip", "x lo hi", "y")], {"lo": number(0), "hi": number(6)}, Kernel("relu6", 8, 4, 4), 0),
    "clip": ([("Clip", "x lo hi", "y")], {"lo": number(-6), "hi": number(6)}, Kernel("clip", 8, 4, 4), 0),
    "product of maps": ([("Mul", "x w", "y")], {"w": (1, 4, 8, 8)}, Kernel("mul", 8, 4, 4), 0),
    "one factor a channel": ([("Mul", "x w", "y")], {"w": (4, 1, 1)}, Kernel("scale", 8, 4, 4), 0),
    "one factor": ([("Mul", "x w", "y")], {"w": number(2)}, Kernel("mul_scalar", 8, 4, 4), 0),
    "one divisor": ([("Div", "x w", "y")], {"w": number(2)}, Kernel("mul_scalar", 8, 4, 4), 0),
    "one summand": ([("Add", "x w", "y")], {"w": number(2)}, Kernel("add_scalar", 8, 4, 4), 0),
    "a map of summands": ([("Add", "x w", "y")], {"w": (1, 4, 8, 8)}, Kernel("add", 8, 4, 4), 0),
    "difference": ([("Sub", "x w", "y")], {"w": (1, 4, 8, 8)}, Kernel("sub", 8, 4, 4), 0),
    "concat": ([("Concat", "x x", "y", {"axis": 1})], {}, Kernel("concat", 8, 8, 8), 0),
    "shuffle": (
        [
            ("Reshape", "x five", "a"),
            ("Transpose", "a", "b", {"perm": [0, 2, 1, 3, 4]}),
            ("Reshape", "b four", "y"),
        ],
        {"five": [1, 2, 2, 8, 8], "four": [1, 4, 8, 8]},
        Kernel("shuffle", 8, 4, 2),
        0,
    ),
    "affine parts": (
        [("Conv", "x w", "a", CONV), ("Mul", "a s", "b"), ("Add", "b s", "y")],
        {"w": (4, 4, 3, 3), "s": (4, 1, 1)},
        Kernel("conv", 8, 4, 4, 3),
        64 * 9 * 16,
    ),
}
STAND_INS = ("in groups", "transposed", "product of two activations")


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_becomes_a_kernel_of_our_names(name: str, file: Path) -> None:
    steps, weights, kernel, macs = OPERATORS[name]
    (operator,) = read_onnx(write(file, steps, weights=weights)).operators
    assert operator.kernel == kernel
    assert operator.macs == macs
    assert operator.status == ("stand-in" if name in STAND_INS else "direct")


@pytest.mark.parametrize("slices", [False, True])
def test_a_split_is_one_pass_however_it_is_written(slices: bool, file: Path) -> None:
    split: list[Step] = [("Split", "x", "a b", {"axis": 1, "num_outputs": 2})]
    if slices:
        split = [("Slice", "x zero two one", "a"), ("Slice", "x two four one", "b")]
    path = write(
        file,
        [*split, ("Add", "a b", "y")],
        weights={"zero": [0], "one": [1], "two": [2], "four": [4]},
    )
    found = read_onnx(path)
    assert [o.kernel for o in found.operators] == [Kernel("split", 8, 4, 4), Kernel("add", 8, 2, 2)]


def test_a_map_that_is_no_square_is_taken_as_one_at_least_as_large(file: Path) -> None:
    path = write(file, [("Conv", "x w", "y", CONV)], shape=(1, 4, 5, 10), weights={"w": (6, 4, 3, 3)})
    found = read_onnx(path)
    (operator,) = found.operators
    assert (found.height_px, found.width_px) == (5, 10)
    assert operator.kernel.resolution_px == 8  # 64 pixels, the least square of 50 or more
    assert operator.macs == 50 * 9 * 24


def test_images_with_channels_last_are_the_same_network(file: Path) -> None:
    steps: list[Step] = [
        ("Transpose", "x", "t", {"perm": [0, 3, 1, 2]}),
        ("Conv", "t w", "c", CONV),
        ("Transpose", "c", "y", {"perm": [0, 2, 3, 1]}),
    ]
    found = read_onnx(write(file, steps, shape=("n", 8, 8, 3), weights={"w": (6, 3, 3, 3)}))
    assert (found.channels, found.height_px, found.width_px) == (3, 8, 8)
    assert [o.kernel for o in found.operators] == [Kernel("conv", 8, 3, 6, 3)]


def test_batch_normalisation_stays_where_no_convolution_is_before_it(file: Path) -> None:
    steps: list[Step] = [("Relu", "x", "a"), ("BatchNormalization", "a s s s s", "y")]
    found = read_onnx(write(file, steps, weights={"s": (4,)}))
    rows = predict_onnx(load_device("cortex-a76"), found)
    assert [row.kernel.kind for row in rows] == ["relu", "batchnorm"]


def test_an_unknown_operator_is_counted_and_priced_as_a_pass(file: Path) -> None:
    found = read_onnx(
        write(file, [("Conv", "x w", "a", CONV), ("Softmax", "a", "y")], weights={"w": (4, 4, 3, 3)})
    )
    assert found.uncovered == {"Softmax": 1}
    device = made_device(conv=3, add=1)
    convolution, unknown = predict_onnx(device, found)
    assert (convolution.kind, unknown.kind) == ("fitted", "uncovered")
    assert unknown.kernel == Kernel("elementwise", 8, 4, 4)
    assert unknown.latency_ms == device.kernel_ms(Kernel("add", 8, 4, 4)) > 0
    for fixed_ms in (0.0, 2.0):
        predicted = predict_file("device", device.model_copy(update={"fixed_ms": fixed_ms}), found)
        covered = fixed_ms + convolution.latency_ms
        assert predicted.coverage == pytest.approx(covered / (covered + unknown.latency_ms))


def test_a_power_other_than_a_square_is_unknown(file: Path) -> None:
    (operator,) = read_onnx(write(file, [("Pow", "x p", "y")], weights={"p": number(3)})).operators
    assert (operator.kernel.kind, operator.status) == ("elementwise", "uncovered")


def test_an_unknown_reduction_costs_what_it_reads(file: Path) -> None:
    (operator,) = read_onnx(write(file, [("ReduceMax", "x a", "y")], weights={"a": [1, 2, 3]})).operators
    assert operator.kernel == Kernel("elementwise", 8, 4, 4)
    assert operator.status == "uncovered"


def test_a_mean_of_anything_but_all_pixels_is_no_global_pooling(file: Path) -> None:
    for axes in ([1], [2], [1, 2, 3]):
        found = read_onnx(write(file, [("ReduceMean", "x a", "y")], weights={"a": axes}))
        assert found.uncovered == {"ReduceMean": 1}


def test_a_kind_that_a_device_lacks_is_uncovered_there(file: Path) -> None:
    found = read_onnx(write(file, [("Sigmoid", "x", "s"), ("Mul", "x s", "y")]))
    device = made_device(add=1)
    (row,) = predict_onnx(device, found)
    assert (row.kernel.kind, row.kind) == ("swish", "uncovered")
    assert row.latency_ms == device.kernel_ms(Kernel("add", 8, 4, 4))
    assert not found.uncovered


def test_a_product_of_activations_costs_its_multiply_adds_and_is_an_estimate(file: Path) -> None:
    steps, weights, *_ = OPERATORS["product of two activations"]
    device = made_device(add=1, conv1x1=2)
    (row,) = predict_onnx(device, read_onnx(write(file, steps, weights=weights)))
    assert row.kind == "estimated"
    assert row.latency_ms == pytest.approx(2 + 0.2 * 16**3 / 1e6)


def test_a_stand_in_is_an_estimate(file: Path) -> None:
    steps, weights, *_ = OPERATORS["in groups"]
    (row,) = predict_onnx(made_device(add=1, conv=1), read_onnx(write(file, steps, weights=weights)))
    assert row.kernel == Kernel("conv", 8, 2, 6, 3)  # of one group
    assert row.kind == "estimated"


def test_a_device_that_knows_grouped_convolutions_prices_them_itself(file: Path) -> None:
    steps, weights, *_ = OPERATORS["in groups"]
    found, device = read_onnx(write(file, steps, weights=weights)), made_device(add=1, conv=1, gconv=5)
    (row,) = predict_onnx(device, found)
    assert row.kernel == Kernel("gconv", 8, 4, 6, 3, groups=2)
    assert row.kind != "estimated"
    assert predict_file("device", device, found).note == ""
    assert "Conv (1)" in predict_file("device", made_device(add=1, conv=1), found).note


def test_a_device_without_a_model_is_refused(file: Path) -> None:
    found = read_onnx(write(file, [("Relu", "x", "y")]))
    with pytest.raises(TableError, match="device made has no model"):
        predict_onnx(made_device(), found)


def test_reading_needs_neither_torch_nor_onnxruntime(file: Path) -> None:
    _, steps, weights = COMPOSITIONS["gelu, halved last"]
    write(file, steps, weights=weights)
    code = (
        "import sys; from pathlib import Path; from qnas.latency.onnx.networks import read_onnx; "
        "read_onnx(Path(sys.argv[1])); assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_number_may_become_a_map(file: Path) -> None:
    steps = [
        ("ReduceMean", "x", "m", {"keepdims": 0}),
        ("Reshape", "m s", "r"),
        ("Relu", "r", "y"),
    ]
    network = read_onnx(write(file, steps, weights={"s": np.array([1, 1, 1, 1])}))
    assert kinds(network) == ["elementwise", "relu"]


@pytest.mark.parametrize(
    ("share", "bias", "kind"),
    [(1 / 4, [1e-6], "layernorm"), (1 / 3, [1e-6], "conv"), (1 / 4, None, "layernorm")],
)
def test_a_mean_over_channels_may_be_a_convolution(
    share: float, bias: list[float] | None, kind: str, file: Path
) -> None:
    steps = [
        ("Conv", "x w", "m"),
        ("Sub", "x m", "d"),
        ("Mul", "d d", "s"),
        ("Conv", "s w b" if bias else "s w", "v"),
        ("Pow", "v p", "r"),
        ("Mul", "d r", "y"),
    ]
    weights = {"w": np.full((1, 4, 1, 1), share, np.float32), "p": number(-0.5)}
    if bias:
        weights["b"] = np.array(bias, np.float32)
    assert kinds(read_onnx(write(file, steps, weights=weights)))[0] == kind
