import os
from pathlib import Path

import pytest

from qnas.common.errors import ArchError
from qnas.common.files import (
    atomic_path,
    holding,
    is_partial,
    partial_file,
    partial_folder,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)
from qnas.common.reading import read_json


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as partial:
            partial.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_the_old_file_is_seen_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_path(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent  # one file system, so that it can take its place
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_writers_make_folders_and_read_back(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text", "größer\n")
    write_bytes(tmp_path / "a" / "bytes", b"\x00\xff")
    write_json(tmp_path / "a" / "c.json", {"x": [1.5, None]})
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "größer\n".encode()
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"
    assert read_json(tmp_path / "a" / "c.json", ArchError) == {"x": [1.5, None]}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    kind: str, tmp_path: Path
) -> None:
    make = partial_file if kind == "file" else partial_folder
    (tmp_path / ".x.123456.partial").write_text("of an earlier version")
    (tmp_path / "x.0123456789abcdef.partial").write_text("not hidden")
    (tmp_path / ".other.0123456789abcdef.partial").mkdir()
    with make(tmp_path / "x") as alive:
        left = alive.with_name(".x.0123456789abcdef.partial")
        left.mkdir() if kind == "folder" else left.touch()
        remove_leftovers(tmp_path, "x")
        assert sorted(tmp_path.iterdir()) == sorted(
            [alive, tmp_path / ".other.0123456789abcdef.partial", tmp_path / "x.0123456789abcdef.partial"]
        )
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / "x.0123456789abcdef.partial"])
    assert not alive.exists()


def test_names_of_partial_files_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(5):
        with atomic_path(tmp_path / "x") as partial:
            names.add(partial.name)
            assert is_partial(partial, "x")
            assert not is_partial(partial, "y")
            assert str(os.getpid()) not in partial.name.split(".")
    assert len(names) == 5
    with atomic_path(tmp_path / ("long" * 60)) as partial:  # of 240 characters
        pass


@pytest.mark.parametrize("planted", ["link", "file"])
def test_a_file_planted_under_the_partial_name_is_not_written(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)  # if it could be foreseen
    victim = tmp_path / "victim"
    victim.write_text("precious")
    place = tmp_path / ".x.0000000000000000.partial"
    place.symlink_to(victim) if planted == "link" else place.write_text("planted")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "x", "mine")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "x").exists()


def test_a_link_put_in_the_place_of_the_partial_file_does_not_become_the_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")

    def write() -> None:
        with atomic_path(tmp_path / "x") as partial:
            partial.unlink()
            partial.symlink_to(tmp_path / "victim")

    with pytest.raises(OSError, match="symbolic links"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_where_the_path_is_a_link_it_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x").symlink_to("victim")
    write_text(tmp_path / "x", "mine")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "x").is_symlink()


def test_folders_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link" / "x", "mine")
    assert (tmp_path / "real" / "x").read_text() == "mine"


def test_new_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
        with partial_folder(tmp_path / "y") as folder:
            assert folder.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_lock_is_held_once_and_goes_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("killed")  # and left by its process
    with holding(lock, ValueError):
        assert lock.read_text() == str(os.getpid())
        with pytest.raises(ValueError, match=str(os.getpid())), holding(lock, ValueError):
            pass
    assert not lock.exists()
    (tmp_path / "victim").write_text("precious")
    lock.symlink_to("victim")
    with pytest.raises(OSError, match="lock"), holding(lock, ValueError):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
