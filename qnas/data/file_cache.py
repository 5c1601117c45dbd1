"""Results kept in the user's cache until the files that they come from change."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qnas.common.errors import DataError
from qnas.common.files import read_json, write_text

T = TypeVar("T")


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process at a time compute what is kept at a path: the others then find it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a")
    except OSError:  # nowhere to keep anything, so each process computes it
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recall(path: Path, schema: str, stamp: str, form: TypeAdapter[T]) -> T | None:
    """Return what was kept at a path under the same stamp; None where there is none, or a damaged file."""
    try:
        content = read_json(path, DataError)
        if content.get("schema") != schema or content.get("stamp") != stamp:
            return None
        return form.validate_python(content.get("kept"))
    except (DataError, OSError, ValidationError):
        return None


def keep(path: Path, schema: str, stamp: str, kept: Any) -> None:
    """Write a JSON value to the cache, all of it or nothing; nothing where the cache cannot be written."""
    with suppress(OSError):
        write_text(path, json.dumps({"schema": schema, "stamp": stamp, "kept": kept}))
