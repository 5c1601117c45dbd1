"""The folder of a run: its lock, the conditions for resuming, and the files that a new run clears.

`names` lists the files. They are written atomically and can be read without qnas.
"""

import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from qnas.common.changes import describe_changes
from qnas.common.errors import CheckpointError, Interrupted, one_line
from qnas.common.files import holding, is_partial, remove_leftovers, write_json, write_text
from qnas.common.reading import LINE_CHARACTERS, read_bytes
from qnas.runs.checkpoint import Checkpoints
from qnas.runs.folders import read_config
from qnas.runs.names import (
    CLEARED_FILES,
    CLEARED_FOLDERS,
    CONFIG_FILE,
    FINALISTS_FOLDER,
    LOCK_FILE,
    RESULT_FILE,
)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect the signals to stop (Ctrl-C, SIGTERM) in a list instead of being terminated.

    The loop inside checks the list after each step. A second signal interrupts immediately. Outside the main
    thread, which alone receives signals, the list stays empty.
    """
    received: list[int] = []
    if current_thread() is not main_thread():
        yield received
        return

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
    """Create or enter a run folder, and lock it while the block runs.

    `request` is the content of config.json. `copies` are the texts, by name, of the files on which the run
    depends; the folder keeps copies. `result` is the file that is written last, which marks a complete run. A
    folder that is not empty is refused without `resume` or `force`. `force` removes the files of the former
    run and those made from them. A run can only be resumed with the same request. Raises CheckpointError, and
    Interrupted instead of KeyboardInterrupt.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, found a file")
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
    elif not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: nothing to resume (no {CONFIG_FILE})")
    with _locked(folder):
        if resume:
            _check_resumable(folder, request, copies, result)
        else:
            _check_free(folder, force=force)
            _clear(folder)
            write_json(folder / CONFIG_FILE, request)
        remove_leftovers(folder)
        for name, text in copies.items():
            write_text(folder / name, text)
        try:
            yield
        except KeyboardInterrupt:
            raise interrupted(folder) from None


def interrupted(folder: Path) -> Interrupted:
    """Return the error for an interrupted run that can be resumed from its folder."""
    return Interrupted(f"the state is saved in {folder}: `resume=True` continues from it")


def _locked(folder: Path, lock: Path | None = None) -> AbstractContextManager[None]:
    """Hold a folder's lock."""
    return holding(
        lock or folder / LOCK_FILE,
        lambda process: CheckpointError(f"{folder}: process {process} is working in it"),
    )


def _check_resumable(
    folder: Path, request: Mapping[str, Any], copies: Mapping[str, str], result: str
) -> None:
    """Raise CheckpointError if a run is complete or had another request."""
    if (folder / result).is_file():
        remove_states(folder)  # left if the run was killed right after its result
        what = "training" if result == RESULT_FILE else "search"
        raise CheckpointError(f"{folder}: this {what} is complete, there is nothing to resume")
    there = [folder / name for name in copies if (folder / name).is_file()]
    kept = {path.name: read_bytes(path, CheckpointError, "a file of the run") for path in there}
    texts = {name: content.decode(errors="replace") for name, content in kept.items()}
    changed = describe_changes(read_config(folder), request, texts, copies)
    if changed:
        words = one_line("; ".join(changed), LINE_CHARACTERS - 100)
        raise CheckpointError(f"{folder}: cannot resume, changed since it started: {words}")


def remove_states(folder: Path) -> None:
    """Remove the checkpoints of a complete run, and those of its finalists' trainings."""
    for own in (folder, *sorted((folder / FINALISTS_FOLDER).glob("*/"))):
        Checkpoints(own).remove()


def _check_free(folder: Path, *, force: bool) -> None:
    """Raise CheckpointError if a folder holds anything that must not be replaced, or is in use."""
    holds_run = (folder / CONFIG_FILE).is_file()
    others = [path for path in folder.iterdir() if path.name != LOCK_FILE and not is_partial(path)]
    if others and not (force and holds_run):
        found = "already holds a run" if holds_run else "is not empty and holds no run"
        fix = ": `resume=True` continues it, `force=True` replaces it, or another `out`" if holds_run else ""
        raise CheckpointError(f"{folder}: {found}{fix}")
    for lock in [*folder.glob(f"*/**/{LOCK_FILE}"), *folder.glob("**/.*.lock")]:
        with _locked(lock.parent, lock):  # such as subnet/ during a training, and an export
            pass


def _clear(folder: Path) -> None:
    """Remove a former run's files and those made from them."""
    # in this order: a kill in between must not leave the files that mark a complete run
    for stale in CLEARED_FILES:
        (folder / stale).unlink(missing_ok=True)
    Checkpoints(folder).remove()
    for made_from_it in CLEARED_FOLDERS:
        shutil.rmtree(folder / made_from_it, ignore_errors=True)
