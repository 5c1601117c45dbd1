"""Building and loading: no failure stops a program, nothing is built twice, no file is partial."""

import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnas.nn.kernels import native

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
LANES = 'extern "C" int qnas_lanes() { return 4; }\n'


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sources that compile in a moment, and a cache of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "lanes.cpp").write_text(LANES)
    monkeypatch.setattr(native, "FOLDER", folder)
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QNAS_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    native._load.cache_clear()
    native._version.cache_clear()
    yield folder
    native._load.cache_clear()
    native._version.cache_clear()


def compiler_in(folder: Path, body: str) -> str:
    """A program that says it is a compiler."""
    program = folder / "fake-compiler"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@needs_compiler
def test_second_load_does_not_compile(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.library()
    assert first is not None
    assert first.lanes == 4
    assert first.path.parent == native.cache_folder()
    native._load.cache_clear()

    def refuse(compiler: str, path: Path) -> None:
        raise AssertionError(f"compiled {path} again")

    monkeypatch.setattr(native, "build", refuse)
    second = native.library()
    assert second is not None
    assert second.path == first.path


@needs_compiler
def test_nothing_but_the_shared_object_is_left_in_the_cache(small: Path) -> None:
    loaded = native.library()
    assert loaded is not None
    assert list(native.cache_folder().iterdir()) == [loaded.path]


@needs_compiler
def test_file_changes_with_source_header_compiler_and_processor(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = native.find_compiler()
    assert compiler is not None
    paths = [native.cached_path(compiler)]
    (small / "lanes.cpp").write_text(LANES + "// changed\n")
    paths.append(native.cached_path(compiler))
    (small / "more.h").write_text("// new\n")
    paths.append(native.cached_path(compiler))
    monkeypatch.setattr(native, "cpu_name", lambda: "another processor")
    paths.append(native.cached_path(compiler))
    paths.append(native.cached_path(compiler_in(small, "echo another compiler")))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    paths.append(native.cached_path(compiler))
    assert len(set(paths)) == len(paths)


def test_failed_build_is_one_warning_with_the_compilers_error(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'if [ "$1" = --version ]; then echo 1.0; else echo "x.cpp:1: error: broken" >&2; exit 1; fi'
    monkeypatch.setenv("CXX", compiler_in(small, body))
    with pytest.warns(RuntimeWarning, match=r"could not be built \(x.cpp:1: error: broken\)"):
        assert native.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
    assert not list(native.cache_folder().iterdir())


def test_compiler_that_cannot_say_its_version_is_one_warning(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler_in(small, "exit 3"))
    with pytest.warns(RuntimeWarning, match="ended with 3"):
        assert native.library() is None
    assert native.describe()["compiler"] is None


@needs_compiler
def test_cache_that_cannot_be_written_is_one_warning(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="could not be built"):
        assert native.library() is None


@needs_compiler
def test_damaged_file_in_the_cache_is_built_anew(small: Path) -> None:
    compiler = native.find_compiler()
    assert compiler is not None
    path = native.cached_path(compiler)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a shared object")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is not None


def built(small: Path) -> Path:
    """Return the path of a library that was built and is not loaded now."""
    loaded = native.library()
    assert loaded is not None
    native._load.cache_clear()
    return loaded.path


def inode(path: Path) -> int:
    return path.stat().st_ino


@needs_compiler
@pytest.mark.parametrize("place", [0, 100, -80, -1])
def test_a_library_with_one_other_bit_is_built_anew(place: int, small: Path) -> None:
    path = built(small)
    whole = path.read_bytes()
    content = bytearray(whole)
    content[place] ^= 1
    path.write_bytes(content)
    assert native.library() is not None
    assert path.read_bytes() == whole


@needs_compiler
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_is_built_anew(mode: int, small: Path) -> None:
    path = built(small)
    path.chmod(mode)
    before = inode(path)
    assert native.library() is not None
    assert inode(path) != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@needs_compiler
def test_a_link_in_the_place_of_a_library_is_not_followed(small: Path, tmp_path: Path) -> None:
    path = built(small)
    elsewhere = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(elsewhere)
    assert native.library() is not None
    assert not path.is_symlink()


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_loaded(
    which: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(small)
    os.chown(path.parent if which == "folder" else path, 12345, -1)
    before = inode(path)
    if which == "file":
        assert native.library() is not None
        assert inode(path) != before
        return
    opened: list[Path] = []
    open_ = native._open

    def watched(path: Path) -> native.Native:
        opened.append(path)
        return open_(path)

    monkeypatch.setattr(native, "_open", watched)
    with pytest.warns(
        RuntimeWarning, match=r"belongs to another user \(number 12345\): the C\+\+ kernels are"
    ):
        assert native.library() is not None
    assert path not in opened
    assert inode(path) == before
    assert "belongs to another user" in native.describe()["refused"]


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_from_a_folder_that_others_can_write_nothing_is_loaded(
    mode: int, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = native.find_compiler()
    assert compiler is not None
    path = native.cached_path(compiler)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"planted")
    path.parent.chmod(mode)
    with pytest.warns(
        RuntimeWarning, match=r"others can write it \(chmod go-w .*for this process alone$"
    ) as told:
        loaded = native.library()
    assert len(told) == 1
    assert loaded is not None
    assert loaded.lanes == 4
    assert loaded.path != path
    assert not loaded.path.exists()
    assert path.read_bytes() == b"planted"
    assert list(path.parent.iterdir()) == [path]


@needs_compiler
def test_new_folders_of_the_cache_are_only_for_the_user(small: Path) -> None:
    before = os.umask(0)
    try:
        path = built(small)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert native.refused_folder() == ""


@needs_compiler
def test_what_a_killed_build_left_is_removed_by_the_next(small: Path) -> None:
    path = built(small)
    path.unlink()
    left = path.with_name(f".{path.name}.0123456789abcdef.partial")
    left.mkdir()
    (left / path.name).write_bytes(b"half")
    assert native.library() is not None
    assert list(path.parent.iterdir()) == [path]


def test_without_a_compiler_there_is_no_warning(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
    assert native.describe() == {
        "enabled": True,
        "compiler": None,
        "file": None,
        "built": False,
        "loaded": False,
        "refused": "",
    }


def test_switch_turns_the_kernels_off_and_on_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNAS_KERNELS", "0")
    monkeypatch.setattr(native, "find_compiler", lambda: pytest.fail("looked for a compiler"))
    assert native.library() is None
    monkeypatch.undo()
    assert native.is_enabled()


@needs_compiler
def test_describe_says_what_is_there_and_builds_nothing(small: Path) -> None:
    before = native.describe()
    assert (before["built"], before["loaded"]) == (False, False)
    assert not native.cache_folder().exists()
    loaded = native.library()
    assert loaded is not None
    after = native.describe()
    assert (after["file"], after["built"], after["loaded"]) == (str(loaded.path), True, True)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNAS_HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("QNAS_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / "qnas" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "qnas" / "kernels"


@needs_compiler
def test_two_processes_may_build_at_once(small: Path, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from qnas.nn.kernels import native;"
        f"native.FOLDER = pathlib.Path({str(small)!r}); sys.exit(native.library() is None)"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    running = [subprocess.Popen(command, env=os.environ) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(list(native.cache_folder().iterdir())) == 1


@needs_compiler
def test_importing_builds_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "QNAS_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import qnas.nn.kernels.mixer"], env=environment, check=True)
    assert not (tmp_path / "kernels").exists()
