"""The compiler as a program that may be missing, refuse, hang, or write nothing."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qnas.common.errors import ExportError, UsageError
from qnas.deploy.export import myriad_compiler
from qnas.deploy.export.myriad_compiler import (
    PROGRAM,
    VARIABLE,
    compile_blob,
    compiler_version,
    find_compiler,
)

Make = Callable[..., Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return what writes a program in Python under the compiler's name."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")

    def make(body: str, folder: str = "libs") -> Path:
        path = tmp_path / folder / PROGRAM
        path.parent.mkdir()
        path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def test_the_environment_goes_before_the_path(program: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_compiler() is None
    on_path, named = program("", "path"), program("", "named")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_compiler() == on_path
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_compiler() == named


def test_a_file_that_is_no_program_is_told(program: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program("")
    path.chmod(0o644)
    for asked in (path, path.parent, path.with_name("none")):
        monkeypatch.setenv(VARIABLE, str(asked))
        with pytest.raises(UsageError, match=f"^{VARIABLE}={asked}: no program that may be run"):
            find_compiler()


def test_it_gets_the_files_its_libraries_and_an_empty_folder(program: Make, tmp_path: Path) -> None:
    compiler = program(
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert open(given['-m']).read() == 'model' and given['-ip'] == given['-op'] == 'FP32', given\n"
        "assert not os.listdir(), os.listdir()\n"
        "open(given['-o'], 'w').write(os.environ['LD_LIBRARY_PATH'].split(os.pathsep)[0])"
    )
    (tmp_path / "model.onnx").write_text("model", encoding="utf-8")
    compile_blob(compiler, tmp_path / "model.onnx", tmp_path / "model.blob", "file")
    assert (tmp_path / "model.blob").read_text(encoding="utf-8") == str(compiler.parent)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "sys.exit('[ ERROR ]\\n/ci/passes/adjust.cpp:226 [Internal Error]: no memory for a pool')",
            "file: not written: myriad_compile refuses it: no memory for a pool",
        ),
        ("sys.exit('Unsupported operation: MVN')", "refuses it: Unsupported operation: MVN"),
        ("sys.exit(3)", "refuses it: it says nothing, exit code 3"),
        ("os.kill(os.getpid(), 11)", "refuses it: it says nothing, killed by signal 11"),
        ("sys.stderr.write('x' * 10000); sys.exit(1)", "refuses it: x{147}"),
        ("", "file: not written: myriad_compile has written no blob: it says nothing, exit code 0"),
        ("open(sys.argv[4], 'w').close()", "has written no blob"),
        ("time.sleep(60)", "file: myriad_compile has not ended within 0.5 s"),
    ],
)
def test_what_fails_is_told_in_one_line(body: str, message: str, program: Make, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as error:
        compile_blob(program(body), tmp_path / "m.onnx", tmp_path / "m.blob", "file", seconds=_patience(body))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


def _patience(body: str) -> float:
    return 0.5 if "sleep" in body else 60


def test_a_program_of_another_machine_is_told(tmp_path: Path) -> None:
    path = tmp_path / PROGRAM
    path.write_bytes(b"\x7fELF of another machine")
    path.chmod(0o755)
    with pytest.raises(ExportError, match="file: myriad_compile does not run: "):
        compile_blob(path, tmp_path / "m.onnx", tmp_path / "m.blob", "file")
    with pytest.raises(UsageError, match="does not run: "):
        compiler_version(path)


def test_its_version_is_read(program: Make) -> None:
    says = "print('API version ............ 2.1\\nBuild .................. 2021.3.0-3029-a8827a2ec28')"
    assert compiler_version(program(f"assert sys.argv[1:] == ['-h']\n{says}")) == "2021.3.0"
    assert compiler_version(program("", "other")) == ""
    with pytest.raises(UsageError, match=r"does not run: libtbb\.so: no such file"):
        compiler_version(program("sys.exit('libtbb.so: no such file')", "third"))


def test_how_to_get_it_names_no_host() -> None:
    assert "openvino==2021.3.0" in myriad_compiler.HOW_TO_GET
    assert "http" not in myriad_compiler.HOW_TO_GET
