"""A run's metrics so far as event files for TensorBoard.

metrics.jsonl remains the only record: it is truncated when a stopped run is resumed, which event files cannot
be. The event files are therefore rewritten from it each time, also while the run is in progress.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qnas.common.errors import CheckpointError, UsageError
from qnas.runs.folders import read_config
from qnas.runs.metrics import read_metrics
from qnas.runs.names import METRICS_FILE, SUBNET_FOLDER, TENSORBOARD_FOLDER


def write_events(folder: Path) -> Path:
    """Write the events of a run's folder, one log each for search and training, and return their folder.

    Raises CheckpointError if there are no metrics, UsageError if TensorBoard is not installed.
    """
    logs = dict(_logs(folder))
    if not logs:
        raise CheckpointError(f"{folder}: no {METRICS_FILE} here: not a run's folder")
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UsageError("TensorBoard is not installed: pip install 'quadranet-nas[tensorboard]'") from error
    out = folder / TENSORBOARD_FOLDER
    shutil.rmtree(out, ignore_errors=True)
    for name, rows in logs.items():
        writer = SummaryWriter(str(out / name))
        for row in rows:
            for key, value in row.items():
                if key not in ("step", "epoch") and isinstance(value, int | float):
                    writer.add_scalar(key, float(value), row["step"])
            for warning in row.get("warnings", ()):
                writer.add_text("warnings", warning, row["step"])
        writer.close()
    return out


def _logs(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the names and rows of a folder's logs that are not empty."""
    if rows := read_metrics(folder / METRICS_FILE):
        yield read_config(folder).get("command") or "search", rows
    if rows := read_metrics(folder / SUBNET_FOLDER / METRICS_FILE):
        yield "train-subnet", rows
