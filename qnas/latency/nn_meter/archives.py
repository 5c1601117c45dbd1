"""The files of a ZIP archive or a folder, read one by one and never unpacked.

Nothing is written to the disk, so a hostile name in an archive does no harm. Such an archive is refused
nevertheless, as are links, encrypted members, and files in more than one folder.
"""

import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO

from qnas.common.arguments import quoted
from qnas.common.arrays import DAMAGE, MEMBERS, check_member, open_zip
from qnas.common.errors import TableError, abbreviate, one_line


@dataclass(frozen=True)
class Member:
    """A file: its name without folders, its size in bytes, and how to read it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Archive:
    """The content of an archive; `titles` are its name and that of its top folder."""

    titles: tuple[str, ...]
    members: tuple[Member, ...]


@contextmanager
def open_archive(source: Path) -> Iterator[Archive]:
    """Open a ZIP archive or folder, whose files lie at its top or all in one folder there.

    Hidden files are ignored. Raises TableError where it is neither, where it holds anything other than
    files, and inside the block where the archive is damaged.
    """
    if source.is_dir():
        yield _folder(source)
        return
    if not source.is_file():
        raise TableError(f"{source}: no such file or folder")
    damaged = f"{source}: no ZIP archive, or a damaged one"
    with ExitStack() as opened:
        try:
            archive = opened.enter_context(open_zip(source))
        except OSError as error:
            raise TableError(f"{source}: cannot be read: {error.strerror or one_line(error)}") from error
        except DAMAGE as error:
            raise TableError(f"{damaged}: {one_line(error)}") from error
        try:
            yield _zip(archive, source)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise TableError(f"{damaged}: {one_line(error)}") from error


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return archive.open(info)
    except (OSError, *DAMAGE) as error:
        raise zipfile.BadZipFile(one_line(error)) from error


def _zip(archive: zipfile.ZipFile, source: Path) -> Archive:
    files: list[tuple[str, Member]] = []  # each with its folder
    for info in archive.infolist():
        where = f"{source}: {quoted(info.filename)}"
        parts = info.filename.removesuffix("/").split("/")
        if "\\" in info.filename or ":" in info.filename or {"", ".", ".."} & set(parts):
            raise TableError(f"{where}: a name that leads out of the archive")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise TableError(f"{where}: a link or device, expected files")
        if info.is_dir() or parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        try:
            check_member(info)
        except ValueError as error:
            raise TableError(f"{where}: {error}") from error
        files.append(
            ("/".join(parts[:-1]), Member(parts[-1], info.file_size, partial(_open_member, archive, info)))
        )
    return _archive(files, source)


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _folder(source: Path) -> Archive:
    files: list[tuple[str, Member]] = []
    top = _visible(source)
    if len(top) == 1 and top[0].is_dir() and not top[0].is_symlink():
        source = top[0]
    for path in _visible(source):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            raise TableError(f"{path}: a folder, expected files at the top or all in one folder")
        if not stat.S_ISREG(found.st_mode):
            raise TableError(f"{path}: a link or device, expected files")
        files.append(("", Member(path.name, found.st_size, partial(FileIO, path))))
    return _archive(files, source)


def _archive(files: list[tuple[str, Member]], source: Path) -> Archive:
    if len(files) > MEMBERS:
        raise TableError(f"{source}: {len(files)} files, expected at most {MEMBERS}")
    folders = sorted({folder for folder, _ in files})
    if len(folders) > 1 or any("/" in folder for folder in folders):
        raise TableError(
            f"{source}: files in {abbreviate([folder or 'the top' for folder in folders])}, "
            f"expected them at the top or all in one folder"
        )
    members = tuple(member for _, member in files)
    twice = sorted(name for name, count in Counter(member.name for member in members).items() if count > 1)
    if twice:
        raise TableError(f"{source}: {abbreviate(twice)}: there twice")
    stem = source.name if source.is_dir() else source.stem
    return Archive((stem, *folders), members)
