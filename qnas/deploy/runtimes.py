"""Modules and ONNX files as calls on a runtime of this machine, for timing.

A call computes one image that is already in the runtime's memory. It copies nothing from or to Python,
as a block inside a network does not either. All compute in float32, or as ONNX files in int8 do: with float32
inputs, sums and norms between int8 layers. Modules are timed as they are
deployed, with batch normalisation folded. ONNX files run with a free batch size, as they are exported.

The settings are the runtimes' own for the lowest latency, unless they disturb other calls; all are
recorded in `Runtime.settings`. torch runs in channels_last memory, as `subnet` builds networks. CUDA,
eager or as a CUDA graph, is timed by events on the stream. It ran on an H200.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from qnas.common.errors import ArchError, UsageError, first_line, nearest, one_line
from qnas.deploy.export import onnx_runtime, openvino_format, torch_format
from qnas.deploy.export.folding import fold_norms
from qnas.deploy.export.product import Variant
from qnas.deploy.export.quantisation import QUANTISED, quantise
from qnas.deploy.export.tracing import trace_onnx
from qnas.deploy.timed_files import random_images
from qnas.deploy.timing import Call, Maker, Stopwatch, host_stopwatch
from qnas.latency.device import FilePrecision
from qnas.latency.onnx.model_file import read_model

Shape = tuple[int, int, int]  # channels, height, width of one image

TARGETS = ("cpu", "cuda")
SEED = 0  # of the images
_LARGEST_IMAGE = 2**28  # limit for the numbers of an image: a gigabyte
_OPENVINO = "runtime openvino"  # as named in messages
_CAPTURE_WARM_UP = 3  # runs before a CUDA graph is captured, in which libraries choose their kernels


@dataclass(frozen=True)
class Runtime:
    """An open runtime, with functions that compile a module to calls and time them."""

    name: str
    target: str
    threads: int
    version: str  # "onnxruntime 1.31.1"
    settings: str  # everything else that a latency depends on
    compile: Callable[[nn.Module, Shape], Maker]
    stopwatch: Stopwatch
    precision: FilePrecision = "fp32"  # of the files that modules become


def open_runtime(
    name: str,
    *,
    target: str = "cpu",
    threads: int = 1,
    cuda_graph: bool = False,
    precision: FilePrecision = "fp32",
) -> Runtime:
    """Return a runtime by name: `torch`, `onnxruntime` or `openvino`. Sets torch's threads.

    With `cuda_graph`, torch replays a graph instead of launching every kernel. In int8, modules run as ONNX
    files in int8 do. Raises UsageError if the runtime is unknown, not installed, lacks the target on this
    machine, or the precision.
    """
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}: {nearest(name, RUNTIMES)}")
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}: {nearest(target, TARGETS)}")
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise UsageError(f"{threads} threads: expected 1 to {cores}, the cores of this machine")
    if cuda_graph and target != "cuda":
        raise UsageError("a CUDA graph needs the target cuda")
    if target == "cuda":
        if name != "torch":
            raise UsageError(f"runtime {name} runs on the target cpu only: take runtime torch for cuda")
        if not torch.cuda.is_available():
            raise UsageError(f"target cuda: torch {torch.__version__} finds no CUDA device on this machine")
    if precision not in (("fp32",) if name == "torch" else ("fp32", "int8")):
        able = "onnxruntime or openvino" if precision == "int8" else "fp32 or int8"
        raise UsageError(f"runtime {name} measures no {precision}: take {able}")
    torch.set_num_threads(threads)
    if target == "cuda":
        return _cuda(threads, cuda_graph)
    version, settings = RUNTIMES[name]
    if name == "torch":
        compile_ = partial(_torch_maker, device="cpu")
    else:
        compile_ = partial(_onnx_maker, session=SESSIONS[name], threads=threads, precision=precision)
    if precision == "int8":
        settings = f"{settings.replace('float32 inference', 'int8 inference')}, files in int8"
    return Runtime(name, target, threads, version(), settings, compile_, host_stopwatch(), precision)


def onnx_session(file: Path | bytes, threads: int = 1) -> Call:
    """Return a call of an ONNX file in onnxruntime, on a fixed random image.

    The file, or its content, must have one float32 input. Its first dimension, free or fixed, becomes 1.
    Raises UsageError if the file is missing, broken or of another form.
    """
    _check_file(file, "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors
    # threads that spin on after a run would take the cores from the next call
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        content = file if isinstance(file, bytes) else str(file)
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions derive from Exception directly
        raise UsageError(f"{_where(file)}: onnxruntime cannot load it: {first_line(error)}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{i.name}: {i.type}" for i in inputs)
        raise UsageError(f"{_where(file)}: expected one input of float32, found {found or 'none'}")
    image = _random_image(_fixed_shape(inputs[0].shape, _where(file)))
    binding = session.io_binding()
    binding.bind_ortvalue_input(inputs[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(image))
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, {inputs[0].name: image})
    except Exception as error:  # as above
        raise UsageError(f"{_where(file)}: onnxruntime cannot run it: {first_line(error)}") from error
    for name, value in zip(names, values, strict=True):
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    return lambda: session.run_with_iobinding(binding)


def openvino_session(file: Path | bytes, threads: int = 1) -> Call:
    """Return a call of an ONNX file in OpenVINO, on a fixed random image. The batch becomes 1.

    Raises UsageError as `onnx_session` does, and if OpenVINO is not installed.
    """
    openvino = openvino_format.import_openvino(_OPENVINO)
    _check_file(file, "OpenVINO")
    core = openvino.Core()
    try:
        model = core.read_model(file if isinstance(file, bytes) else str(file))
        shape = _fixed_shape(
            [d.get_length() if d.is_static else None for d in model.input(0).partial_shape], _where(file)
        )
        model.reshape(list(shape))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # the default on processors with bfloat16 is bfloat16
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise UsageError(f"{_where(file)}: OpenVINO cannot load it: {first_line(error)}") from error
    request.set_input_tensor(openvino.Tensor(_random_image(shape)))

    # results stay where they are; start_async and wait would hand over to another thread and back
    return lambda: request.infer(share_outputs=True)


def function_session(function: Callable[[torch.Tensor], object], shape: Shape, threads: int = 1) -> Call:
    """Return a call of a function of images in torch, on a fixed random image. Sets torch's threads."""
    torch.set_num_threads(threads)
    image = torch.from_numpy(_random_image((1, *shape)))
    return lambda: function(image)


def _torch_maker(module: nn.Module, shape: Shape, device: str) -> Maker:
    deployed = copy.deepcopy(module).eval()
    fold_norms(deployed)

    def make() -> Call:
        network: nn.Module = copy.deepcopy(deployed)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        image = torch.from_numpy(_random_image((1, *shape)))
        image = image.to(device=device, memory_format=torch.channels_last)

        @torch.inference_mode()
        def call() -> object:
            return network(image)

        return call

    return make


def _cuda_graph_maker(module: nn.Module, shape: Shape, device: str) -> Maker:
    make = _torch_maker(module, shape, device)
    return lambda: _captured(make())


def _captured(run: Call) -> Call:
    """Capture a call as a CUDA graph, and return a call that replays it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_CAPTURE_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def call() -> object:
        graph.replay()
        return output, run  # keeps the graph's inputs and outputs alive

    return call


def event_stopwatch(cuda: Any = torch.cuda) -> Stopwatch:
    """Return a stopwatch of events on the current stream. `cuda` is torch.cuda or a stand-in.

    It measures the time between two events on the device. This includes the device's waits for launches
    by the host, but not the host's waits for the device.
    """
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def run(call: Call, loops: int) -> float:
        cuda.synchronize()  # excludes earlier work
        start.record()
        for _ in range(loops):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return run


def _cuda(threads: int, cuda_graph: bool) -> Runtime:
    compile_ = _cuda_graph_maker if cuda_graph else _torch_maker
    torch.backends.cudnn.benchmark = True  # shapes are fixed: let cuDNN choose by measuring
    tf32 = "TF32" if torch.backends.cudnn.allow_tf32 else "no TF32"
    return Runtime(
        "torch",
        "cuda",
        threads,
        torch_format.runtime(),
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, "
        f"{'CUDA graph' if cuda_graph else 'eager'}, channels_last, {tf32} in convolutions, "
        "cuDNN benchmarked, timed by events",
        partial(compile_, device="cuda"),
        event_stopwatch(),
    )


def _onnx_maker(
    module: nn.Module,
    shape: Shape,
    session: Callable[[bytes, int], Call],
    threads: int,
    precision: FilePrecision,
) -> Maker:
    model: onnx.ModelProto = trace_onnx(copy.deepcopy(module).eval(), shape, "block")
    if precision == "int8" and any(node.op_type in QUANTISED for node in model.graph.node):
        variant = Variant("int8", every_layer=True)
        model = quantise(model, random_images(shape, count=1), variant, "block").model
    return partial(session, cast(bytes, model.SerializeToString()), threads)


# What opens an ONNX file, by the name of the runtime.
SESSIONS: dict[str, Callable[[Path | bytes, int], Call]] = {
    "onnxruntime": onnx_session,
    "openvino": openvino_session,
}
# The version of each runtime, and everything else that its latency on the CPU depends on.
RUNTIMES: dict[str, tuple[Callable[[], str], str]] = {
    "torch": (torch_format.runtime, "eager, inference mode, channels_last"),
    "onnxruntime": (
        onnx_runtime.runtime,
        "CPU provider, all graph optimisations, sequential, no spinning between runs",
    ),
    "openvino": (
        partial(openvino_format.version, _OPENVINO),
        "CPU plugin, latency hint, 1 stream, float32 inference, batch fixed at 1",
    ),
}


def _random_image(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def _fixed_shape(found: list[Any], where: str) -> tuple[int, ...]:
    """Return an input's shape at batch 1; names and None are free dimensions."""
    if not found or not all(isinstance(size, int) for size in found[1:]):
        raise UsageError(f"{where}: the input is {one_line(found)}, expected only the batch to be free")
    if min(found[1:], default=1) < 1 or math.prod(found[1:]) > _LARGEST_IMAGE:
        raise UsageError(
            f"{where}: the input is {one_line(found)}, expected sizes above 0 and at most "
            f"{_LARGEST_IMAGE:,} numbers"
        )
    return (1, *found[1:])


def _check_file(file: Path | bytes, runtime: str) -> None:
    """Refuse an ONNX file that a runtime would not end to load: of nested functions, branches or loops."""
    if isinstance(file, bytes) or file.suffix == ".xml":  # OpenVINO's own format, which has none of these
        return
    try:
        read_model(file)
    except ArchError as error:
        problem = str(error).removeprefix(f"{file}: ")
        raise UsageError(f"{file}: {runtime} cannot load it: {problem}") from error


def _where(file: Path | bytes) -> str:
    return "model" if isinstance(file, bytes) else str(file)
