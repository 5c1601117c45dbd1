"""The state of an unfinished run, protected against interruptions and damaged files.

    qnas.checkpoint/2     what this file is
    SHA-256 of the rest   checked before any of the rest is read
    torch.save's bytes

Two generations are kept, and at every moment a whole one is there: the newest steps back once its
successor is written, which then takes its name. Where the newest is damaged, the one before it serves.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qnas.common.errors import CheckpointError
from qnas.common.files import atomic_path

NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"
_VERSION = 2
_HEAD = b"qnas.checkpoint/%d\n" % _VERSION
_UNNAMED = b"PK"  # what torch.save alone begins with: the first version had no head


class _Damaged(Exception):  # noqa: N818  # says what is wrong; no error while another one serves
    pass


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self._newest, self._before = folder / NEWEST, folder / BEFORE
        self.damage = ""  # of the newest one, where `load` found any

    def load(self) -> dict[str, Any] | None:
        """Return the last state that is whole, or None if none was ever saved.

        Raises CheckpointError where all there are damaged, or of another version of qnas.
        """
        problems = []
        try:
            if (state := _read(self._newest)) is not None:
                return state  # else stopped between the two renamings of `save`
        except _Damaged as error:
            self.damage = str(error)
            problems.append(self.damage)
        try:
            state = _read(self._before)
        except _Damaged as error:
            problems.append(str(error))
        else:
            if state is not None or not problems:
                return state
            problems.append("there is none before it")
        raise CheckpointError(f"{', and '.join(problems)}: `force=True` without `resume=True` starts anew")

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state; the one before it stays."""
        # through memory: torch's own writer hides a full disk behind a message of its own
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getbuffer()
        with atomic_path(self._newest) as partial:
            with partial.open("wb") as file:
                for part in (_HEAD, _digest(payload), payload):
                    file.write(part)
            # a damaged one must not take the place of the whole one before it
            if self._newest.exists() and not self.damage:
                self._newest.replace(self._before)
        self.damage = ""

    def remove(self) -> None:
        """Remove all of them."""
        for path in (self._newest, self._before):
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Return a state, None where there is no file. Raises _Damaged, and CheckpointError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:  # a disk that fails in the middle of a file
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from error
    if not content.startswith(_HEAD):
        raise _foreign(path, content)
    start = len(_HEAD) + 65  # after the digest's 64 characters and the end of its line
    payload = memoryview(content)[start:]
    if content[len(_HEAD) : start] != _digest(payload):
        raise _Damaged(f"{path} is damaged (its SHA-256 does not fit)")
    state = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    assert isinstance(state, dict), "as it was saved"
    return state


def _digest(payload: memoryview) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _foreign(path: Path, content: bytes) -> Exception:
    """Return what to raise for a file that does not begin as ours do."""
    version = re.match(rb"qnas\.checkpoint/(\d{1,9})\n", content)
    if version is None and not content.startswith(_UNNAMED):
        return _Damaged(f"{path} is damaged (it does not begin as a checkpoint)")
    found = version[1].decode() if version else "1"
    return CheckpointError(
        f"{path}: of format {found}, which another version of qnas wrote; this one reads format "
        f"{_VERSION}: go on with that version, or start anew with `force=True`"
    )
