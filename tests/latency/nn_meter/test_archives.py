import io
import os
import stat
import zipfile
from pathlib import Path

import pytest
from helpers.pickled_forests import write_zip

from qnas.common.errors import TableError
from qnas.latency.nn_meter.archives import open_archive

FILES = {"a.pkl": b"aaa", "b.pkl": b"bbbb"}


def contents(source: Path) -> dict[str, bytes]:
    with open_archive(source) as archive:
        found = {}
        for member in archive.members:
            with member.open() as stream:
                found[member.name] = stream.read()
            assert member.size == len(found[member.name])
    return found


def refused(source: Path) -> str:
    with pytest.raises(TableError, match=source.name) as caught:
        contents(source)
    return str(caught.value)


def add(path: Path, name: str, content: bytes = b"", mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = name  # as it is: the constructor cleans names
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return path


def test_zip_and_folder_hold_the_same_files(tmp_path: Path) -> None:
    for folder in ("", "top"):
        archive = write_zip(tmp_path / f"z{folder}.zip", FILES, folder)
        assert contents(archive) == FILES
        place = tmp_path / f"d{folder}" / folder
        place.mkdir(parents=True)
        for name, content in FILES.items():
            (place / name).write_bytes(content)
        assert contents(tmp_path / f"d{folder}") == FILES


def test_an_archive_goes_by_its_own_name_and_its_top_folders(tmp_path: Path) -> None:
    with open_archive(write_zip(tmp_path / "mine.zip", FILES, "theirs")) as archive:
        assert set(archive.titles) == {"mine", "theirs"}


def test_what_other_systems_add_is_passed_over(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES, "top")
    add(path, "__MACOSX/top/._a.pkl", b"x")
    add(path, "top/.DS_Store", b"x")
    add(path, "top/", mode=stat.S_IFDIR | 0o755)
    assert contents(path) == FILES


@pytest.mark.parametrize(
    "name",
    [
        "../a.pkl",
        "top/../../a.pkl",
        "/etc/a.pkl",
        "C:/a.pkl",
        "..\\a.pkl",
        "top\\a.pkl",
        "./a.pkl",
        "a//b.pkl",
    ],
)
def test_names_that_lead_out_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    path = add(write_zip(tmp_path / "a.zip", FILES), name, b"x")
    assert "leads out of the archive" in refused(path)
    assert os.listdir(tmp_path) == ["a.zip"]


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    for i, kind in enumerate((stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)):
        assert "a link or device" in refused(
            add(tmp_path / f"{i}.zip", "a.pkl", b"/etc/passwd", kind | 0o777)
        )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.pkl").symlink_to("/etc/passwd")
    with pytest.raises(TableError, match="a link or device"):
        contents(folder)
    (folder / "a.pkl").unlink()
    os.mkfifo(folder / "a.pkl")
    with pytest.raises(TableError, match="a link or device"):
        contents(folder)


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flags of the first entry
    path.write_bytes(content)
    assert "encrypted" in refused(path)


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.pkl", b"x" * 100)
    assert "unusual way" in refused(path)


def test_files_in_several_folders_are_refused(tmp_path: Path) -> None:
    assert "one folder" in refused(add(write_zip(tmp_path / "a.zip", FILES), "top/c.pkl"))
    assert "one folder" in refused(add(write_zip(tmp_path / "b.zip", FILES, "top"), "other/c.pkl"))
    assert "one folder" in refused(write_zip(tmp_path / "c.zip", FILES, "top/deep"))
    (tmp_path / "d" / "deep").mkdir(parents=True)
    (tmp_path / "d" / "a.pkl").write_bytes(b"")
    with pytest.raises(TableError, match="one folder"):
        contents(tmp_path / "d")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert "a.pkl: there twice" in refused(add(write_zip(tmp_path / "a.zip", FILES), "a.pkl", b"x"))


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {f"{i}.pkl": b"" for i in range(1001)})
    assert "1001 members, expected at most 1000" in refused(path)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.zip")
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    assert "no ZIP archive" in refused(tmp_path / "a.zip")


def test_damage_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.pkl", b"0123456789" * 10)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0123456789", b"012345678X", 1))
    assert "damaged" in refused(path)


def test_a_member_gives_no_more_than_it_declares(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pkl", bytes(1 << 20))
    content = packed.getvalue()
    size = (1 << 20).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    assert "damaged" in refused(tmp_path / "a.zip")
