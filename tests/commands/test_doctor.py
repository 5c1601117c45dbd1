import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qnas.commands import doctor
from qnas.commands.cli import app
from qnas.nn.kernels import native


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_cache_that_others_can_write_is_told(tmp_path: Path) -> None:
    if native.find_compiler() is None:
        pytest.skip("no compiler here")
    folder = native.cache_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    native._load.cache_clear()
    try:
        finding = findings()["C++ kernels"]
    finally:
        native._load.cache_clear()
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
