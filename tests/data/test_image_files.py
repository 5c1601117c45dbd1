import io
import os
import tarfile
from pathlib import Path

import pytest
from helpers.pictures import load, numbered, png, write_tar
from helpers.places import SHARED

from qnas.common.errors import BrokenImageError, DataError, QnasError
from qnas.data.decoding import decode
from qnas.data.image_files import FILE_LIMIT_BYTES, OriginalFile, Stretch, tar_members
from qnas.data.sources import open_dataset


def original(path: Path) -> OriginalFile:
    return OriginalFile(path.name, str(path), path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_nothing_but_regular_files_is_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "socket":
            import socket

            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
    with pytest.raises(BrokenImageError, match=rf"^{path}: cannot be read: \S"):
        decode(original(path), 8)
    with pytest.raises(FileNotFoundError):
        original(path).size_bytes()
    original(path).stamp()


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])
def test_a_csv_that_names_a_pipe_or_a_device_has_broken_images(
    memory_limit_bytes: int, tmp_path: Path
) -> None:
    root = numbered(tmp_path, {"ant": 20, "bee": 20})
    os.mkfifo(root / "pipe.png")
    (root / "endless.png").symlink_to("/dev/zero")
    (root / "folder.png").mkdir()
    names = ["pipe.png", "endless.png", "folder.png", "ant/000.png/x.png", "missing.png"]
    rows = [f"{name},ant" for name in names]
    rows += [f"{folder}/{i:03}.png,{folder}" for folder in ("ant", "bee") for i in range(20)]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))
    data = load(root / "labels.csv", max_broken=0.2, memory_limit_bytes=memory_limit_bytes)
    assert [Path(each.file).name for each in data.broken] == [Path(name).name for name in names]
    assert sum(data.counts.values()) == 40


def test_names_that_no_file_can_have_are_missing_files() -> None:
    path = Path("a\0b.png")
    with pytest.raises(BrokenImageError, match="no such file"):
        decode(OriginalFile("x", "x", path), 8)
    with pytest.raises(FileNotFoundError):
        original(path).size_bytes()
    assert original(path).stamp().endswith("missing")


def test_too_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with path.open("wb") as file:
        file.truncate(FILE_LIMIT_BYTES + 1)
    for content in (path, Stretch(path, 0, FILE_LIMIT_BYTES + 1), Stretch(path, 5, 2**62)):
        with pytest.raises(
            BrokenImageError, match=r"cannot be read: .* bytes, expected at most 1,000,000,000"
        ):
            decode(OriginalFile("x", "x", content), 8)
        assert OriginalFile("x", "x", content).read(10) == bytes(10)


def headers(content: bytes) -> list[tarfile.TarInfo]:
    return list(tar_members(io.BytesIO(content)))


def broken_header(field: slice, value: bytes) -> bytes:
    """Return a tar of one image, of whose header a field is changed and the checksum right."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        info = tarfile.TarInfo("a/0.png")
        info.size = len(png((1, 2, 3)))
        file.addfile(info, io.BytesIO(png((1, 2, 3))))
    content = bytearray(tar.getvalue())
    content[field] = value
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


SIZE = slice(124, 136)


@pytest.mark.parametrize(
    "value",
    [
        b"\x80" + b"\xff" * 11,
        b"\x80\0\0\0\x7f" + b"\xff" * 7,
        b"\xff" * 12,
        b"\xff" * 10 + b"\xfe\0",  # -512: the next header is this one again
        b"\xff" * 11 + b"\0",
        b"77777777777\0",
        b"00000777777\0",
    ],
)
def test_a_tar_whose_member_is_larger_than_it_is_damaged(value: bytes, tmp_path: Path) -> None:
    content = broken_header(SIZE, value)
    with pytest.raises(tarfile.TarError):
        headers(content)
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar: damaged: [^\n]+$"):
        open_dataset(f"shards:{tmp_path}")


def test_the_members_of_a_whole_tar_are_listed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", png((1, 1, 1))), ("b.cls", b"0")])
    assert [member.name for member in headers(path.read_bytes())] == ["a.png", "b.cls"]


@pytest.mark.skipif(not (SHARED / "faults").is_dir(), reason="the shared inputs are not there")
@pytest.mark.parametrize("fault", [path.name for path in sorted((SHARED / "faults").glob("targz__*"))])
def test_the_shared_archives_are_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes((SHARED / "faults" / fault).read_bytes())
    with pytest.raises(QnasError, match=r"^[^\n]+$"):
        open_dataset(f"imagefolder:{path}")
