"""`qnas doctor`: a check of this machine, with advice on what is missing or broken."""

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from qnas.commands.options import Json, show
from qnas.common.host import cpu_name, load
from qnas.runs.text import wrapped

State = Literal["ok", "off", "missing", "broken"]
# package -> the commands that need it, and its pip name; a plain install may lack all but the first
_PACKAGES = {
    "onnxruntime": ("checking and timing of ONNX files", "onnxruntime"),
    "openvino": ("qnas profile --runtime openvino, qnas export --format openvino", "openvino"),
    "tensorboard": ("qnas tensorboard", "'quadranet-nas[tensorboard]'"),
    "timm": ("qnas train-subnet --teacher timm:NAME", "'quadranet-nas[timm]'"),
}
OWN_DEVICES = Path("devices")  # where qnas profile writes


@dataclass(frozen=True)
class Finding:
    """The state of one part of the machine or installation."""

    topic: str
    state: State
    found: str
    advice: str = ""  # empty if there is nothing to do


def doctor(as_json: Json = False) -> None:
    """Check versions, GPU, compiler, optional packages, devices and predictors of this machine.

    Builds the C++ kernels if they have not been built yet, which takes some seconds. Exits with 1 if
    something is broken.

    Example: qnas doctor
    """

    findings = list(examine())
    width = 8 + max(len(finding.topic) for finding in findings) + 2
    lines = []
    for finding in findings:
        begin = f"{finding.state:8}{finding.topic}".ljust(width)
        lines.append(wrapped(finding.found, begin, " " * width))
        if finding.advice:
            lines.append(wrapped(f"-> {finding.advice}", " " * width, " " * width))
    show([asdict(finding) for finding in findings], lines, as_json=as_json)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Yield the findings in the order in which they are printed."""
    from qnas.api.session import versions

    yield Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield from _machine()
    yield _cpu_kernels()
    yield _gpu()
    yield from _packages()
    yield from _latency_sources()


def _machine() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", "ok", f"{cpu_name()}, {platform.system()}, {load()}")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    reason = f", since OMP_NUM_THREADS={asked} is set" if asked and threads < cores else ""
    yield Finding("threads", "ok", f"torch uses {threads} of {cores} cores{reason}")


def _cpu_kernels() -> Finding:
    from qnas.nn.kernels import native

    finding = partial(Finding, "C++ kernels")
    if not native.is_enabled():
        return finding("off", "QNAS_KERNELS=0: torch's operators are used", "unset it for faster training")
    compiler = native.find_compiler()
    if compiler is None:
        advice = f"install one of {', '.join(native.COMPILERS)}, or set CXX"
        return finding("missing", "no C++ compiler: torch's operators are used", advice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = native.library()
    if library is None:
        reason = str(caught[0].message) if caught else "tried before in this process"
        return finding("broken", reason, f"see why {compiler} fails, or set QNAS_KERNELS=0")
    worst = _largest_difference()
    found = f"{library.lanes} floats a vector, by {compiler}, in {library.path}"
    if refused := native.refused_folder():
        found = f"{library.lanes} floats a vector, by {compiler}, built anew by every process: {refused}"
        return finding("broken", found, f"make {native.cache_folder()} a folder that only you can write")
    if worst > 1e-4:
        advice = "set QNAS_KERNELS=0 and report this, with the compiler's version"
        return finding("broken", f"{found}; off by {worst:.1e} from torch's result", advice)
    return finding("ok", f"{found}; within {worst:.0e} of torch's result")


def _largest_difference() -> float:
    """Return the largest relative difference of the kernels' results and gradients from torch's."""
    import torch

    from qnas.nn.quadratic import quadratic_conv2d, quadratic_conv2d_reference

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 24, 9, 9), *[(24, 1, 7, 7)] * 3]
    results = []
    for form in (quadratic_conv2d, quadratic_conv2d_reference):
        tensors = [torch.randn(shape, generator=generator.manual_seed(i)) for i, shape in enumerate(shapes)]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        y = form(*tensors)
        results.append([y, *torch.autograd.grad(y.square().mean(), tensors)])
    return max(
        float((got - right).detach().abs().max() / right.detach().abs().max())
        for got, right in zip(*results, strict=True)
    )


def _gpu() -> Finding:
    import torch

    from qnas.nn.kernels import triton_quadratic

    if not torch.cuda.is_available():
        # a GPU is optional: without one, searching and training take longer
        built, advice = "CPUs", "install a torch that is built for it (pytorch.org, Get started)"
        if torch.version.cuda:
            built = torch.version.cuda
            advice = f"see that nvidia-smi lists it, with a driver for CUDA {built} or newer"
        found = f"none that torch can use (torch is built for {built})"
        return Finding("GPU", "missing", found, f"where this machine has one: {advice}")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if not triton_quadratic.available():
        return Finding("GPU", "ok", f"{names}, without Triton kernels", "pip install triton")
    return Finding("GPU", "ok", f"{names}, with Triton kernels")


def _packages() -> Iterator[Finding]:
    for name, (use, wanted) in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"not installed: no {use}", f"pip install {wanted}")
        else:
            yield Finding(name, "ok", version)


def _latency_sources() -> Iterator[Finding]:
    from qnas.latency.device import device_names
    from qnas.latency.nn_meter.predictors import PUBLISHED, download_hint, list_predictors

    names = [" = ".join((name, *aliases)) for name, aliases in device_names().items()]
    yield Finding("devices", "ok", ", ".join(names))
    if own := sorted(map(str, OWN_DEVICES.glob("*.json"))):
        yield Finding("own devices", "ok", ", ".join(own))
    else:
        advice = "to measure this machine: qnas profile --space quadranet-small"
        yield Finding("own devices", "missing", f"none in {OWN_DEVICES}/", advice)
    if imported := [predictors.device for predictors in list_predictors()]:
        yield Finding("nn-Meter", "ok", f"predictors of {', '.join(imported)}")
    else:
        found = "no predictors imported (only --latency nn-meter needs them)"
        yield Finding("nn-Meter", "missing", found, download_hint(min(PUBLISHED)))
