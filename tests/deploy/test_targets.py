"""Which formats a device runs, and what is told where there is no file for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from qnas.common.errors import UsageError
from qnas.deploy.export.formats import FORMATS
from qnas.deploy.export.product import FilePrecision
from qnas.deploy.runtimes import RUNTIMES
from qnas.deploy.targets import (
    DeviceFiles,
    Target,
    choose_formats,
    describe_device,
    device_files,
    formats_of,
    is_for_phone_gpus,
    precisions_of,
)
from qnas.latency.device import device_names, load_device

# by the vendors of the runtimes that the shipped latencies are of
SHIPPED = {
    **dict.fromkeys(("a100", "a100-eager", "a100-throughput"), ("torch", "onnx")),
    **dict.fromkeys(("rtx3090", "rtx4090", "rtx4090-compiled", "rtx5090"), ("torch", "onnx")),
    "i7-12700h": ("torch",),
    "adreno-630": ("tflite",),
    "adreno-640": ("tflite",),
    "cortex-a76": ("tflite",),
    "myriad-vpu": ("vpu",),
}


def test_every_shipped_device_has_its_formats() -> None:
    assert {name: formats_of(load_device(name).runtime) for name in device_names()} == SHIPPED


@pytest.mark.parametrize(
    ("runtime", "formats"),
    [
        ("OpenVINO 2021.4, MYRIAD", ("vpu",)),
        ("OpenVINO 2021.4, CPU", ("vpu",)),
        ("OpenVINO 2022.1, 2 threads", ("openvino",)),
        ("openvino 2022.3, MYRIAD", ("vpu",)),
        ("LiteRT 2.3, XNNPACK", ("tflite",)),
        ("torch 2.14.1, NVIDIA H200, CUDA 13.0", ("torch", "onnx")),
        ("ExecuTorch 1.5, XNNPACK", ("executorch",)),
        ("TensorRT 10.0, CUDA 12", ("onnx",)),
        ("not said", ("onnx",)),
        ("", ("onnx",)),
    ],
)
def test_a_runtime_has_formats(runtime: str, formats: tuple[str, ...]) -> None:
    assert formats_of(runtime) == formats


def test_files_are_for_gpus_of_phones_where_every_device_of_the_search_that_reads_them_is_one() -> None:
    cpu, gpu, stick = (
        Target(name, load_device(name).runtime) for name in ("cortex-a76", "adreno-640", "myriad-vpu")
    )
    assert is_for_phone_gpus([gpu])
    assert is_for_phone_gpus([gpu, stick])
    assert not is_for_phone_gpus([gpu, cpu])
    assert not is_for_phone_gpus([stick])
    assert not is_for_phone_gpus([])


@pytest.mark.parametrize("name", RUNTIMES)
def test_this_machine_runs_the_format_of_the_runtime_that_it_was_timed_in(name: str) -> None:
    version, settings = RUNTIMES[name]
    try:
        runtime = f"{version()}, {settings}"
    except UsageError as error:
        pytest.skip(str(error))
    assert formats_of(runtime) == ({"onnxruntime": "onnx"}.get(name, name),)


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes a format: written here, or the message that says why it is not."""

    def runtime(missing: str) -> str:
        if missing:
            raise UsageError(missing)
        return "a runtime"

    def make(name: str, missing: str = "", precisions: tuple[FilePrecision, ...] = ("fp32",)) -> None:
        kind = replace(FORMATS["onnx"], precisions=precisions, runtime=partial(runtime, missing))
        monkeypatch.setitem(FORMATS, name, kind)

    return make


VPU, PHONE, GPU = (Target(name, load_device(name).runtime) for name in ("vpu", "cpu", "gpu"))


def test_each_device_gets_its_format_once(formats: Callable[..., None]) -> None:
    formats("vpu")
    formats("tflite")
    choice = choose_formats((PHONE, VPU, GPU, PHONE, Target("own", "onnxruntime 1.32")), "fp32", None)
    assert choice.formats == ("tflite", "vpu", "torch", "onnx")
    assert not choice.unable


def test_onnx_stands_in_for_what_cannot_be_written_here(formats: Callable[..., None]) -> None:
    formats("vpu")
    formats("tflite", "format tflite: not installed: pip install it")
    choice = choose_formats((PHONE, VPU), "fp32", None)
    assert choice.formats == ("onnx", "vpu")
    assert choice.unable == {"tflite": "format tflite: not installed: pip install it"}
    assert choose_formats((VPU,), "fp16", None).formats == ("onnx",)


def test_a_precision_that_neither_has_is_refused(formats: Callable[..., None]) -> None:
    formats("vpu")
    formats("tflite", precisions=("fp32", "int8-dynamic"))
    with pytest.raises(UsageError, match=r"format onnx has no int8-dynamic: take .* or the format .*tflite"):
        choose_formats((VPU,), "int8-dynamic", None)
    assert choose_formats((PHONE,), "int8-dynamic", None).formats == ("tflite",)


def test_a_device_of_int8_files_runs_those_alone() -> None:
    entries = {
        "model.onnx": {"format": "onnx", "precision": "fp32"},
        "model_int8.onnx": {"format": "onnx", "precision": "int8"},
        "model_int8.tflite": {"format": "tflite", "precision": "int8"},
    }
    fast, plain = Target("fast", "onnxruntime 1.32", precision="int8"), Target("plain", "onnxruntime 1.32")
    said = Target("said", "adb shell benchmark_model of openvino", "tflite", "int8")
    found = device_files((fast, plain, said), entries, {}, "qnas export RUN")
    assert [each.files for each in found] == [
        ("model_int8.onnx",),
        ("model.onnx", "model_int8.onnx"),
        ("model_int8.tflite",),
    ]
    (without,) = device_files((said,), {"model.onnx": entries["model.onnx"]}, {}, "qnas export RUN")
    assert without.command == "qnas export RUN --format tflite --precision int8"
    assert precisions_of((fast, plain, said)) == ("int8", "fp32")
    assert precisions_of(()) == ("fp32",)


def test_a_device_has_files_or_the_command_that_writes_one() -> None:
    entries = {"model.onnx": {"format": "onnx"}, "model.pt2": {"format": "torch"}}
    command = "qnas export runs/x"
    told = device_files((VPU, PHONE, GPU), entries, {"tflite": "not installed"}, command)
    assert told == (
        DeviceFiles("vpu", VPU.runtime, (), "", f"{command} --format vpu"),
        DeviceFiles("cpu", PHONE.runtime, (), "not installed", f"{command} --format tflite"),
        DeviceFiles("gpu", GPU.runtime, ("model.onnx", "model.pt2"), "", ""),
    )
    (without,) = device_files((GPU,), {}, {}, command)
    assert without.command == f"{command} --format torch", "the first, which its latencies are of"
    assert [describe_device(each.facts()) for each in told] == [
        "vpu (OpenVINO 2019R2): no file that runs there; write one with qnas export runs/x --format vpu",
        "cpu (TFLite 2.1): no file that runs there: not installed; then qnas export runs/x --format tflite",
        "gpu (TensorRT 8 or PyTorch with launches ahead, CUDA): model.onnx, model.pt2",
    ]
    unknown = DeviceFiles("mine", "", ("model.onnx",), "", "")
    assert describe_device(unknown.facts()) == "mine (a device that is not known here): model.onnx"
