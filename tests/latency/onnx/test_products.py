import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.onnx_graphs import graph_model, node, ones, whole
from onnx import TensorProto, helper

from qnas.common.errors import ArchError, TableError
from qnas.latency.device import Device, device_names, load_device, parse_device
from qnas.latency.kernels import Kernel
from qnas.latency.onnx.graph_file import read_graph
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import predict_file, predict_onnx


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def read(
    file: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Any],
    *,
    shape: Sequence[int] = (1, 4, 8, 8),
    stated: Mapping[str, Sequence[int]] | None = None,
    domains: Sequence[str] = (),
) -> OnnxNetwork:
    """Read a graph; weights are shapes, with a type where it is not float."""
    constants = [
        whole(name, *value) if isinstance(value, list) else ones(name, *value[0], dtype=value[1])
        for name, value in (
            (n, v if isinstance(v, list) or (v and isinstance(v[0], tuple)) else (v, np.float32))
            for n, v in weights.items()
        )
    ]
    model = graph_model(nodes, constants, shape=shape, domains=domains)
    for name, sizes in (stated or {}).items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    file.write_bytes(model.SerializeToString())
    return read_onnx(file)


def done(kernel: Kernel) -> int:
    """Return the multiply-adds that a kernel is priced by."""
    return kernel.rows * kernel.kernel**2 * (1 if kernel.kind == "dwconv" else kernel.c_in) * kernel.c_out


def to_uint8(name: str) -> list[onnx.NodeProto]:
    return [node("DynamicQuantizeLinear", ["x"], [name, "s", "z"])]


TOKENS = node("Reshape", ["x", "rows"], ["t"])  # (1, 64, 4)
ROWS = {"rows": [1, 64, 4]}
U8 = np.uint8
# nodes, weights, multiply-adds by the definition of the operator
PRODUCTS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], int]] = {
    "LSTM": (
        [TOKENS, node("LSTM", ["t", "w", "r"], ["y"], hidden_size=5)],
        {**ROWS, "w": (1, 20, 4), "r": (1, 20, 5)},
        64 * 4 * 5 * (4 + 5),
    ),
    "LSTM, of which only the last state is read": (
        [TOKENS, node("LSTM", ["t", "w", "r"], ["", "y"], hidden_size=5)],
        {**ROWS, "w": (1, 20, 4), "r": (1, 20, 5)},
        64 * 4 * 5 * (4 + 5),
    ),
    "LSTM in both directions": (
        [TOKENS, node("LSTM", ["t", "w", "r"], ["y"], hidden_size=5, direction="bidirectional")],
        {**ROWS, "w": (2, 20, 4), "r": (2, 20, 5)},
        2 * 64 * 4 * 5 * (4 + 5),
    ),
    "GRU": (
        [TOKENS, node("GRU", ["t", "w", "r"], ["y"], hidden_size=5)],
        {**ROWS, "w": (1, 15, 4), "r": (1, 15, 5)},
        64 * 3 * 5 * (4 + 5),
    ),
    "RNN": (
        [TOKENS, node("RNN", ["t", "w", "r"], ["y"], hidden_size=5)],
        {**ROWS, "w": (1, 5, 4), "r": (1, 5, 5)},
        64 * 5 * (4 + 5),
    ),
    "Attention of rows": (
        [TOKENS, node("Attention", ["t", "t", "t"], ["y"], q_num_heads=2, kv_num_heads=2)],
        ROWS,
        64 * 64 * (4 + 4),
    ),
    "Attention of heads": ([node("Attention", ["x", "x", "x"], ["y"])], {}, 4 * 8 * 8 * (8 + 8)),
    "Attention with fewer heads of keys": (
        [TOKENS, node("Attention", ["t", "k", "v"], ["y"], q_num_heads=2, kv_num_heads=1)],
        {**ROWS, "k": (1, 30, 2), "v": (1, 30, 7)},
        2 * 64 * 30 * (2 + 7),
    ),
    "MatMulInteger": (
        [*to_uint8("q"), node("MatMulInteger", ["q", "w"], ["y"])],
        {"w": ((8, 16), U8)},
        4 * 8 * 8 * 16,
    ),
    "QLinearMatMul": (
        [*to_uint8("q"), node("QLinearMatMul", ["q", "s", "z", "w", "s", "z", "s", "z"], ["y"])],
        {"w": ((8, 16), U8)},
        4 * 8 * 8 * 16,
    ),
    "ConvInteger": (
        [*to_uint8("q"), node("ConvInteger", ["q", "w"], ["y"])],
        {"w": ((6, 4, 3, 3), U8)},
        36 * 6 * 4 * 9,
    ),
    "QLinearConv": (
        [
            *to_uint8("q"),
            node("QLinearConv", ["q", "s", "z", "w", "s", "z", "s", "z"], ["y"], strides=[2, 2]),
        ],
        {"w": ((6, 4, 2, 2), U8)},
        16 * 6 * 4 * 4,
    ),
    "DeformConv": (
        [node("DeformConv", ["x", "w", "o"], ["y"])],
        {"w": (6, 4, 3, 3), "o": (1, 18, 6, 6)},
        36 * 6 * 4 * 9,
    ),
    "ConvTranspose in groups": (
        [node("ConvTranspose", ["x", "w"], ["y"], group=2, strides=[2, 2])],
        {"w": (4, 3, 2, 2)},
        64 * 4 * 3 * 4,
    ),
    "ConvTranspose of weights that are computed": (
        [node("Reshape", ["x", "s"], ["w"]), node("ConvTranspose", ["x", "w"], ["y"])],
        {"s": [4, 4, 4, 4]},
        64 * 4 * 4 * 16,
    ),
    "Conv of weights that are computed": (
        [node("Reshape", ["x", "s"], ["w"]), node("Conv", ["x", "w"], ["y"])],
        {"s": [4, 4, 4, 4]},
        25 * 4 * 4 * 16,
    ),
    "Conv of lines": (
        [node("Reshape", ["x", "s"], ["l"]), node("Conv", ["l", "w"], ["y"], strides=[3])],
        {"s": [1, 4, 64], "w": (6, 4, 5)},
        20 * 6 * 4 * 5,
    ),
    "Conv of volumes": (
        [node("Reshape", ["x", "s"], ["l"]), node("Conv", ["l", "w"], ["y"])],
        {"s": [1, 4, 4, 4, 4], "w": (6, 4, 2, 3, 2)},
        3 * 2 * 3 * 6 * 4 * 12,
    ),
    "Gemm of both transposed": (
        [node("Reshape", ["x", "s"], ["a"]), node("Gemm", ["a", "w"], ["y"], transA=1, transB=1)],
        {"s": [16, 16], "w": (9, 16)},
        16 * 16 * 9,
    ),
    "Gemm of the image with itself": (
        [node("Reshape", ["x", "s"], ["a"]), node("Gemm", ["a", "a"], ["y"], transA=1)],
        {"s": [32, 8]},
        8 * 8 * 32,
    ),
    "MatMul of a row": (
        [node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "w"], ["y"])],
        {"s": [256], "w": (256, 7)},
        256 * 7,
    ),
    "MatMul of two rows": (
        [node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "a"], ["y"])],
        {"s": [256]},
        256,
    ),
    "MatMul of a batch": ([node("MatMul", ["x", "w"], ["y"])], {"w": (1, 4, 8, 5)}, 4 * 8 * 8 * 5),
    "MatMul of weights by a batch": ([node("MatMul", ["w", "x"], ["y"])], {"w": (5, 8)}, 4 * 5 * 8 * 8),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_priced_by_its_multiply_adds(name: str, file: Path) -> None:
    nodes, weights, macs = PRODUCTS[name]
    found = read(file, nodes, weights)
    assert found.macs == macs
    (product,) = [operator for operator in found.operators if operator.macs]
    assert macs <= done(product.kernel)
    rows = predict_onnx(load_device("cpu"), found)
    (row,) = [row for row in rows if row.name == product.name]
    assert row.latency_ms > 0
    if name.split()[0] not in ("Conv", "Gemm", "MatMul"):
        assert product.status == "stand-in"
        assert row.kind == "estimated"
        prediction = predict_file("device", load_device("cpu"), found)
        assert f"estimated, each priced by its multiply-adds: {product.op} (1)" in prediction.note
        assert prediction.coverage < 1


EINSUMS: list[tuple[str, list[tuple[int, ...]], tuple[int, ...]]] = [
    ("bld,de->ble", [(1, 4, 8), (8, 5)], (1, 4, 5)),
    ("bld, de", [(1, 4, 8), (8, 5)], (1, 5, 4)),  # in the order of the alphabet
    ("bhqd,bhkd->bhqk", [(1, 4, 8, 8), (1, 4, 6, 8)], (1, 4, 8, 6)),
    ("...ij,...jk->...ik", [(1, 4, 8, 8), (4, 8, 3)], (1, 4, 8, 3)),
    ("...ij,jk->...ik", [(1, 4, 8, 8), (8, 3)], (1, 4, 8, 3)),
    ("bcij,bcij->bc", [(1, 4, 8, 8), (1, 4, 8, 8)], (1, 4)),
    ("ij,jk,kl->il", [(4, 64), (64, 3), (3, 2)], (4, 2)),
    ("ij,ij->", [(4, 64), (4, 64)], ()),
]


@pytest.mark.parametrize(("equation", "shapes", "output"), EINSUMS)
def test_an_einsum_has_a_multiply_add_for_each_index(
    equation: str, shapes: list[tuple[int, ...]], output: tuple[int, ...], file: Path
) -> None:
    names = ["a", *(f"w{i}" for i in range(1, len(shapes)))]
    nodes = [node("Reshape", ["x", "s"], ["a"]), node("Einsum", names, ["y"], equation=equation)]
    weights: dict[str, Any] = dict(zip(names[1:], shapes[1:], strict=True))
    size = math.prod(shapes[0])
    found = read(file, nodes, {"s": list(shapes[0]), **weights}, shape=(1, 1, size // 4, 4))
    assert read_graph(file).shapes["y"] == output
    letters: dict[str, int] = {}
    for term, shape in zip(equation.partition("->")[0].replace(" ", "").split(","), shapes, strict=True):
        dots = "AB"[2 - len(shape) + len(term.replace("...", "")) :] if "..." in term else ""
        letters.update(zip(term.replace("...", dots), shape, strict=True))
    combinations = len(list(itertools.product(*map(range, letters.values()))))
    assert found.macs == combinations * (len(shapes) - 1)
    (operator,) = found.operators
    assert done(operator.kernel) >= found.macs
    assert found.stand_ins == {"Einsum": 1}


@pytest.mark.parametrize("equation", ["bcij->bcji", "bcij->bc", "bcij,bcij->bcij"])
def test_an_einsum_without_products_that_are_summed_is_a_pass(equation: str, file: Path) -> None:
    inputs = ["x"] * (1 + equation.count(","))
    found = read(file, [node("Einsum", inputs, ["y"], equation=equation)], {})
    assert found.macs == 0
    assert found.uncovered == {"Einsum": 1}


# onnx's own inference does not end for the dots
@pytest.mark.parametrize(
    "equation",
    [
        *(
            "ij->ij",
            "bcij,bcij->bcij",
            "b-ij->bij",
            "",
            "......->...",
            "...->......",
            "..",
            "....",
            "->",
            ",",
        ),
        *(",", "bcij->bcii", "bcij->k", "bcijk", "bcij->bcij->bcij", "b\u00e9ij", "bcij...k"),
    ],
)
def test_an_einsum_that_does_not_fit_its_inputs_is_refused(equation: str, file: Path) -> None:
    with pytest.raises(ArchError, match="not a valid ONNX graph: "):
        read(file, [node("Einsum", ["x"], ["y"], equation=equation)], {}, stated={"y": (1, 4, 8, 8)})


MISFITS: dict[str, tuple[onnx.NodeProto, dict[str, Any]]] = {
    "ConvTranspose": (node("ConvTranspose", ["x", "w"], ["y"]), {"w": (5, 4, 1, 1)}),
    "MatMul": (node("MatMul", ["x", "w"], ["y"]), {"w": (9, 3)}),
    "Gemm": (node("Gemm", ["r", "w"], ["y"]), {"w": (9, 3)}),
    "LSTM": (node("LSTM", ["t", "w", "h"], ["y"], hidden_size=5), {"w": (1, 20, 9), "h": (1, 20, 5)}),
}


@pytest.mark.parametrize("op", MISFITS)
def test_weights_for_other_channels_are_refused(op: str, file: Path) -> None:
    last, weights = MISFITS[op]
    rows = [node("Reshape", ["x", "s"], ["r"]), node("Reshape", ["x", "rows"], ["t"])]
    with pytest.raises(ArchError, match="not a valid ONNX graph"):
        read(file, [*rows, last], {"s": [64, 4], **ROWS, **weights})


def test_large_products_take_longer_than_small_ones(file: Path) -> None:
    # an einsum of 205 million multiply-adds was once priced as a pass, at 0.08 ms
    def latency_ms(columns: int, device: str) -> float:
        nodes = [
            node("Reshape", ["x", "rows"], ["a"]),
            node("Einsum", ["a", "w"], ["y"], equation="bld,de->ble"),
        ]
        found = read(file, nodes, {"rows": [1, 49, 1024], "w": (1024, columns)}, shape=(1, 1, 224, 224))
        return predict_file("device", load_device(device), found).latency_ms

    for device in device_names():
        assert latency_ms(4096, device) > 1.5 * latency_ms(512, device)


@pytest.mark.parametrize(
    ("op", "domain"),
    [("Det", ""), ("Attention", "com.microsoft"), ("Conv", "my.own"), ("Scaler", "ai.onnx.ml")],
)
def test_there_is_no_total_with_an_operator_of_unknown_work(op: str, domain: str, file: Path) -> None:
    last = node(op, ["x"], ["a"], domain=domain)
    shape = {"a": (1, 4, 8, 8)} if op != "Det" else {}
    with pytest.raises(ArchError) as caught:
        read(
            file,
            [last, node("Relu", ["a"], ["y"])],
            {},
            stated=shape,
            shape=(1, 4, 8, 8),
            domains=[domain] if domain else [],
        )
    name = f"{domain}.{op}" if domain else op
    assert str(caught.value) == (
        f"{file}: no total: these operators are not known, so they have no price: {name} (1)"
    )


@pytest.mark.parametrize("op", ["Flatten", "Identity"])
def test_a_graph_without_layers_is_refused(op: str, file: Path) -> None:
    with pytest.raises(ArchError, match="no layers that compute, expected a network of images"):
        read(file, [node(op, ["x"], ["y"])], {})
    with pytest.raises(ArchError, match="no layers that compute"):
        read(file, [node("Relu", ["x"], ["a"]), node(op, ["w"], ["y"])], {"w": (2, 3)})


def made_device(**launch_ms: float) -> Device:
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
        "fusion": "edge",
        "model": {
            kind: {"kind": "fitted", "terms": {"launch": ms, "mmacs": 1}} for kind, ms in launch_ms.items()
        },
    }
    return parse_device(json.dumps(content), "made")


@pytest.mark.parametrize("known", ["conv1x1", "conv", "linear"])
@pytest.mark.parametrize("name", ["Attention of heads", "Conv of weights that are computed", "DeformConv"])
def test_a_device_prices_a_product_that_it_lacks_by_its_multiply_adds(
    name: str, known: str, file: Path
) -> None:
    nodes, weights, macs = PRODUCTS[name]
    found = read(file, nodes, weights)
    (operator,) = found.operators
    (row,) = predict_onnx(made_device(add=1, **{known: 2}), found)
    assert row.latency_ms == pytest.approx(2 + done(operator.kernel) / 1e6)
    assert done(operator.kernel) >= macs
    assert row.kind == "estimated" or known == "conv"


def test_a_device_without_any_product_has_no_price_for_one(file: Path) -> None:
    nodes, weights, _ = PRODUCTS["Attention of heads"]
    with pytest.raises(TableError, match="device made has no cost for"):
        predict_onnx(made_device(add=1, elementwise=1, dwconv=1), read(file, nodes, weights))


def test_a_network_that_takes_nothing_has_no_shares(file: Path) -> None:
    found = read(file, [node("Relu", ["x"], ["y"])], {})
    free = load_device("cpu").model_copy(update={"fixed_ms": 0.0}).with_functions(kernel=lambda _: 0.0)
    with pytest.raises(TableError, match=r"net\.onnx takes 0\.0 ms in all, expected more than 0"):
        predict_file("device", free, found)
