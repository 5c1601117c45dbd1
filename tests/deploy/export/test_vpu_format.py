"""Files for the Myriad X: what their graph consists of, what stands beside them, and that they compile.

Without the compiler (`qnas doctor` says how to get it), the tests that compile are skipped.
"""

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.exported import PX, digits, neural_space, trained, wired_product
from onnx import TensorProto, helper
from torch import nn

from qnas.common.errors import ExportError, UsageError
from qnas.deploy.export import openvino_format, vpu_format
from qnas.deploy.export.formats import FORMATS, check_request, export_files
from qnas.deploy.export.lowering import MYRIAD
from qnas.deploy.export.myriad_compiler import HOW_TO_GET, PROGRAM, VARIABLE, compile_blob, find_compiler
from qnas.deploy.export.product import Product, Variant
from qnas.deploy.export.tracing import trace_onnx
from qnas.deploy.export.vpu_format import REFUSED, check_graph
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch, sample_arch
from qnas.spaces.space import load_space

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason=f"no {PROGRAM}; to get it: {HOW_TO_GET}")
FIXED = (1, 3, PX, PX)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")


def graph(*nodes: onnx.NodeProto, opset: int = 13, batch: int | str = 1, **constants: Any) -> onnx.ModelProto:
    """Return a graph `images` -> `logits` of these nodes."""
    shape = [batch, *FIXED[1:]]
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "graph",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
            [onnx.numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    model.ir_version = 7
    return model


RELU = helper.make_node("Relu", ["images"], ["logits"])


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_a_file_has_only_operators_and_sizes_for_the_device(norm: str, tmp_path: Path) -> None:
    path = tmp_path / "model_vpu.onnx"
    vpu_format.write(trained(norm), Variant(), path, "file")
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 13)]
    assert model.ir_version == 7
    (given,), (got,) = model.graph.input, model.graph.output
    sizes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in (given, got)]
    assert sizes == [[1, 3, PX, PX], [1, 10]]
    known = {"Conv", "Mul", "Add", "Sub", "Pow", "Erf", "Clip", "ReduceMean", "Gemm"}
    assert {node.op_type for node in model.graph.node} <= known
    said = check_graph(model, "file")
    assert said.startswith("opset 13, of fixed sizes, in operators that the Myriad X runs: Add, ")


def test_a_mean_over_the_channels_of_a_map_is_a_convolution(tmp_path: Path) -> None:
    # the compiler makes a pooling of a mean, which it does not place in memory for maps of 56 px
    path = tmp_path / "model_vpu.onnx"
    vpu_format.write(trained(), Variant(), path, "file")
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*model.graph.value_info, *model.graph.input)}
    axes = {node.input[0]: node.attribute for node in model.graph.node if node.op_type == "ReduceMean"}
    over_maps = [
        list(a.ints) for name, given in axes.items() if ranks[name] == 4 for a in given if a.name == "axes"
    ]
    assert over_maps == [[2, 3]]  # of the global pooling


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (graph(RELU, opset=14), "opset 14, IR version 7: expected opset 13, IR version 7"),
        (graph(RELU, batch="batch"), "images has no fixed size, which the Myriad X needs"),
        (
            graph(helper.make_node("Pow", ["images", "two"], ["logits"]), two=2),
            r"the Myriad X does not run Pow by 2 \(x \* x is the same\)",
        ),
        (
            graph(
                helper.make_node("QuantizeLinear", ["images", "scale"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "scale"], ["logits"]),
                scale=0.1,
            ),
            "the Myriad X does not run DequantizeLinear, QuantizeLinear",
        ),
        *(
            (graph(helper.make_node(kind, ["images"], ["logits"])), f"the Myriad X does not run {kind}")
            for kind in sorted(REFUSED)
        ),
    ],
)
def test_a_graph_that_the_device_does_not_run_is_refused(given: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=f"^file: not written: {message}$"):
        check_graph(given, "file")


def test_other_powers_and_operators_pass() -> None:
    root = graph(helper.make_node("Pow", ["images", "half"], ["logits"]), half=-0.5)
    assert check_graph(root, "file").endswith(": Pow")
    newer = graph(RELU)
    newer.ir_version = 8
    with pytest.raises(ExportError, match="IR version 8: expected"):
        check_graph(newer, "file")


def test_only_single_precision_one_image_and_its_own_opset() -> None:
    for precision in ("fp16", "int8", "int8-dynamic"):
        with pytest.raises(UsageError, match=f"format vpu has no {precision}: take fp32, or the format "):
            check_request(["vpu"], precision)
    with pytest.raises(UsageError, match="`batch=4`: files of the format vpu take a batch of 1"):
        check_request(["vpu"], "fp32", 4)
    assert check_request(["vpu"], "fp32", 1) == "fp32"
    with pytest.raises(UsageError, match="`opset=17`: the format vpu is ONNX of opset 13"):
        vpu_format.write(trained(), Variant(opset=17), Path("nowhere"), "file")


def test_a_compiler_that_is_none_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(Path(__file__)))
    with pytest.raises(UsageError, match="no program that may be run"):
        check_request(["vpu"], "fp32")


def test_without_tools_the_onnx_file_stands_alone_and_says_so(
    tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (done,) = export_files(trained(), ["vpu"], Variant(), tmp_path, digits(20))
    assert done.files == ("model_vpu.onnx",)
    assert (done.batch, done.precision) == (1, "fp32")
    halves, operators, ir, blob = done.checks
    assert halves.startswith("emulated in half precision on 20 images")
    assert operators.startswith("opset 13")
    assert ir == "no IR beside it: openvino is not installed (pip install openvino)"
    assert blob == "not compiled for the Myriad X: no myriad_compile here (qnas doctor says how to get it)"


Compiler = Callable[[str], None]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Return what puts a program in Python in the compiler's place."""

    def place(body: str) -> None:
        path = tmp_path / "libs" / PROGRAM
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv(VARIABLE, str(path))

    return place


def test_a_blob_stands_beside_the_file_where_there_is_a_compiler(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    compiler("if sys.argv[1] != '-h': open(sys.argv[4], 'wb').write(open(sys.argv[2], 'rb').read()[:20000])")
    out = tmp_path / "out"
    out.mkdir()
    (done,) = export_files(trained(), ["vpu"], Variant(), out, digits(20))
    assert done.files == ("model_vpu.onnx", "model_vpu.blob")
    assert (out / "model_vpu.blob").read_bytes() == (out / "model_vpu.onnx").read_bytes()[:20000]
    assert re.fullmatch(
        r"compiled for the Myriad X by myriad_compile .*, a blob of 0.02 MB; not run on one", done.checks[-1]
    )
    compiler("sys.exit('Unsupported operation: MVN')")
    with pytest.raises(
        ExportError, match=r"model_vpu\.onnx: not written: myriad_compile refuses it: Unsupported"
    ):
        export_files(trained(), ["vpu"], Variant(), out, digits(20))


@needs_openvino
def test_the_ir_beside_it_is_one_for_openvino_2021(tmp_path: Path, no_compiler: None) -> None:
    (done,) = export_files(trained(), ["vpu"], Variant(), tmp_path, digits(20))
    assert done.files == ("model_vpu.onnx", "model_vpu.xml", "model_vpu.bin")
    text = (tmp_path / "model_vpu.xml").read_text(encoding="utf-8")
    assert re.search(r'<net name="\w+" version="10">', text)
    layers = re.findall(r'<layer [^>]*type="(\w+)" version="opset(\d+)"', text)
    assert len(layers) > 20
    assert max(int(opset) for _, opset in layers) <= 7
    assert "MVN" not in {kind for kind, _ in layers}
    images = digits(30)
    run = openvino_format.load(tmp_path / "model_vpu.xml")
    with torch.no_grad():
        expected = trained().network(images.take(range(30)))
    got = torch.cat([run(images.take([place])) for place in range(30)])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_openvino
def test_an_ir_that_needs_newer_operators_is_left_out(tmp_path: Path, no_compiler: None) -> None:
    class Pooled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = nn.functional.max_pool2d(x, 1)  # of opset 14 in today's OpenVINO
            return y

    network = nn.Sequential(Pooled(), trained().network).eval()
    (done,) = export_files(replace(trained(), network=network), ["vpu"], Variant(), tmp_path, digits(10))
    assert done.files == ("model_vpu.onnx",)
    assert re.match(
        r"no IR beside it: OpenVINO 2021 and the Myriad X do not have MaxPool of opset\d+", done.checks[2]
    )
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".onnx"]


@needs_openvino
def test_an_ir_of_another_network_is_refused(
    tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = openvino_format.load
    monkeypatch.setattr(openvino_format, "load", lambda path: lambda images: 1.1 * right(path)(images))
    with pytest.raises(ExportError, match=r"model_vpu\.xml: not written: .* differ from torch's"):
        export_files(trained(), ["vpu"], Variant(), tmp_path, digits(10))


def test_a_network_that_overflows_in_halves_is_refused_for_the_device(
    tmp_path: Path, no_compiler: None
) -> None:
    product = overflowing()
    assert export_files(product, ["standalone"], Variant(), tmp_path, digits(10))  # in single precision
    with pytest.raises(
        ExportError, match=r"model_vpu\.onnx: not written: with real images 1_1\.mixer: product"
    ):
        export_files(product, ["vpu"], Variant(), tmp_path, digits(10))


def overflowing() -> Product:
    """Return the trained network with large factors of a product, and a small part of it afterwards."""
    product = trained()
    network = build_like(product)
    mixer = network.get_submodule("1_1")
    with torch.no_grad():
        for name in ("conv_a", "conv_b"):
            mixer.get_submodule(name).get_parameter("weight").mul_(1000)
    return replace(product, network=network.eval())


def build_like(product: Product) -> nn.Module:
    import copy

    return copy.deepcopy(product.network)


# what the device's own compiler says


def compiled(network: nn.Module, px: int, folder: Path) -> int:
    """Compile a network for the device; return the bytes of the blob."""
    compiler = find_compiler()
    assert compiler is not None
    model = trace_onnx(network.eval(), (3, px, px), "file", batch=1, forms=MYRIAD, opset=13)
    path = folder / "model.onnx"
    onnx.save(model, path)
    compile_blob(compiler, path, folder / "model.blob", "file")
    return (folder / "model.blob").stat().st_size


@needs_compiler
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_a_block_of_every_neuron_compiles(norm: str, tmp_path: Path) -> None:
    space = neural_space(norm)
    arch = Arch(tuple(p.names[i] for i, p in enumerate(space.positions)))
    assert compiled(build_subnet(space, arch, 10), 32, tmp_path) > 10_000


@needs_compiler
def test_blocks_that_are_no_chains_compile(tmp_path: Path) -> None:
    for activation in ("relu6", "hswish"):
        product, _, _ = wired_product(activation)
        assert compiled(product.network, 32, tmp_path) > 10_000


@needs_compiler
@needs_openvino
def test_the_ir_and_the_blob_of_a_trained_network_compile(tmp_path: Path) -> None:
    (done,) = export_files(trained(), ["vpu"], Variant(), tmp_path, digits(20))
    assert done.files == tuple(f"model_vpu.{ending}" for ending in ("onnx", "xml", "bin", "blob"))
    assert done.checks[2].endswith("; myriad_compile takes it")
    assert "by myriad_compile 2021.3.0, a blob of " in done.checks[3]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "space",
    [
        *("quadranet-mobile", "quadranet-mobile-bn", "proxyless-mobile", "quadranet-small"),
        *("quadranet-small-mixed", "quadranet36-xxs", "union-mobile"),
    ],
)
def test_networks_of_every_kind_of_space_compile_at_full_size(space: str, tmp_path: Path) -> None:
    found = load_space(space)
    torch.manual_seed(0)
    network = build_subnet(found, sample_arch(found, np.random.default_rng(0)), 1000)
    assert compiled(network, 224, tmp_path) > 500_000


@needs_compiler
def test_the_compiler_refuses_the_norm_as_a_mean_of_a_map_of_56_px(tmp_path: Path) -> None:
    """A reminder to take the simpler form, should a compiler ever take it."""
    from qnas.deploy.export.lowering import ARITHMETIC
    from qnas.nn.blocks import ChannelLayerNorm

    network = nn.Sequential(
        nn.Conv2d(3, 64, 1), ChannelLayerNorm(64), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = trace_onnx(network.eval(), (3, 56, 56), "file", batch=1, forms=ARITHMETIC, opset=13)
    onnx.save(model, tmp_path / "model.onnx")
    compiler = find_compiler()
    assert compiler is not None
    with pytest.raises(ExportError, match=r"Memory allocation failed: .* AvgPool"):
        compile_blob(compiler, tmp_path / "model.onnx", tmp_path / "model.blob", "file")
    assert compiled(network, 56, tmp_path) > 1000
    assert FORMATS["vpu"].in_halves
