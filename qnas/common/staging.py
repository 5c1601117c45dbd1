"""Folders whose files are replaced together: at any moment a reader finds the former files or the new ones.

The new files are written into a hidden folder beside the real one, `.NAME.RANDOM.partial`. Files of others
in the real one come along as hard links, so they stay the same files. Then the two folders exchange their
names in one system call (Linux: renameat2 with RENAME_EXCHANGE), and the former is removed.

Where that cannot be done (on other systems and some file systems, where the folder is mounted on its own or
is the current folder of this process, or where its parent cannot be written), the new files are moved into
the folder one by one. The files that stand for the whole are then removed first and come last, so that they
never stand beside files of which they do not speak.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from qnas.common.files import holding, naming, partial_folder, remove_leftovers, sync

MOST_ENTRIES = 10_000  # of others in the folder: more are not linked
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# of a link or an exchange that cannot be done here
_IMPOSSIBLE = {errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS}
_IMPOSSIBLE |= {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


@contextmanager
def one_writer(folder: Path, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Let one process at a time replace a folder's files, and remove what killed ones left.

    `busy` makes the exception from the number of the process that is at it. Parents are made; on an error,
    those that stay empty are removed.
    """
    real = folder.resolve()
    made = [path for path in real.parents if not path.exists()]
    real.parent.mkdir(parents=True, exist_ok=True)
    place = _place(real)
    try:
        with naming(folder), holding(place / f".{real.name}.lock", busy):
            for where in {place, real} if real.is_dir() else {place}:
                remove_leftovers(where, real.name)
            yield
    finally:
        for path in made:
            with suppress(OSError):  # a folder that is not empty stays
                path.rmdir()


@contextmanager
def staged(folder: Path, *, without: Collection[str] = (), last: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder; its files replace those of `folder` when the block ends without an error.

    Other files stay, except those named in `without`. `last` names the files that stand for the whole. On an
    error, `folder` stays as it is. Call it within `one_writer`.
    """
    real = folder.resolve()
    with naming(folder), partial_folder(_place(real) / real.name) as stage:
        yield stage
        written = sorted(path.name for path in stage.iterdir())
        for name in written:
            sync(stage / name)
        if not real.exists():
            sync(stage)
            stage.rename(real)
            sync(real.parent)
        elif not _exchanged(stage, real, {*written, *without}):
            _move_in(stage, real, written, without, last)


def _place(real: Path) -> Path:
    """Return the folder for the lock and the new files: the parent, or the folder where that cannot be."""
    parent = real.parent
    if not real.exists():
        return parent
    is_beside = not os.path.ismount(real) and real.stat().st_dev == parent.stat().st_dev
    return parent if is_beside and os.access(parent, os.W_OK | os.X_OK) else real


def _exchanged(stage: Path, real: Path, own: Collection[str]) -> bool:
    """Exchange two folders once the stage has all files except `own` of the real one; False if impossible."""
    if stage.parent == real or _is_current(real):
        return False
    if len(list(islice(real.rglob("*"), MOST_ENTRIES + 1))) > MOST_ENTRIES:
        return False

    def ours(folder: str, names: list[str]) -> Collection[str]:
        return own if Path(folder) == real else ()

    try:
        # the permissions of the folder come along as well
        shutil.copytree(real, stage, symlinks=True, copy_function=os.link, ignore=ours, dirs_exist_ok=True)
    except OSError:  # file systems without links, another file system inside: see `_move_in`
        return False
    linked = {path.relative_to(stage): path.lstat().st_ino for path in stage.rglob("*")}
    sync(stage)
    try:
        _exchange(stage, real)
    except OSError as error:
        if error.errno not in _IMPOSSIBLE:
            raise
        return False
    sync(real.parent)
    _bring_late(stage, real, linked, own)
    return True


def _is_current(real: Path) -> bool:
    """Return whether this process works in the folder: it would go on in the former one, which is removed."""
    try:
        current = Path.cwd()
    except FileNotFoundError:
        return False
    return current == real or real in current.parents


def _exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders in one step. Raises OSError."""
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as Python's own functions tell
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _bring_late(former: Path, real: Path, linked: dict[Path, int], own: Collection[str]) -> None:
    """Bring along the files that others wrote into the former folder while its files were being linked."""
    for path in sorted(former.rglob("*")):
        place = path.relative_to(former)
        if place.parts[0] in own:
            continue
        if path.is_dir() and not path.is_symlink():
            (real / place).mkdir(exist_ok=True)
        elif linked.get(place) != path.lstat().st_ino:
            path.replace(real / place)


def _move_in(
    stage: Path, real: Path, written: Collection[str], without: Collection[str], last: Collection[str]
) -> None:
    """Move the files into the folder one by one, those that stand for the whole last."""
    inner = real / stage.name
    try:
        if inner != stage:
            shutil.move(stage, inner)  # to the file system of the folder
        for name in (*last, *without):
            (real / name).unlink(missing_ok=True)
        for name in sorted(written, key=lambda name: name in last):
            (inner / name).replace(real / name)
        sync(real)
    finally:
        shutil.rmtree(inner, ignore_errors=True)
