"""Modules as calls: the outputs are the module's, and errors are raised before timing."""

import copy
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.onnx_graphs import graph_model, nested_functions
from helpers.places import ROOT
from torch import nn

from qnas.common.errors import UsageError
from qnas.deploy.export.folding import fold_norms
from qnas.deploy.runtimes import RUNTIMES, event_stopwatch, onnx_session, open_runtime, openvino_session
from qnas.deploy.timing import Call, sample_rounds
from qnas.nn.blocks import build_block
from qnas.spaces.blocks import Place
from qnas.spaces.lower import make_block

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
KINDS = {
    "quadra": ("quadra", Place(4, 4, 1, 8, "batchnorm", "relu")),
    "mbconv": ("mbconv", Place(4, 4, 1, 8, "batchnorm", "relu6")),
    "star": ("star", Place(4, 4, 1, 8, "batchnorm", "relu6")),
    "layernorm": ("quadra", Place(4, 4, 1, 8, "layernorm", "gelu")),
}


def _trained(kind: str) -> nn.Module:
    """Return a block in eval mode with statistics that folding must take along."""
    torch.manual_seed(0)
    module = build_block(make_block("1.1", *KINDS[kind], kernel=3, expansion=2))
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias)
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_folding_norms_changes_no_output(kind: str) -> None:
    module = _trained(kind)
    folded = copy.deepcopy(module)
    fold_norms(folded)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [r for r in RUNTIMES if r != "openvino"])
def test_a_runtime_makes_instances_that_can_be_timed(name: str) -> None:
    _time_instances(name)


@pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed")
def test_openvino_makes_instances_that_can_be_timed() -> None:
    # in a process of its own: a test process that OpenVINO has run in dies from the next signal that
    # a test sends itself (qnas itself does not: an interrupted profile saves its samples and ends in 130)
    code = "from test_runtimes import _time_instances; _time_instances('openvino')"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, check=True)


def _time_instances(name: str) -> None:
    runtime = open_runtime(name, threads=1)
    module = _trained("quadra")
    before = copy.deepcopy(module.state_dict())
    make = runtime.compile(module, (4, 8, 8))
    calls = {"a": make(), "b": make()}
    *_, samples = sample_rounds(calls, 2, runtime.stopwatch, warm_up=1)
    assert samples.keys() == calls.keys()
    assert all(ms > 0 for values in samples.values() for ms in values)
    assert torch.get_num_threads() == runtime.threads == 1
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_torch_runs_the_folded_module_on_one_image() -> None:
    y = open_runtime("torch").compile(_trained("mbconv"), (4, 8, 8))()()
    assert isinstance(y, torch.Tensor)
    assert y.shape == (1, 4, 8, 8)
    assert y.is_inference()
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_instances_on_torch_are_folded_and_have_weights_of_their_own() -> None:
    make = open_runtime("torch").compile(_trained("mbconv"), (4, 8, 8))
    networks = [inspect.getclosurevars(inspect.unwrap(make())).nonlocals["network"] for _ in range(2)]
    assert not any(isinstance(m, nn.BatchNorm2d) for network in networks for m in network.modules())
    places = [{p.data_ptr() for p in network.parameters()} for network in networks]
    assert places[0]
    assert not places[0] & places[1]


def _model(shape: list[int | str | None], inputs: int = 1, kind: int = onnx.TensorProto.FLOAT) -> bytes:
    names = [f"x{i}" for i in range(inputs)]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu" if inputs == 1 else "Add", names, ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name in names],
        [onnx.helper.make_tensor_value_info("y", kind, shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def test_an_onnx_file_runs_one_fixed_image_with_the_threads_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(_model(["batch", 3, 4, 4]))
    seen: list[Any] = []
    make = onnxruntime.InferenceSession

    def session(content: object, options: Any, **rest: Any) -> Any:
        seen.append(options)
        return make(content, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    onnx_session(file, threads=2)()
    (options,) = seen
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


SESSIONS = [onnx_session] + ([openvino_session] if HAS_OPENVINO else [])


@pytest.mark.parametrize("session", SESSIONS)
def test_a_fixed_first_dimension_becomes_one_image(session: Callable[[bytes], Call]) -> None:
    session(_model([1, 3, 4, 4]))()


@pytest.mark.parametrize("session", SESSIONS)
def test_a_free_resolution_is_refused(session: Callable[[bytes], Call]) -> None:
    with pytest.raises(UsageError, match="expected only the batch to be free"):
        session(_model(["batch", 3, "height", "width"]))


@pytest.mark.parametrize("session", SESSIONS)
def test_what_is_no_model_is_refused(session: Callable[[Path], Call], tmp_path: Path) -> None:
    file = tmp_path / "broken.onnx"
    with pytest.raises(UsageError, match=r"broken\.onnx: .* cannot load it"):
        session(file)
    file.write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"broken\.onnx: .* cannot load it"):
        session(file)


@pytest.mark.parametrize("session", SESSIONS)
def test_a_file_that_takes_a_runtime_long_to_load_is_refused(
    session: Callable[[Path], Call], tmp_path: Path
) -> None:
    file = tmp_path / "nested.onnx"
    file.write_bytes(nested_functions(12).SerializeToString())
    with pytest.raises(UsageError, match=r"nested\.onnx: \w+ cannot load it: more than 20,000") as caught:
        session(file)
    assert len(str(caught.value)) - len(str(file)) <= 300


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.parametrize("shape", [[1, 3, 2**16, 2**16], [1, 3, 0, 4]])
def test_an_image_of_no_size_or_of_gigabytes_is_refused(
    shape: list[int | str | None], session: Callable[[bytes], Call]
) -> None:
    with pytest.raises(UsageError, match="expected sizes above 0 and at most 268,435,456 numbers"):
        session(_model(shape))


def test_a_model_that_does_not_run_is_refused() -> None:
    rows = onnx.numpy_helper.from_array(np.array([5, -1]), "s")
    reshape = onnx.helper.make_node("Reshape", ["x", "s"], ["y"])
    model = graph_model([reshape], [rows], shape=["n", 4, 8, 8], opset=20)
    with pytest.raises(UsageError, match="model: onnxruntime cannot run it"):
        onnx_session(model.SerializeToString())


def test_a_model_of_two_inputs_or_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected one input of float32, found x0.*x1"):
        onnx_session(_model(["batch", 3], inputs=2))
    with pytest.raises(UsageError, match=r"expected one input of float32, found x0: tensor\(double\)"):
        onnx_session(_model(["batch", 3], kind=onnx.TensorProto.DOUBLE))


def test_an_impossible_runtime_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown runtime 'onnx'.*did you mean onnxruntime"):
        open_runtime("onnx")
    with pytest.raises(UsageError, match="unknown target 'gpu'"):
        open_runtime("torch", target="gpu")
    with pytest.raises(UsageError, match="take runtime torch for cuda"):
        open_runtime("openvino", target="cuda")
    with pytest.raises(UsageError, match="a CUDA graph needs the target cuda"):
        open_runtime("torch", cuda_graph=True)
    for threads in (0, 1 + (os.cpu_count() or 1)):
        with pytest.raises(UsageError, match=f"{threads} threads: expected 1 to "):
            open_runtime("torch", threads=threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no CUDA device"):
        open_runtime("torch", target="cuda")


def test_a_missing_openvino_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(UsageError, match="pip install openvino"):
        open_runtime("openvino")


class FakeCuda:
    """Events that note the order of things, a device whose calls take 2 ms each."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0

    def Event(self, *, enable_timing: bool) -> "FakeEvent":  # noqa: N802  # as torch.cuda names it
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def call(self) -> None:
        self.log.append("call")
        self.now_ms += 2.0


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.at_ms = np.nan

    def record(self) -> None:
        self.cuda.log.append("record")
        self.at_ms = self.cuda.now_ms

    def synchronize(self) -> None:
        self.cuda.log.append("wait")

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at_ms - self.at_ms


def test_events_stand_around_the_calls_and_are_waited_for() -> None:
    cuda = FakeCuda()
    assert event_stopwatch(cuda)(cuda.call, 3) == 6.0
    assert cuda.log == ["synchronize", "record", "call", "call", "call", "record", "wait"]


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cuda_runs_what_the_cpu_runs(cuda_graph: bool) -> None:
    module = _trained("layernorm")
    expected = open_runtime("torch").compile(module, (4, 8, 8))()
    runtime = open_runtime("torch", target="cuda", cuda_graph=cuda_graph)
    call = runtime.compile(module, (4, 8, 8))()
    assert runtime.stopwatch(call, 3) > 0
    y = call()
    if isinstance(y, tuple):  # a graph's output and what keeps it alive
        y = y[0]
    torch.cuda.synchronize()
    assert isinstance(y, torch.Tensor)
    want = expected()
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-2, atol=1e-2)  # TF32 in convolutions


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_module_is_timed_as_an_int8_file(name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    opened = open_runtime(name, precision="int8")
    assert opened.precision == "int8"
    assert opened.settings.endswith("files in int8")
    seen = []

    def session(content: bytes, threads: int) -> Any:
        seen.append({node.op_type for node in onnx.load_from_string(content).graph.node})
        return lambda: None

    module = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.GELU())
    keywords = {**opened.compile.keywords, "session": session}  # type: ignore[attr-defined]
    opened.compile.func(module, (8, 6, 6), **keywords)()  # type: ignore[attr-defined]
    opened.compile.func(torch.nn.Identity(), (1, 1, 1), **keywords)()  # type: ignore[attr-defined]
    assert {"QuantizeLinear", "Conv", "DequantizeLinear"} < seen[0]
    assert "QuantizeLinear" not in seen[1]
    opened.compile(module, (8, 6, 6))()()


@pytest.mark.parametrize(("name", "precision"), [("torch", "int8"), ("onnxruntime", "fp16")])
def test_a_precision_that_is_not_measured_is_refused(name: str, precision: Any) -> None:
    with pytest.raises(UsageError, match=f"runtime {name} measures no {precision}: take "):
        open_runtime(name, precision=precision)
