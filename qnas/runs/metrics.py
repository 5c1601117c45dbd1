"""The file of a run's metrics: a JSON line a step, and a CSV row an epoch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnas.common.errors import CheckpointError
from qnas.common.files import csv_text, naming, write_text
from qnas.runs.names import EPOCHS_FILE


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
            write_text(self._path.parent / EPOCHS_FILE, csv_text(self._epochs[0], self._epochs))
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> int:
        """Have all lines on the disk; return where the file ends, in bytes."""
        with naming(self._path), self._path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a metrics.jsonl, which may be written to; none where there is no such file."""
    if not path.is_file():
        return []
    with naming(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
