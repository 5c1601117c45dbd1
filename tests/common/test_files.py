from pathlib import Path

import pytest

from qnas.common.errors import ArchError
from qnas.common.files import atomic_path, staged, write_bytes, write_json, write_text
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


def test_staged_files_come_together_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with staged(folder) as stage:
        write_text(stage / "one", "1")
        write_text(stage / "two", "2")
        assert list(folder.iterdir()) == [stage]  # nothing is there yet
    with staged(folder) as stage:
        write_text(stage / "two", "new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"one": "1", "two": "new"}


def test_what_fails_while_staged_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("before")
    for folder in (tmp_path, tmp_path / "new" / "deep"):

        def fail(folder: Path = folder) -> None:
            with staged(folder) as stage:
                write_text(stage / "kept", "half")
                raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011  # it has no message
            fail()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "before"
