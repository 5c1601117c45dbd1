"""A run folder: what a search was asked, what happened, and what came out.

    config.json           what was asked, resolved, with versions
    space.yaml            a copy of the search space
    table-DEVICE.csv      a copy of the latency table
    metrics.jsonl         a line a logged step
    checkpoint.pt         the state of an unfinished search
    supernet.safetensors  the trained weights of all candidates
    arch.json             the derived architecture with its certificate
    search.json           the final probabilities; the derived network beside random ones
    derived/              what derive writes, for other devices and budgets
    subnet/               what train-subnet writes
    export/               what export writes

Every file is written whole or not at all, and can be read without qnas.
"""

import io
import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from qnas.arch import ARCH_FILE, SPACE_FILE
from qnas.derive import SEARCH_FILE
from qnas.errors import CheckpointError
from qnas.files import naming, read_json, write_bytes, write_json

CONFIG = "config.json"
ARCH, SPACE = ARCH_FILE, SPACE_FILE
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
SUPERNET = "supernet.safetensors"
SEARCH = SEARCH_FILE
DERIVED = "derived"
SUBNET = "subnet"
EXPORT = "export"

# in subnet/
WEIGHTS = "weights.safetensors"
RESULT = "result.json"
SAMPLE = "sample.safetensors"  # some test images, with which an export is checked

DEFAULT_FOLDER = Path("runs")


class Metrics:
    """A file of JSON lines that can be cut back to where a checkpoint was."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self._path = path
        if path.exists() and path.stat().st_size < keep_bytes:
            raise CheckpointError(f"{path}: shorter than when the checkpoint was written")
        with path.open("ab") as file:
            file.truncate(keep_bytes)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def size_bytes(self) -> int:
        """Where the file ends now."""
        return self._path.stat().st_size


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect the signals that ask to stop (Ctrl-C, SIGTERM) instead of dying from them.

    The loop inside looks at the list after each step. A second Ctrl-C does not wait.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_folder(stem: str) -> Path:
    """Return the first folder of that name under runs/ that does not exist: stem, stem-2, ..."""
    folder = DEFAULT_FOLDER / stem
    number = 2
    while folder.exists():
        folder = DEFAULT_FOLDER / f"{stem}-{number}"
        number += 1
    return folder


def latest_run() -> Path:
    """Return the finished run under runs/ that was derived last. Raises CheckpointError if none."""
    finished = sorted(DEFAULT_FOLDER.glob(f"*/{ARCH}"), key=lambda path: path.stat().st_mtime_ns)
    if not finished:
        raise CheckpointError(f"no finished run under {DEFAULT_FOLDER}/: name one, or run qnas search first")
    return finished[-1].parent


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a run was asked. Raises CheckpointError where the folder holds no run."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: not a run folder (no {CONFIG})")
    return read_json(folder / CONFIG, CheckpointError)


def open_folder(folder: Path, config: Mapping[str, Any], *, resume: bool, force: bool) -> bool:
    """Make a run folder, or enter one; return whether there is a run to resume.

    A folder that holds anything is refused without `resume` or `force`; `force` removes the
    former run's files, and what was made from them. To resume, the former run must have been asked
    the same. Raises CheckpointError.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, found a file")
    holds_run = (folder / CONFIG).is_file()
    if resume:
        if not holds_run:
            raise CheckpointError(f"{folder}: nothing to resume (no {CONFIG})")
        changed = changed_keys(read_config(folder), config)
        if changed:
            raise CheckpointError(f"{folder}: cannot resume, changed since it started: {'; '.join(changed)}")
        return True
    if folder.is_dir() and any(folder.iterdir()) and not (force and holds_run):
        found = "already holds a run" if holds_run else "is not empty and holds no run"
        fix = ": give --resume to go on, --force to replace it, or another --out" if holds_run else ""
        raise CheckpointError(f"{folder}: {found}{fix}")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (METRICS, CHECKPOINT, SUPERNET, ARCH, SEARCH, WEIGHTS, RESULT, SAMPLE):
        (folder / stale).unlink(missing_ok=True)
    for made_from_it in (SUBNET, EXPORT, DERIVED):
        shutil.rmtree(folder / made_from_it, ignore_errors=True)
    write_json(folder / CONFIG, config)
    return False


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which entries differ, with both values; versions may differ."""
    keys = sorted((set(before) | set(now)) - {"versions"})
    return [f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run."""
    # through memory: torch's own writer hides a full disk behind a message of its own
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(folder / CHECKPOINT, buffer.getvalue())


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the state of an unfinished run, or None if none was saved. Raises CheckpointError."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on a damaged file
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: damaged: expected a mapping")
    return state


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
