"""Atomic writing of files: a reader never sees a half-written file, and no other user's link is followed.

New files and folders are written under names that nobody can guess, created by this process alone
(O_EXCL, O_NOFOLLOW), and locked while it lives. What a killed process leaves is known by its name,
`.NAME.RANDOM.partial`, and by its free lock: `remove_leftovers` removes it.
"""

import csv
import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

# those of this version, and of earlier ones with the number of the process
_PARTIAL = re.compile(r"\.(.+)\.([0-9a-f]{16}|\d+)\.partial")
_NAME_CHARACTERS = 50  # of the final name that a partial one repeats: names have at most 255 bytes
_TRIES = 100  # of names and locks: each fails only where another process acts in the same moment


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to errors of writing that name no file, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to; its file replaces `path` when the block ends without an error.

    The file is there already, empty, with the permissions of a new file. On an error, an existing file at
    `path` stays, and no half-written file is left. Where `path` is a symbolic link, the link is replaced,
    not the file that it points to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), partial_file(path) as partial:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield a new empty file beside `path`, and remove it at the end if it is still there."""
    partial, handle = _create(path, _new_file)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)  # last: with its lock free, others take the file for left over


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`, and remove what is at its place at the end."""
    partial, handle = _create(path, _new_folder)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _create(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Return the path of a new file or folder, and its locked handle."""
    for _ in range(_TRIES):
        partial = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{secrets.token_hex(8)}.partial")
        handle = make(partial)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, where nobody removes what seems to be left over
            return partial, handle
        if _is_at(handle, partial):
            return partial, handle
        os.close(handle)  # another process took it for left over before it was locked
    raise OSError(errno.EAGAIN, "other processes keep removing it", str(path))


def _is_at(handle: int, path: Path) -> bool:
    """Return whether a handle's file or folder is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def is_partial(path: Path, name: str | None = None) -> bool:
    """Return whether a path is named like a partial file or folder, of any name or of this one."""
    match = _PARTIAL.fullmatch(path.name)
    return match is not None and (name is None or match[1] == name[:_NAME_CHARACTERS])


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the partial files and folders of processes that were killed, of any name or of this one."""
    for path in folder.iterdir():
        if is_partial(path, name):
            # one that cannot be opened or removed is another user's: it is in nobody's way
            with suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the process that writes it lives
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(handle)


@contextmanager
def holding(path: Path, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Hold a lock file, which the system releases when the process ends in any way, and remove it at the end.

    Where another process holds it, `busy` makes the exception from that process's number.
    """
    file = _lock(path)
    if file is None:
        raise busy(_holder(path))
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before its lock is free


def _holder(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            number = file.read(20)
    except OSError:
        number = ""  # it has just ended
    return number if number.isdecimal() else "?"


def _lock(path: Path) -> TextIO | None:
    """Return the open and locked file of a path; None if another process has locked it.

    A symbolic link is not followed: it raises OSError.
    """
    for _ in range(_TRIES):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        if _is_at(file.fileno(), path):
            return file
        file.close()  # its holder removed it between our opening and locking: try again
    return None


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that they survive a loss of power.

    A folder may be a symbolic link, a file may not.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if path.is_dir() else os.O_NOFOLLOW))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, all of it or nothing."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Return a JSON file's text."""
    return json.dumps(content, indent=2) + "\n"


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a CSV file's text; values of rows in other columns are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
