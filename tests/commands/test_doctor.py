import errno
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from helpers.pickled_forests import predictor_files, write_zip
from typer.testing import CliRunner

from qnas.commands import doctor
from qnas.commands.cli import app
from qnas.deploy.export import myriad_compiler
from qnas.latency.nn_meter import predictors
from qnas.nn.kernels import native


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.library()  # from the user's cache: in an empty one they are compiled, for many seconds
    monkeypatch.setenv("QNAS_HOME", str(tmp_path))  # no predictors


def findings() -> dict[str, dict[str, str]]:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    return {finding["topic"]: finding for finding in json.loads(done.stdout)}


def test_every_line_says_what_was_found_and_what_is_missing_what_to_do() -> None:
    found = findings()
    assert f"torch {torch.__version__}" in found["versions"]["found"]
    assert "myriad-vpu = vpu" in found["devices"]["found"]
    assert found["onnxruntime"]["state"] == "ok"
    assert found["nn-Meter"]["state"] == "missing"
    assert "qnas predictors import" in found["nn-Meter"]["advice"]
    assert {"openvino", "tensorboard", "timm", "GPU", "own devices"} <= found.keys()
    for finding in found.values():
        assert finding["advice"] or finding["state"] not in ("missing", "broken"), finding
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for topic, finding in found.items():
        assert topic in text
        for word in finding["advice"].split():
            assert word in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80


def test_kernels_that_are_turned_off_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNAS_KERNELS", "0")
    assert findings()["C++ kernels"]["state"] == "off"


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    finding = findings()["C++ kernels"]
    assert finding["state"] == "missing"
    assert "g++" in finding["advice"]


def test_a_cache_that_others_can_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.find_compiler() is None:
        pytest.skip("no compiler here")
    sources = tmp_path / "sources"  # that compile in a moment
    sources.mkdir()
    (sources / "lanes.cpp").write_text('extern "C" int qnas_lanes() { return 4; }\n')
    monkeypatch.setattr(native, "FOLDER", sources)
    folder = native.cache_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    # not yet loaded, and not to be loaded again afterwards
    monkeypatch.setattr(native, "_load", lru_cache(maxsize=1)(native._load.__wrapped__))
    finding = findings()["C++ kernels"]
    assert finding["state"] == "broken"
    assert f"{folder}: others can write it" in finding["found"]
    assert "only you can write" in finding["advice"]


def test_kernels_that_compute_something_else_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no compiler here")
    assert findings()["C++ kernels"]["state"] == "ok"
    monkeypatch.setattr(doctor, "_largest_difference", lambda: 0.5)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "broken" in done.stdout
    assert "QNAS_KERNELS=0" in done.stdout


def test_the_difference_between_two_forms_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._largest_difference() < 1e-4
    from qnas.nn import quadratic

    real = quadratic.quadratic_conv2d
    monkeypatch.setattr(quadratic, "quadratic_conv2d", lambda *tensors: 1.01 * real(*tensors))
    assert doctor._largest_difference() == pytest.approx(0.02, rel=0.1)  # of the gradients


def test_a_package_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "openvino":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert findings()["openvino"]["advice"] == "pip install openvino"


def test_devices_that_were_measured_here_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "qnas profile" in next(f for f in doctor._latency_sources() if f.topic == "own devices").advice
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "board.json").touch()
    (own,) = (f for f in doctor._latency_sources() if f.topic == "own devices")
    assert (own.state, own.found, own.advice) == ("ok", "devices/board.json", "")


# the advice follows the cause


def failed(said: str = "", code: int = 1) -> Exception:
    return subprocess.CalledProcessError(code, ["g++"], stderr=said)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (failed("error: unsupported option '-fopenmp'"), "install the compiler's OpenMP"),
        (failed("fatal error: omp.h: No such file or directory"), "install the compiler's OpenMP"),
        (failed("ld: cannot find -lgomp"), "install the compiler's OpenMP"),
        (failed("cannot execute 'cc1plus': execvp"), "install the C++ part of the compiler"),
        (failed("fatal error: cstdint: No such file or directory"), "install the headers of the C++ library"),
        (failed("fatal error: 'vector' file not found"), "install the headers of the C++ library"),
        (failed("error: unrecognized option '-std=c++17'"), "install a newer compiler"),
        (failed("fatal error: error writing to /tmp/x.s: No space left on device"), "or set TMPDIR"),
        (failed("g++: fatal error: Killed signal terminated program cc1plus"), "free memory"),
        (failed("", -9), "free memory"),
        (failed("error: expected ';'"), "see why /usr/bin/g++ fails, or set QNAS_KERNELS=0"),
        (subprocess.TimeoutExpired("g++", 600), "try again when the machine is less busy"),
        (OSError(errno.ENOSPC, "No space left"), "free space on the disk of /cache, or set QNAS_HOME"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free space on the disk of /cache"),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "/cache is on a disk that is read-only: set QNAS_HOME",
        ),
        (OSError(errno.ENOTDIR, "Not a directory"), "a part of /cache is a file, not a folder"),
        (
            PermissionError(errno.EACCES, "denied", "/cache/x"),
            "allow yourself to write in /cache, or set QNAS",
        ),
        (PermissionError(errno.EACCES, "denied", "/usr/bin/g++"), "/usr/bin/g++ may not be run: set CXX"),
        (OSError("x.so: failed to map segment from shared object"), "from which nothing may be run"),
        (
            OSError("libgomp.so.1: cannot open shared object file: No such file or directory"),
            "install the system's package that has libgomp.so.1",
        ),
        (None, "see why /usr/bin/g++ fails"),
    ],
)
def test_kernels_that_are_not_built_are_advised_by_the_cause(error: Exception | None, advice: str) -> None:
    assert advice in doctor._build_advice(error, "/usr/bin/g++", Path("/cache"))


@pytest.mark.parametrize(
    ("body", "advice"),
    [
        ("echo \"fatal error: 'omp.h' file not found\" >&2; exit 1", "install the compiler's OpenMP"),
        ("echo 'ld: No space left on device' >&2; exit 1", "or set TMPDIR to another"),
        ("exit 3", "see why "),
        ("kill -9 $$", "free memory"),
    ],
)
def test_a_compiler_that_fails_is_advised_by_what_it_says(
    body: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n{body}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    native._load.cache_clear()
    try:
        for _ in range(2):  # the second time it was tried before in this process
            finding = findings()["C++ kernels"]
            assert finding["state"] == "broken"
            assert advice in finding["advice"]
            assert finding["found"]
    finally:
        native._load.cache_clear()


def test_a_cache_that_cannot_be_written_is_told_with_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.find_compiler() is None:
        pytest.skip("no compiler here")
    (tmp_path / "file").touch()
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "file"))
    native._load.cache_clear()
    try:
        assert "is a file, not a folder" in findings()["C++ kernels"]["advice"]
    finally:
        native._load.cache_clear()


def test_a_compiler_of_the_environment_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    finding = doctor._cpu_kernels()
    assert finding.found.startswith("CXX=no-such-compiler is no program on the PATH")
    assert finding.advice.startswith("set CXX to a C++ compiler")


@pytest.mark.parametrize(
    ("built", "hidden", "driver", "said", "advice"),
    [
        (None, None, None, "", "where this machine has one: install a torch that is built for it"),
        (None, None, "/bin/nvidia-smi", "", "install a torch that is built for CUDA"),
        ("13.0", None, None, "", "where this machine has one: install its driver, for CUDA 13.0"),
        ("13.0", None, "/bin/nvidia-smi", "", "see that nvidia-smi lists it"),
        ("13.0", "", "/bin/nvidia-smi", "", "CUDA_VISIBLE_DEVICES='' hides them all: unset it"),
        ("13.0", "-1", "/bin/nvidia-smi", "", "CUDA_VISIBLE_DEVICES='-1' hides them all"),
        ("13.0", "0", "/bin/nvidia-smi", "", "see that nvidia-smi lists it"),
        (
            "13.0",
            None,
            "/bin/nvidia-smi",
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).",
            "update the NVIDIA driver, to one for CUDA 13.0 or newer",
        ),
        ("13.0", None, "/bin/nvidia-smi", "CUDA unknown error", "torch says: CUDA unknown error"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_advised_by_the_cause(
    built: str | None,
    hidden: str | None,
    driver: str | None,
    said: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def available() -> bool:
        if said:
            warnings.warn(said, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(shutil, "which", lambda name: driver if name == "nvidia-smi" else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert doctor._gpu().advice.startswith(advice)


@pytest.mark.parametrize(
    ("name", "error", "advice"),
    [
        ("torch", ModuleNotFoundError("No module named 'torch'", name="torch"), "--force-reinstall torch"),
        ("torch", ModuleNotFoundError("No module named 'sympy'", name="sympy"), "pip install sympy"),
        (
            "torch",
            ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"),
            "install the system's package that has libcudart.so.12",
        ),
        (
            "torchvision",
            RuntimeError("operator torchvision::nms does not exist"),
            "install the torchvision of this torch",
        ),
        ("torch", OSError("something\nelse"), "pip install --force-reinstall torch"),
    ],
)
def test_a_library_that_cannot_be_imported_is_advised_by_the_cause(
    name: str, error: Exception, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def refuse(module: str) -> object:
        if module == name:
            raise error
        return real(module)

    monkeypatch.setattr(importlib, "import_module", refuse)
    found = list(doctor.examine())
    assert found[0].topic == name
    assert found[0].state == "broken"
    assert advice in found[0].advice
    assert "\n" not in found[0].found
    # without torch, what needs it is left out, and the rest is still told
    assert {"versions", "C++ kernels", "GPU"}.isdisjoint(finding.topic for finding in found)
    assert {"devices", "nn-Meter"} <= {finding.topic for finding in found}


def test_a_library_that_is_too_old_or_not_there_is_told_with_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"torch": "2.7.1+cu118"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    old, missing = doctor._library("torch"), doctor._library("torchvision")
    assert old is not None
    assert missing is not None
    assert old.found == "version 2.7.1+cu118, qnas needs 2.8 or newer"
    assert old.advice == "pip install --upgrade 'torch>=2.8'"
    assert missing.found == "not installed"
    assert missing.advice.startswith("pip install 'torchvision>=0.")
    versions["torch"] = "2.10.0"
    assert doctor._library("torch") is None


def test_an_optional_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (finding,) = (finding for finding in doctor._packages() if finding.topic == "openvino")
    assert (finding.state, finding.advice) == ("broken", "pip install --force-reinstall openvino")


def test_predictors_are_advised_by_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_zip(tmp_path / "vpu.zip", predictor_files("myriad-vpu", trees=1, rows=6))
    path = predictors.import_predictors(archive, "vpu").path
    finding = doctor._nn_meter()
    assert (finding.state, finding.found) == ("ok", "predictors of myriad-vpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pkg_resources" else 1)
    finding = doctor._nn_meter()
    assert finding.state == "broken"
    assert finding.advice == 'pip install "setuptools>=77.0.3,<81"'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor._nn_meter().advice == 'pip install "nn-meter>=2.0,<3"'
    path.write_bytes(b"junk")
    finding = doctor._nn_meter()
    assert finding.state == "broken"
    assert finding.found.endswith(")")
    assert finding.advice.startswith("import the predictors again, or run: qnas predictors remove")


def test_the_compiler_for_the_myriad_x_is_told_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(myriad_compiler.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    finding = doctor._myriad_compiler()
    assert (finding.topic, finding.state) == ("myriad_compile", "missing")
    for part in ("openvino==2021.3.0", "--abi cp38", "chmod +x", "QNAS_MYRIAD_COMPILE"):
        assert part in finding.advice
    program = tmp_path / "myriad_compile"
    program.write_text("#!/bin/sh\necho 'Build .................. 2021.3.0-3029'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._myriad_compiler().found == f"{program}, version 2021.3.0"
    assert doctor._myriad_compiler().state == "ok"
    program.write_text("#!/bin/sh\necho 'libtbb.so.2: cannot open shared object file' >&2; exit 127\n")
    finding = doctor._myriad_compiler()
    assert finding.state == "broken"
    assert "libtbb.so.2" in finding.found
    monkeypatch.setenv(myriad_compiler.VARIABLE, str(tmp_path / "none"))
    assert doctor._myriad_compiler().found.startswith("QNAS_MYRIAD_COMPILE=")
