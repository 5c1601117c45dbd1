"""The compiler for the Myriad X, `myriad_compile`: a program in OpenVINO 2021.3 that needs no device.

It makes a blob, which an application loads without compiling, and refuses what the device does not run.
OpenVINO's `query_network` does not: it says "supported" of networks that the compiler refuses.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from qnas.common.errors import ExportError, UsageError, one_line

PROGRAM = "myriad_compile"
VARIABLE = "QNAS_MYRIAD_COMPILE"  # an environment variable with the path of the program
SECONDS = 600  # for one network; a large one takes half a minute
HOW_TO_GET = (
    "pip download --no-deps --only-binary=:all: --python-version 3.8 --implementation cp --abi cp38 "
    "--platform manylinux2014_x86_64 openvino==2021.3.0; unpack it with python -m zipfile -e; chmod +x "
    f"openvino/libs/{PROGRAM}; set {VARIABLE} to its path"
)


def find_compiler() -> Path | None:
    """Return the compiler's path, from the environment or the PATH; None if there is none.

    Raises UsageError if the environment names a file that is no program.
    """
    if asked := os.environ.get(VARIABLE):
        path = Path(asked).absolute()
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise UsageError(f"{VARIABLE}={one_line(asked)}: no program that may be run (chmod +x makes one)")
        return path
    found = shutil.which(PROGRAM)
    return Path(found).absolute() if found else None


def compiler_version(compiler: Path) -> str:
    """Return the version, such as `2021.3.0`, "" if it does not say. Raises UsageError if it does not run."""
    try:
        done = _run(compiler, ["-h"], seconds=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{compiler}: does not run: {one_line(error)}") from error
    if done.returncode:
        raise UsageError(f"{compiler}: does not run: {_reason(done)}")
    found = re.search(r"Build[ .]*(\d+\.\d+(?:\.\d+)?)", done.stdout)
    return found[1] if found else ""


def compile_blob(compiler: Path, model: Path, blob: Path, where: str, *, seconds: float = SECONDS) -> None:
    """Compile an ONNX file or an IR for the Myriad X, with float32 images and logits.

    Raises ExportError if the compiler refuses it, does not end within this time, or writes nothing.
    """
    wanted = ["-m", str(model.absolute()), "-o", str(blob.absolute()), "-ip", "FP32", "-op", "FP32"]
    try:
        done = _run(compiler, wanted, seconds)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{where}: {PROGRAM} has not ended within {seconds:g} s") from error
    except OSError as error:
        raise ExportError(f"{where}: {PROGRAM} does not run: {one_line(error)}") from error
    if done.returncode:
        raise ExportError(f"{where}: not written: {PROGRAM} refuses it: {_reason(done)}")
    if not blob.is_file() or not blob.stat().st_size:
        raise ExportError(f"{where}: not written: {PROGRAM} has written no blob: {_reason(done)}")


def _run(compiler: Path, arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run the compiler in an empty folder, since it reads a file `config` where it runs."""
    folders = [str(compiler.parent), os.environ.get("LD_LIBRARY_PATH", "")]  # its libraries lie beside it
    surroundings = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [str(compiler), *arguments],
            cwd=folder,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return what the compiler said last, without the place in its source."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = re.sub(r"^.*\.[ch]pp:\d+\s*(\[[^\]]*\]:?)?\s*", "", lines[-1]) if lines else ""
    ending = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return one_line(said, 150) if said.strip() else f"it says nothing, {ending}"
