"""The files of a ZIP archive or a folder, read one by one and never unpacked.

Nothing is written for what an archive says, so a hostile name has nowhere to go. An archive with
one is refused all the same, as are links, encrypted members, and files in more than one folder: it
is not what it should be.
"""

import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qnas.common.errors import TableError

MAX_MEMBERS = 1000
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # a bound on memory, unlike the others


@dataclass(frozen=True)
class Member:
    """A file: its name without folders, its size in bytes, and how to read it."""

    name: str
    size: int
    open: Callable[[], BinaryIO]


@dataclass(frozen=True)
class Archive:
    """The content of an archive; `titles` are its name and that of its top folder."""

    titles: tuple[str, ...]
    members: tuple[Member, ...]


@contextmanager
def open_archive(source: Path) -> Iterator[Archive]:
    """Give the files of a ZIP archive or folder, which lie at its top or all in one folder there.

    Hidden files are passed over. Raises TableError where it is neither, where it holds what it should
    not, and inside the block where the archive turns out damaged.
    """
    if source.is_dir():
        yield _folder(source)
        return
    if not source.is_file():
        raise TableError(f"{source}: no such file or folder")
    try:
        with zipfile.ZipFile(source) as archive:
            yield _zip(archive, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise TableError(f"{source}: no ZIP archive, or a damaged one: {error}") from error


def _zip(archive: zipfile.ZipFile, source: Path) -> Archive:
    files: list[tuple[str, str, Member]] = []  # folder, name, member
    for info in archive.infolist():
        where = f"{source}: {info.filename[:200]!r}"
        parts = info.filename.removesuffix("/").split("/")
        if "\\" in info.filename or ":" in info.filename or {"", ".", ".."} & set(parts):
            raise TableError(f"{where}: a name that leads out of the archive")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise TableError(f"{where}: a link or device, expected files")
        if info.flag_bits & 0x1:
            raise TableError(f"{where}: encrypted, expected plain files")
        if info.is_dir() or parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        if info.compress_type not in _COMPRESSIONS:
            raise TableError(f"{where}: packed in an unusual way, expected deflated or stored files")
        member = Member(parts[-1], info.file_size, _opener(archive, info))
        files.append(("/".join(parts[:-1]), parts[-1], member))
    return _archive(files, source)


def _opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], BinaryIO]:
    def open_member() -> BinaryIO:
        return archive.open(info)  # type: ignore[return-value]  # IO[bytes], which is all that is used

    return open_member


def _folder(source: Path) -> Archive:
    files: list[tuple[str, str, Member]] = []
    visible = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    if len(visible) == 1 and visible[0].is_dir() and not visible[0].is_symlink():
        source = visible[0]
        visible = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    for path in visible:
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            raise TableError(f"{path}: a folder, expected files at the top or all in one folder")
        if not stat.S_ISREG(found.st_mode):
            raise TableError(f"{path}: a link or device, expected files")
        files.append(("", path.name, Member(path.name, found.st_size, _file_opener(path))))
    return _archive(files, source)


def _file_opener(path: Path) -> Callable[[], BinaryIO]:
    return lambda: path.open("rb")


def _archive(files: list[tuple[str, str, Member]], source: Path) -> Archive:
    if len(files) > MAX_MEMBERS:
        raise TableError(f"{source}: {len(files)} files, expected at most {MAX_MEMBERS}")
    folders = sorted({folder for folder, _, _ in files})
    if len(folders) > 1 or any("/" in folder for folder in folders):
        raise TableError(
            f"{source}: files in {', '.join(folder or 'the top' for folder in folders[:5])}, "
            f"expected them at the top or all in one folder"
        )
    names = [name for _, name, _ in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableError(f"{source}: {', '.join(twice[:5])}: there twice")
    stem = source.name if source.is_dir() else source.stem
    return Archive((stem, *folders), tuple(member for _, _, member in files))
