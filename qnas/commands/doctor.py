"""`qnas doctor`: a check of this machine, with advice on what is missing or broken."""

import errno
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from qnas.commands.options import Json, show
from qnas.common.errors import TableError, UsageError, one_line
from qnas.common.host import cpu_name, load
from qnas.runs.text import wrapped

State = Literal["ok", "off", "missing", "broken"]
# package -> the commands that need it, and its pip name; a plain install may lack all but the first
_PACKAGES = {
    "onnxruntime": ("checking and timing of ONNX files", "onnxruntime"),
    "openvino": (
        "qnas profile --runtime openvino, qnas export --format openvino, an IR for --format vpu",
        "openvino",
    ),
    "executorch": ("qnas export --format executorch", "executorch"),
    "tensorboard": ("qnas tensorboard", "'quadranet-nas[tensorboard]'"),
    "timm": (
        "qnas train-subnet --teacher timm:NAME, qnas search --pretrained timm:NAME",
        "'quadranet-nas[timm]'",
    ),
}
_LIBRARIES = ("torch", "torchvision")  # without these, the other checks cannot run
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
    """Yield the findings in the order in which they are printed; without torch, what it needs is left out."""
    broken = [finding for name in _LIBRARIES if (finding := _library(name)) is not None]
    yield from broken
    if not broken:
        from qnas.api.session import versions

        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        yield Finding("versions", "ok", known)
        yield from _machine()
        yield _cpu_kernels()
        yield _gpu()
        yield _myriad_compiler()
    yield from _packages()
    yield from _latency_sources()


def _library(name: str) -> Finding | None:
    """Return what is wrong with a library that qnas needs: missing, older than needed, or not importable."""
    wanted = f"pip install '{name}{_least(name) and f'>={_least(name)}'}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "broken", "not installed", wanted)
    if _numbers(version) < _numbers(_least(name)):
        found = f"version {version}, qnas needs {_least(name)} or newer"
        return Finding(name, "broken", found, wanted.replace("install", "install --upgrade"))
    return _imported(name, name, name)


def _imported(name: str, module: str, wanted: str) -> Finding | None:
    """Import an installed package; return why it fails, None where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a damaged installation raises
        lacks = error.name if isinstance(error, ModuleNotFoundError) and error.name != module else None
        advice = f"pip install {lacks or f'--force-reinstall {wanted}'}"
        if lacking := re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", str(error)):
            advice = f"install the system's package that has {lacking[1]}"
        elif name == "torchvision" and "torchvision::" in str(error):
            advice = "install the torchvision of this torch: pip install --force-reinstall torch torchvision"
        return Finding(
            name, "broken", f"cannot be imported: {type(error).__name__}: {one_line(error)}", advice
        )
    return None


def _least(name: str) -> str:
    """Return the least version of a library that qnas declares, "" where it declares none."""
    try:
        declared = importlib.metadata.requires("quadranet-nas") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, not installed
        return ""
    form = re.compile(rf"{re.escape(name)}>=([0-9.]+)")
    return next((found[1] for line in declared if (found := form.fullmatch(line))), "")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version: `2.8.0+cpu` gives (2, 8, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


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
    asked, compiler = os.environ.get("CXX"), native.find_compiler()
    if compiler is None:
        if asked:
            found = f"CXX={asked} is no program on the PATH: torch's operators are used"
            return finding("missing", found, f"set CXX to a C++ compiler, or install {native.COMPILERS[0]}")
        advice = f"install one of {', '.join(native.COMPILERS)}, or set CXX"
        return finding("missing", "no C++ compiler: torch's operators are used", advice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = native.library()
    if library is None:
        error = native.failure()
        reason = str(caught[0].message) if caught else f"could not be built: {error}"
        return finding("broken", reason, _build_advice(error, compiler, native.cache_folder()))
    worst = _largest_difference()
    found = f"{library.lanes} floats a vector, by {compiler}, in {library.path}"
    if refused := native.refused_folder():
        found = f"{library.lanes} floats a vector, by {compiler}, built anew by every process: {refused}"
        return finding("broken", found, f"make {native.cache_folder()} a folder that only you can write")
    if worst > 1e-4:
        advice = "set QNAS_KERNELS=0 and report this, with the compiler's version"
        return finding("broken", f"{found}; off by {worst:.1e} from torch's result", advice)
    return finding("ok", f"{found}; within {worst:.0e} of torch's result")


# what a compiler says -> what to do about it
_COMPILER_ADVICE = (
    (
        "fopenmp|omp\\.h|-lomp|-lgomp|libgomp",
        "install the compiler's OpenMP (libgomp1, or libomp-dev for clang)",
    ),
    ("cannot execute.*cc1plus", "install the C++ part of the compiler (the package g++)"),
    (
        r"fatal error: .*file not found|fatal error: .*No such file|cannot find -lstdc",
        "install the headers of the C++ library (the package g++ or libstdc++-dev)",
    ),
    ("march=native|std=c", "install a newer compiler: this one does not know C++17 or this processor"),
    ("No space left", "free space in the folder for temporary files, or set TMPDIR to another"),
    ("[Kk]illed|out of memory|memory exhausted", "free memory: the compiler was stopped for want of it"),
)


def _build_advice(error: Exception | None, compiler: str, cache: Path) -> str:
    """Return what to do about kernels that could not be built or loaded."""
    elsewhere = "or set QNAS_HOME to a folder elsewhere"
    off = "or set QNAS_KERNELS=0"
    if isinstance(error, subprocess.CalledProcessError):
        said = f"{error.stderr or ''} {'killed' if error.returncode < 0 else ''}"
        known = (advice for form, advice in _COMPILER_ADVICE if re.search(form, said))
        return f"{next(known, f'see why {compiler} fails')}, {off}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"try again when the machine is less busy, {off}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free space on the disk of {cache}, {elsewhere}"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{cache} is on a disk that is read-only: set QNAS_HOME to a folder elsewhere"
    if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
        return f"a part of {cache} is a file, not a folder: move it away, {elsewhere}"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        if error.filename == compiler:
            return f"{compiler} may not be run: set CXX to another compiler, {off}"
        return f"allow yourself to write in {cache}, {elsewhere}"
    if "map segment" in str(error) or "not permitted" in str(error):
        return f"{cache} is on a disk from which nothing may be run: set QNAS_HOME to a folder elsewhere"
    if lacking := re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", str(error)):
        return f"install the system's package that has {lacking[1]}, {off}"
    return f"see why {compiler} fails, {off}"


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

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return _no_gpu(" ".join(str(warning.message) for warning in caught))
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if not triton_quadratic.available():
        return Finding("GPU", "ok", f"{names}, without Triton kernels", "pip install triton")
    return Finding("GPU", "ok", f"{names}, with Triton kernels")


def _no_gpu(said: str) -> Finding:
    """Return why torch finds no GPU, which is optional; `said` is what torch warned of."""
    import torch

    built = torch.version.cuda
    found = f"none that torch can use (torch is built for {f'CUDA {built}' if built else 'CPUs'})"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built and hidden is not None and hidden.strip() in ("", "-1"):
        advice = f"CUDA_VISIBLE_DEVICES={hidden!r} hides them all: unset it"
    elif built and "too old" in said:
        advice = f"update the NVIDIA driver, to one for CUDA {built} or newer"
    elif built and said:
        advice = f"torch says: {one_line(said)}"
    elif built and shutil.which("nvidia-smi") is None:
        advice = f"where this machine has one: install its driver, for CUDA {built} or newer"
    elif built:
        advice = f"see that nvidia-smi lists it, with a driver for CUDA {built} or newer"
    elif shutil.which("nvidia-smi") is not None:
        advice = "install a torch that is built for CUDA (pytorch.org, Get started)"
    else:
        advice = "where this machine has one: install a torch that is built for it (pytorch.org, Get started)"
    return Finding("GPU", "missing", found, advice)


def _myriad_compiler() -> Finding:
    """Return the program that compiles files for the Myriad X, which is optional."""
    from qnas.deploy.export import myriad_compiler

    finding = partial(Finding, myriad_compiler.PROGRAM)
    try:
        compiler = myriad_compiler.find_compiler()
        version = compiler and myriad_compiler.compiler_version(compiler)
    except UsageError as error:
        return finding("broken", str(error), f"get it so: {myriad_compiler.HOW_TO_GET}")
    if compiler is None:
        found = (
            "none: qnas export --format vpu writes no blob, and does not check that the stick takes the file"
        )
        return finding("missing", found, myriad_compiler.HOW_TO_GET)
    return finding("ok", f"{compiler}, version {version or 'unknown'}")


def _packages() -> Iterator[Finding]:
    for name, (use, wanted) in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"not installed: no {use}", f"pip install {wanted}")
        else:
            yield _imported(name, name, wanted) or Finding(name, "ok", version)


def _latency_sources() -> Iterator[Finding]:
    from qnas.latency.device import device_names

    names = [" = ".join((name, *aliases)) for name, aliases in device_names().items()]
    yield Finding("devices", "ok", ", ".join(names))
    if own := sorted(map(str, OWN_DEVICES.glob("*.json"))):
        yield Finding("own devices", "ok", ", ".join(own))
    else:
        advice = "to measure this machine: qnas profile --space quadranet-small"
        yield Finding("own devices", "missing", f"none in {OWN_DEVICES}/", advice)
    yield _nn_meter()


def _nn_meter() -> Finding:
    from qnas.latency.nn_meter.predictors import PUBLISHED, download_hint, list_predictors
    from qnas.latency.nn_meter.tables import why_not_importable

    finding = partial(Finding, "nn-Meter")
    try:
        imported = [predictors.device for predictors in list_predictors()]
    except TableError as error:  # it says what to do
        found, _, advice = str(error).partition("): ")
        return finding("broken", f"{found})" if advice else found, advice or "see that the file can be read")
    if not imported:
        found = "no predictors imported (only --latency nn-meter needs them)"
        return finding("missing", found, download_hint(min(PUBLISHED)))
    if problem := why_not_importable():
        found, advice = problem
        return finding("broken", f"predictors of {', '.join(imported)}, but {found}", advice)
    return finding("ok", f"predictors of {', '.join(imported)}")
