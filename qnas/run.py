"""A run folder: what a search was asked, what happened, and what came out.

    config.json           what was asked, resolved, with versions
    space.yaml            a copy of the search space
    table-DEVICE.csv      a copy of the latency table
    metrics.jsonl         a line a logged step
    metrics.csv           a line an epoch, where a network is trained
    checkpoint.pt         the state of an unfinished run (and checkpoint-before.pt)
    run.lock              there while a process is at work here
    supernet.safetensors  the trained weights of all candidates
    arch.json             the derived architecture with its certificate
    report.html           all of this to look at, in one page
    broken.csv            the images that were left out, where there are any
    budget.png            the expected amounts on their way to the limits
    search.json           the final probabilities; the k best networks ranked; the rivals
    tensorboard/          what tensorboard writes
    pareto/               what pareto writes: the best networks by budget
    derived/              what derive writes, for other devices and budgets
    subnet/               what train-subnet writes
    export/               what export writes

Every file is written whole or not at all, and can be read without qnas.
"""

import csv
import fcntl
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from qnas.arch import ARCH_FILE, SPACE_FILE
from qnas.changes import describe_changes
from qnas.checkpoint import Checkpoints
from qnas.derive import SEARCH_FILE
from qnas.errors import CheckpointError, Interrupted
from qnas.files import naming, read_json, write_bytes, write_json, write_text
from qnas.pareto import FOLDER
from qnas.record import CONFIG_FILE

CONFIG = CONFIG_FILE
ARCH, SPACE = ARCH_FILE, SPACE_FILE
METRICS = "metrics.jsonl"
EPOCHS = "metrics.csv"
LOCK = "run.lock"
SUPERNET = "supernet.safetensors"
# of its weights: second, since they are those of a stage's n-th block (`placement`) and no more of a position
SUPERNET_SCHEMA = "qnas.supernet/2"
SEARCH = SEARCH_FILE
BUDGET_PLOT = "budget.png"
REPORT = "report.html"
BROKEN = "broken.csv"  # images that were left out
DERIVED = "derived"
PARETO = FOLDER
TENSORBOARD = "tensorboard"
SUBNET = "subnet"
EXPORT = "export"

# in subnet/
WEIGHTS = "weights.safetensors"
RESULT = "result.json"
PREDICTIONS = "predictions.safetensors"  # what the network says of each test image
BEST = "best.safetensors"  # the weights that did best on the test images: chosen by them
RECIPE = "recipe.yaml"
SPEED = "speed.json"  # measured on this machine, so not a part of the result
SAMPLE = "sample.safetensors"  # some test images, with which an export is checked

DEFAULT_FOLDER = Path("runs")


class Metrics:
    """A file of JSON lines that can be cut back to where a checkpoint was.

    Rows that end an epoch, which have `epoch`, are a CSV file beside it too, for spreadsheets.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self._path = path
        self._epochs: list[Mapping[str, Any]] = []
        if keep_bytes and (not path.exists() or path.stat().st_size < keep_bytes):
            raise CheckpointError(f"{path}: shorter than when the checkpoint was written")
        with path.open("ab") as file:
            file.truncate(keep_bytes)
        if keep_bytes:
            kept = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self._epochs = [row for row in kept if "epoch" in row]

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        if "epoch" in row:
            self._epochs.append(row)
            self._write_epochs()
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _write_epochs(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._epochs[0], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._epochs)
        write_text(self._path.parent / EPOCHS, text.getvalue())

    def sync(self) -> int:
        """Have all lines on the disk; return where the file ends, in bytes."""
        with naming(self._path), self._path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()


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


@contextmanager
def opened(
    folder: Path,
    request: Mapping[str, Any],
    copies: Mapping[str, str],
    *,
    result: str,
    resume: bool,
    force: bool,
) -> Iterator[None]:
    """Make a run folder or enter one, and keep others out of it while the block runs.

    `request` is what was asked, for config.json; `copies` are the texts of the files it rests on, by
    name, which the run keeps; `result` is the file that is written last, whose presence says that the
    run is complete. A folder that holds anything is refused without `resume` or `force`; `force`
    removes the former run's files, and what was made from them. To resume, the former run must have
    been asked the same. Raises CheckpointError, and Interrupted in place of KeyboardInterrupt.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, found a file")
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
    elif not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: nothing to resume (no {CONFIG})")
    with _locked(folder):
        if resume:
            _check_resumable(folder, request, copies, result)
        else:
            _check_free(folder, force=force)
            _clear(folder)
            write_json(folder / CONFIG, request)
        for partial in _partials(folder):
            partial.unlink()
        for name, text in copies.items():
            write_text(folder / name, text)
        try:
            yield
        except KeyboardInterrupt:
            raise interrupted(folder) from None


def interrupted(folder: Path) -> Interrupted:
    """Return what to raise when a run in a folder was asked to stop and can go on from it."""
    return Interrupted(f"the state is saved in {folder}: --resume goes on from it")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system releases when the process ends, however it does."""
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(f"{folder}: process {file.read() or '?'} is at work in it") from None
        if os.fstat(file.fileno()).st_nlink == 0:  # its holder removed it as we opened it
            raise CheckpointError(f"{folder}: another process was at work in it just now: try again")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_resumable(
    folder: Path, request: Mapping[str, Any], copies: Mapping[str, str], result: str
) -> None:
    """Raise CheckpointError where a run is complete, or was asked something else."""
    if (folder / result).is_file():
        Checkpoints(folder).remove()  # left where it was killed right after its result
        what = "training" if result == RESULT else "search"
        raise CheckpointError(f"{folder}: this {what} is complete, there is nothing to resume")
    there = [folder / name for name in copies if (folder / name).is_file()]
    kept = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in there}
    changed = describe_changes(read_config(folder), request, kept, copies)
    if changed:
        raise CheckpointError(f"{folder}: cannot resume, changed since it started: {'; '.join(changed)}")


def _check_free(folder: Path, *, force: bool) -> None:
    """Raise CheckpointError where a folder holds anything that is not to be replaced, or is at work."""
    holds_run = (folder / CONFIG).is_file()
    ours = {folder / LOCK, *_partials(folder)}
    if not ours.issuperset(folder.iterdir()) and not (force and holds_run):
        found = "already holds a run" if holds_run else "is not empty and holds no run"
        fix = ": give --resume to go on, --force to replace it, or another --out" if holds_run else ""
        raise CheckpointError(f"{folder}: {found}{fix}")
    for lock in [*folder.glob(f"*/**/{LOCK}")]:
        with _locked(lock.parent):  # such as subnet/, while a network is trained in it
            pass


def _partials(folder: Path) -> list[Path]:
    """Return what a process left that was killed as it wrote (`files.atomic_path`)."""
    return [*folder.glob(".*.*.partial")]


def _clear(folder: Path) -> None:
    """Remove a former run's files, and what was made from them."""
    # first what says that the run is complete: a kill in between must not leave that alone
    written = (
        METRICS,
        EPOCHS,
        SUPERNET,
        BUDGET_PLOT,
        REPORT,
        BROKEN,
        SEARCH,
        WEIGHTS,
        BEST,
        PREDICTIONS,
        SAMPLE,
        SPEED,
    )
    for stale in (ARCH, RESULT, *written):
        (folder / stale).unlink(missing_ok=True)
    Checkpoints(folder).remove()
    for made_from_it in (SUBNET, EXPORT, DERIVED, PARETO, TENSORBOARD):
        shutil.rmtree(folder / made_from_it, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], schema: str | None = None) -> None:
    """Write named tensors as safetensors."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata=None if schema is None else {"schema": schema}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error


def save_supernet(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a supernet's state."""
    save_tensors(path, state, SUPERNET_SCHEMA)


def load_supernet(path: Path) -> dict[str, Tensor]:
    """Read a supernet's state. Raises CheckpointError if it is missing, damaged or an earlier version's."""
    state = load_tensors(path)
    with safe_open(path, "pt") as file:
        schema = (file.metadata() or {}).get("schema")
    if schema != SUPERNET_SCHEMA:
        raise CheckpointError(
            f"{path}: of another version of qnas ({schema or 'an early one'}, expected {SUPERNET_SCHEMA}), "
            "which keeps a block's weights elsewhere: search again"
        )
    return state


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
