"""The C++ kernels: compiled on first use if there is a compiler, then loaded from a cache.

All .cpp files of this folder form one shared object with a plain C interface, since compiling torch's
extension headers alone takes 18 s. The file's name is a digest of sources, compiler, flags and processor.
It is kept in $QNAS_HOME/kernels, or else in qnas/kernels of $XDG_CACHE_HOME or ~/.cache. Importing this
module builds nothing. If the build fails, there is one warning, and `library` returns None.
QNAS_KERNELS=0 turns the kernels off.
"""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnas.common.files import atomic_path
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

# arguments of every kernel: sizes, the norm's epsilon, pointers to the inputs and to the outputs
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Native:
    """The loaded kernels and their file."""

    path: Path
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


def build(compiler: str, path: Path) -> None:
    """Compile the sources into the shared object `path`, atomically.

    Several processes may build the same file at once: each writes its own, and the last one stays.
    Raises OSError or subprocess.SubprocessError.
    """
    with atomic_path(path) as partial:
        sources = [str(source) for source in sorted(FOLDER.glob("*.cpp"))]
        command = [compiler, *FLAGS, *sources, "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)


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
        if not path.exists():
            build(compiler, path)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # a damaged file
            build(compiler, path)
            loaded = ctypes.CDLL(str(path))
        return Native(path, int(loaded.qnas_lanes()), loaded)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _failures.append(error)
        warnings.warn(
            f"the C++ kernels could not be built ({_reason(error)}); torch's operators are used instead, "
            "which is slower. QNAS_KERNELS=0 turns the attempt off",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


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
