"""The C++ kernels: compiled on first use if there is a compiler, then loaded from a cache.

All .cpp files of this folder form one shared object with a plain C interface, since compiling torch's
extension headers alone takes 18 s. The file's name is a digest of sources, compiler, flags and processor.
It is kept in $QNAS_HOME/kernels, or else in qnas/kernels of $XDG_CACHE_HOME or ~/.cache. Importing this
module builds nothing. If the build fails, there is one warning, and `library` returns None.
QNAS_KERNELS=0 turns the kernels off.

A library is code that runs with the user's rights. It is only loaded from a folder and a file that belong
to the user (or root) and that nobody else can write, and if the SHA-256 at its end is that of the rest. From
any other folder nothing is loaded: there is one warning, and the kernels are built for this process alone.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnas.common.files import partial_folder, remove_leftovers, sync
from qnas.common.host import cpu_name
from qnas.common.resources import user_cache

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
# Not all of -ffast-math: sums keep their order, so that results are the same on every run and for any
# number of threads, and NaN and infinity are preserved.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
BUILD_SECONDS = 600  # a build that takes longer has failed
_MARK = b"\nqnas-sha256:"  # at a library's end, with the digest of all before it: linkers ignore what follows
_MOST_BYTES = 100_000_000  # of a library, which has some 200 kB

# arguments of every kernel: sizes, the norm's epsilon, pointers to the inputs and to the outputs
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p)


class _Refused(Exception):  # noqa: N818  # not an error: the kernels are built instead
    """A file or folder is not to be trusted; the text says why."""


@dataclass(frozen=True)
class Native:
    """The loaded kernels and their file."""

    path: Path  # gone if the kernels were built for this process alone
    lanes: int  # floats in a vector: 16 with AVX-512
    _library: ctypes.CDLL


def library() -> Native | None:
    """Return the kernels, built on first use; None if they are turned off or cannot be built."""
    return _load() if is_enabled() else None


def is_enabled() -> bool:
    """Return whether the kernels are enabled: the environment variable QNAS_KERNELS is not 0."""
    return os.environ.get("QNAS_KERNELS", "") != "0"


def describe() -> dict[str, Any]:
    """Return the state of the kernels without building them: enabled, compiler, file, built, loaded."""
    compiler = find_compiler()
    try:
        version = None if compiler is None else _version(compiler)
    except (OSError, subprocess.SubprocessError):
        version = None
    path = None if compiler is None or version is None else cached_path(compiler)
    return {
        "enabled": is_enabled(),
        "compiler": version,
        "file": None if path is None else str(path),
        "built": path is not None and path.exists(),
        "loaded": _load.cache_info().currsize > 0 and _load() is not None,
        "refused": refused_folder(),
    }


def find_compiler() -> str | None:
    """Return the path of the compiler: $CXX, or else the first of COMPILERS that is installed."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Return the folder of built kernels: $QNAS_HOME/kernels, or else qnas/kernels in the user's cache."""
    return user_cache("kernels")


def cached_path(compiler: str) -> Path:
    """Return the path in the cache for a build of these sources by this compiler for this processor."""
    digest = hashlib.sha256()
    for part in (_version(compiler), cpu_name(), *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return cache_folder() / f"qnas-{digest.hexdigest()[:24]}.so"


def refused_folder() -> str:
    """Return why nothing is loaded from the cache's folder; an empty text where it is trusted or missing."""
    folder = cache_folder()
    try:
        _check_folder(folder)
    except FileNotFoundError:
        return ""
    except (OSError, _Refused) as error:
        return str(error)
    return ""


def build(compiler: str, path: Path) -> None:
    """Compile the sources into the shared object `path`, atomically, with its digest at the end.

    Several processes may build the same file at once: each writes its own, and the last one stays. The
    folder must be one that only this user can write. Raises OSError or subprocess.SubprocessError.
    """
    remove_leftovers(path.parent)
    with partial_folder(path) as folder:
        partial = folder / path.name
        sources = [str(source) for source in sorted(FOLDER.glob("*.cpp"))]
        command = [compiler, *FLAGS, *sources, "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        content = partial.read_bytes()
        partial.write_bytes(content + _MARK + hashlib.sha256(content).hexdigest().encode())
        partial.chmod(0o700)
        sync(partial)
        partial.replace(path)
        sync(path.parent)


_failures: list[Exception] = []  # of `_load`, which tries once


def failure() -> Exception | None:
    """Return why the kernels could not be built or loaded; None where they were not tried, or are there."""
    return _failures[-1] if _failures else None


@lru_cache(maxsize=1)
def _load() -> Native | None:
    compiler = find_compiler()
    if compiler is None:
        return None  # not an error: most machines that only run qnas have no compiler
    try:
        path = cached_path(compiler)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_folder(path.parent)
        except _Refused as error:
            _warn(f"{error}: the C++ kernels are built for this process alone")
            return _built_alone(compiler, path.name)
        try:
            return _open(path)
        except (OSError, _Refused):  # not there yet, damaged, or of others
            build(compiler, path)
            return _open(path)
    except (OSError, subprocess.SubprocessError, AttributeError, _Refused) as error:
        _failures.append(error)
        _warn(
            f"the C++ kernels could not be built ({_reason(error)}); torch's operators are used instead, "
            "which is slower. QNAS_KERNELS=0 turns the attempt off"
        )
        return None


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _built_alone(compiler: str, name: str) -> Native:
    """Build and load the kernels in a folder that is removed at once: a loaded library needs no file."""
    with tempfile.TemporaryDirectory(prefix="qnas-") as folder:
        path = Path(folder) / name
        build(compiler, path)
        return _open(path)


def _open(path: Path) -> Native:
    """Load a library if it is to be trusted. Raises OSError or _Refused."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_owner(path, os.fstat(handle), stat.S_ISREG)
        with open(handle, "rb", closefd=False) as file:
            content = file.read(min(_MOST_BYTES, os.fstat(handle).st_size) + 1)
        whole, _, digest = content.rpartition(_MARK)
        if digest != hashlib.sha256(whole).hexdigest().encode():
            raise _Refused(f"{path}: damaged: its SHA-256 does not match")
        # the file that was checked, whatever the path names by now; the handle stays open, since the system
        # takes two libraries of one name for the same
        checked = Path(f"/proc/self/fd/{handle}")
        loaded = ctypes.CDLL(str(checked if checked.exists() else path))
        return Native(path, int(loaded.qnas_lanes()), loaded)
    except BaseException:
        os.close(handle)
        raise


def _check_folder(folder: Path) -> None:
    """Raise _Refused if others own a folder or can write it.

    Whoever can write a folder above it could only exchange it for another one of this user.
    """
    _check_owner(folder, folder.stat(), stat.S_ISDIR)


def _check_owner(path: Path, found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(found.st_mode):
        raise _Refused(f"{path}: not a {'folder' if is_kind is stat.S_ISDIR else 'regular file'}")
    if found.st_uid not in (0, os.geteuid()):
        raise _Refused(f"{path}: belongs to another user (number {found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Refused(f"{path}: others can write it (chmod go-w {path})")


def call(
    name: str,
    sizes: Sequence[int],
    eps: float,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
) -> None:
    """Call a C++ kernel with the arguments that its source documents. Check `library` first.

    Tensors are float32, dense and on the CPU; None is a null pointer. The thread count follows the sizes.
    """
    numbers = struct.pack(f"{len(sizes) + 1}q", *sizes, torch.get_num_threads())  # twice as fast as ctypes
    _function(name)(numbers, eps, _places(inputs), _places(outputs))


def _places(tensors: Sequence[Tensor | None]) -> bytes:
    return struct.pack(f"{len(tensors)}P", *[0 if t is None else t.data_ptr() for t in tensors])


@lru_cache
def _function(name: str) -> Any:
    native = library()
    assert native is not None, "there are no C++ kernels here"
    return _SIGNATURE((name, native._library))


@lru_cache(maxsize=8)
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.partition("\n")[0].strip()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line.lower()]
        return lines[0].strip() if lines else f"{error.cmd[0]} ended with {error.returncode}"
    return str(error)
