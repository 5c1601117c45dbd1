"""Results that are cached until the files on which they depend change."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qnas.common.errors import DataError
from qnas.common.files import write_text
from qnas.common.reading import read_json

T = TypeVar("T")


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process at a time compute the cached result at a path; the others then find it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(path.with_suffix(".lock"), flags, 0o666), "w")
    except OSError:  # the cache cannot be written, so each process computes it
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recall(path: Path, schema: str, stamp: str, form: TypeAdapter[T]) -> T | None:
    """Return the result cached at a path under the same stamp; None if it is missing or damaged."""
    try:
        content = read_json(path, DataError)
        if content.get("schema") != schema or content.get("stamp") != stamp:
            return None
        return form.validate_python(content.get("kept"))
    except (DataError, OSError, ValidationError):
        return None


def keep(path: Path, schema: str, stamp: str, kept: Any) -> None:
    """Write a JSON value to the cache atomically, or do nothing if the cache cannot be written."""
    with suppress(OSError):
        write_text(path, json.dumps({"schema": schema, "stamp": stamp, "kept": kept}))
