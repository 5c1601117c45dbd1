"""The folders of runs under runs/: the latest, a new one, and the request of a run. Imports no torch."""

from itertools import chain, count
from pathlib import Path
from typing import Any

from qnas.common.errors import CheckpointError
from qnas.runs.names import ARCH_FILE, CONFIG_FILE, RUNS_FOLDER


def free_folder(stem: str) -> Path:
    """Return the first of the folders stem, stem-2, ... under runs/ that does not exist."""
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(folder for name in names if not (folder := RUNS_FOLDER / name).exists())


def latest_run() -> Path:
    """Return the finished run under runs/ that was derived last. Raises CheckpointError if there is none."""
    finished = sorted(RUNS_FOLDER.glob(f"*/{ARCH_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    if not finished:
        raise CheckpointError(f"no finished run under {RUNS_FOLDER}/: name one, or run qnas search first")
    return finished[-1].parent


def read_config(folder: Path) -> dict[str, Any]:
    """Return the request of a run, its config.json. Raises CheckpointError if the folder has no run."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: not a run folder (no {CONFIG_FILE})")
    from qnas.runs.documents import ConfigDocument, read_document  # commands start faster without

    return read_document(folder / CONFIG_FILE, ConfigDocument)
