"""The state of an unfinished run, protected against interruptions and damaged files.

    qnas.checkpoint/2     the format of the file
    SHA-256 of the rest   checked before the rest is read
    torch.save's bytes    of plain values and tensors; nothing else is unpickled

Two checkpoints are kept, and at least one is complete at any time: when a new one is written, the newest is
renamed to the one before, and the new one takes its name. If the newest is damaged, the one before is used.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qnas.common.errors import CheckpointError, one_line
from qnas.common.files import atomic_path
from qnas.common.reading import open_regular

NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"
_VERSION = 2
_HEAD = b"qnas.checkpoint/%d\n" % _VERSION
_UNNAMED = b"PK"  # the first bytes of torch.save, a zip archive: version 1 had no head


class _Damaged(Exception):  # noqa: N818  # not an error if the other checkpoint can be used
    pass


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self._newest, self._before = folder / NEWEST, folder / BEFORE
        self.damage = ""  # damage that `load` found in the newest checkpoint

    def load(self) -> dict[str, Any] | None:
        """Return the last undamaged state, or None if none was ever saved.

        Raises CheckpointError if all checkpoints are damaged, or for a format of another version of qnas.
        """
        problems = []
        for path in (self._newest, self._before):
            try:
                if (state := _read(path)) is not None:
                    return state  # the one before, without a newest: stopped between two renames of `save`
            except _Damaged as error:
                problems.append(str(error))
                self.damage = problems[0]
        if not problems:
            return None
        if not self._before.exists():
            problems.append("there is no earlier one")
        raise CheckpointError(f"{', and '.join(problems)}: `force=True` without `resume=True` starts anew")

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state, and keep the previous one."""
        # through memory: torch's own writer hides that a disk is full
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        with atomic_path(self._newest) as partial:
            with partial.open("wb") as file, buffer.getbuffer() as payload:
                for part in (_HEAD, _digest(payload), payload):
                    file.write(part)
            # a damaged checkpoint must not replace the undamaged one before it
            if self._newest.exists() and not self.damage:
                self._newest.replace(self._before)
        self.damage = ""

    def remove(self) -> None:
        """Remove all checkpoints."""
        for path in (self._newest, self._before):
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Return a state, or None if there is no file. Raises _Damaged or CheckpointError."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:  # such as a disk that fails in the middle of a file
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from error
    if not content.startswith(_HEAD):
        raise _foreign(path, content)
    start = len(_HEAD) + 65  # after the 64 characters of the digest and a newline
    payload = memoryview(content)[start:]
    if content[len(_HEAD) : start] != _digest(payload):
        raise _Damaged(f"{path} is damaged (its SHA-256 does not match)")
    return _state(path, payload)


def _state(path: Path, payload: memoryview) -> dict[str, Any]:
    """Return the state in bytes with a valid digest, which anybody may have written. Raises _Damaged."""
    if payload[: len(_UNNAMED)] != _UNNAMED:  # else torch tries older formats, and waits for more bytes
        raise _Damaged(f"{path} holds no state (it is not of torch.save)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about the types that it finds: the error is enough
            state = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except Exception as error:  # unpickling bytes that torch did not write ends in almost any exception
        # torch's own words on what is not plain advise to unpickle it nevertheless
        kind, words = type(error).__name__, one_line(error, 60)
        problem = "more than values and tensors" if kind == "UnpicklingError" else f"{kind}: {words}"
        raise _Damaged(f"{path} holds no state ({problem})") from error
    if not isinstance(state, dict):
        raise _Damaged(f"{path} holds no state (a {type(state).__name__})")
    return state


def _digest(payload: memoryview) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _foreign(path: Path, content: bytes) -> Exception:
    """Return the exception for a file without the current head."""
    version = re.match(rb"qnas\.checkpoint/(\d{1,9})\n", content)
    if version is None and not content.startswith(_UNNAMED):
        return _Damaged(f"{path} is damaged (it does not start like a checkpoint)")
    found = version[1].decode() if version else "1"
    return CheckpointError(
        f"{path}: format {found}, written by another version of qnas; this version reads format "
        f"{_VERSION}: continue with that version, or start anew with `force=True`"
    )
