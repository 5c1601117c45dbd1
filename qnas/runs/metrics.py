"""The metrics of a run: a JSON line per logged step and a CSV row per epoch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnas.common.documents import check_content
from qnas.common.errors import CheckpointError, one_line
from qnas.common.files import csv_text, naming, write_text
from qnas.common.reading import parse_json, read_text
from qnas.runs.documents import MetricsRow
from qnas.runs.names import EPOCHS_FILE

OF_LIMIT = "of_limit_"  # prefix of the keys of expected amounts divided by their limits


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
        if not _ends_a_line(path):
            raise CheckpointError(f"{path}: not as it was when the checkpoint was written")
        self._epochs = [row for row in read_metrics(path) if "epoch" in row]

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


def _ends_a_line(path: Path) -> bool:
    """Whether a file is empty or ends with a whole line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a metrics.jsonl, which may be in use; none if there is no such file.

    Raises CheckpointError for a line that is damaged, that lacks a figure, or whose step does not rise.
    """
    if not path.is_file():
        return []
    text = read_text(path, CheckpointError, "the metrics of a run")
    complete = text[: text.rfind("\n") + 1]  # the last line may be in the writing
    return _rows(complete, path)


def _rows(text: str, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    amounts: set[str] | None = None
    last = {"step": 0, "epoch": 0}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        where = f"{path}: line {number}"
        row = parse_json(line, where, CheckpointError)
        check_content(MetricsRow, row, where, CheckpointError)
        for key in row.keys() & last:
            if row[key] <= last[key]:
                raise CheckpointError(f"{where}: {key} {row[key]} after {last[key]}, expected a later one")
            last[key] = row[key]
        if "multiplier" in row:
            found = {key for key in row if key.startswith(OF_LIMIT)}
            if amounts is not None and found != amounts:
                differ = one_line(", ".join(sorted(found ^ amounts)), 100)
                raise CheckpointError(f"{where}: {differ}: not in all lines of architecture steps")
            amounts = found
        rows.append(row)
    return rows
