"""Folders whose files are replaced together, killed at any of their file operations."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.killed import every_kill

from qnas.common import staging
from qnas.common.errors import CheckpointError
from qnas.common.files import write_text
from qnas.common.staging import one_writer, staged

FORMER = {"card": "former", "a": "former", "old": "former", "notes.txt": "mine", "sub/deep/x": "mine"}
NEW = {"card": "new", "a": "new", "b": "new", "notes.txt": "mine", "sub/deep/x": "mine"}


def busy(process: str) -> CheckpointError:
    return CheckpointError(f"process {process} is at it")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def replace(folder: Path) -> None:
    with one_writer(folder, busy), staged(folder, without=("old",), last=("card",)) as stage:
        for name in ("a", "b", "card"):
            write_text(stage / name, "new")


def impossible(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, "not here")


def test_files_come_together_and_others_stay_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with one_writer(folder, busy), staged(folder) as stage:
        write(stage, FORMER)
        assert not folder.exists()  # nothing is there yet
    folder.chmod(0o750)
    notes = (folder / "notes.txt").stat().st_ino
    (folder / "link").symlink_to("nowhere")
    (folder / "empty").mkdir()
    replace(folder)
    assert contents(folder) == NEW
    assert (folder / "notes.txt").stat().st_ino == notes
    assert os.readlink(folder / "link") == "nowhere"
    assert (folder / "empty").is_dir()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("stood_before", [False, True])
def test_killed_at_any_operation_the_files_are_the_former_or_the_new(
    stood_before: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "all" / "out"
    new = NEW if stood_before else {"card": "new", "a": "new", "b": "new"}
    seen = []

    def prepare() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        if stood_before:
            write(folder, FORMER)

    def check() -> None:
        seen.append(contents(folder))
        assert seen[-1] in ((FORMER if stood_before else {}), new)
        if not stood_before:
            assert folder.exists() == (seen[-1] == new)  # nor is there an empty folder
        others = [path.name for path in folder.parent.iterdir() if path != folder]
        assert all(name.startswith(".out.") for name in others), others
        replace(folder)  # what the killed one left is no obstacle, and goes
        assert contents(folder) == new
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    operations = every_kill(lambda: replace(folder), tmp_path, prepare, check)
    assert operations > 20
    assert any(found != new for found in seen[1:])
    assert seen[-1] == seen[-2] == new


def test_where_folders_cannot_be_exchanged_the_card_never_stands_beside_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_exchange", impossible)
    folder = tmp_path / "all" / "out"

    def prepare() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        write(folder, FORMER)

    def check() -> None:
        visible = {name: text for name, text in contents(folder).items() if not name.startswith(".")}
        assert {"notes.txt": "mine", "sub/deep/x": "mine"}.items() <= visible.items()
        if "card" in visible:
            assert visible in (FORMER, NEW)
        replace(folder)
        assert contents(folder) == NEW
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    assert every_kill(lambda: replace(folder), tmp_path, prepare, check) > 20


def test_in_the_current_folder_of_the_process_files_are_moved_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write(folder, FORMER)
    monkeypatch.chdir(folder)
    replace(Path())
    assert contents(Path()) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to_mount", [False, True])
def test_where_the_parent_is_of_no_use_all_happens_inside(
    to_mount: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write(folder, FORMER)
    if to_mount:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    mkdir = Path.mkdir

    def watched(self: Path, *arguments: object, **options: object) -> None:
        assert self.parent != tmp_path or self == folder
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(Path, "mkdir", watched)
    replace(folder)
    assert contents(folder) == NEW


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with one_writer(folder, busy):
        with pytest.raises(CheckpointError, match=f"^process {os.getpid()} is at it$"):
            replace(folder)
        with one_writer(tmp_path / "other", busy):
            pass
    replace(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_through_a_link_the_folder_behind_it_is_meant(tmp_path: Path) -> None:
    write(tmp_path / "real", FORMER)
    (tmp_path / "link").symlink_to("real")
    with one_writer(tmp_path / "real", busy), pytest.raises(CheckpointError):
        replace(tmp_path / "link")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == NEW


def test_what_others_write_in_the_last_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, exchange = tmp_path / "out", staging._exchange
    write(folder, FORMER)

    def late(one: Path, other: Path) -> None:
        write(other, {"late/new": "mine", "next.txt": "mine"})
        write_text(other / "notes.txt", "changed")
        exchange(one, other)

    monkeypatch.setattr(staging, "_exchange", late)
    replace(folder)
    assert contents(folder) == {**NEW, "late/new": "mine", "next.txt": "mine", "notes.txt": "changed"}


@pytest.mark.parametrize("make", [lambda path: None, lambda path: write(path, FORMER)])
def test_what_fails_leaves_all_as_it_was(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep" / "out"
    make(folder)
    before = contents(folder)

    def fail() -> None:
        with one_writer(folder, busy), staged(folder) as stage:
            write_text(stage / "a", "half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # it has no message
        fail()
    assert contents(folder) == before
    if not before:
        assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.lock").symlink_to("victim")
    with pytest.raises(OSError, match=r"\.out\.lock"):
        replace(tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "precious"
