"""The metrics of a run: a JSON line per logged step and a CSV row per epoch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnas.common.errors import CheckpointError
from qnas.common.files import csv_text, naming, write_text
from qnas.runs.names import EPOCHS_FILE


class Metrics:
    """A file of JSON lines that can be truncated to its size at a checkpoint.

    Rows with `epoch`, at the end of an epoch, are also written to a CSV file beside it, for spreadsheets.
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
            write_text(self._path.parent / EPOCHS_FILE, csv_text(self._epochs[0], self._epochs))
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> int:
        """Flush all lines to the disk and return the size of the file in bytes."""
        with naming(self._path), self._path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a metrics.jsonl, which may be in use; none if there is no such file."""
    if not path.is_file():
        return []
    with naming(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
