"""What a folder holds of former exports: files of the same weights, which stay, and those of others."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qnas.common.errors import ExportError
from qnas.common.reading import read_json
from qnas.deploy.card import JSON, MARKDOWN, SCHEMA
from qnas.deploy.export.formats import PARITY
from qnas.deploy.export.parity import Parity
from qnas.deploy.export.resizing import Resizing


class _Measured(BaseModel):
    p50_ms: float
    p95_ms: float
    runtime: str
    threads: int
    machine: str


class _Predicted(BaseModel):
    device: str
    resolution_px: int
    budget_ms: float
    latency_ms: float | None
    over_budget: bool
    problem: str
    certified: str = ""


class _Entry(BaseModel):
    """The entry of a file in a card, with all that the card's page shows."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: str
    precision: str
    runtime: str
    files: list[str]
    digests: list[str]
    size_bytes: int
    resolution_px: int
    batch: int | None
    parity: Parity
    runs_on: str = ""
    checks: list[str] = []
    measured: _Measured | None
    predicted: list[_Predicted] = []
    resizing: Resizing | None = None


@dataclass(frozen=True)
class FormerExport:
    """The files of former exports in a folder."""

    entries: Mapping[str, Any]  # of the card, for files of the same weights that are all unchanged
    stale: tuple[str, ...]  # names of unchanged files of other weights, or of weights that are not known
    reports: tuple[str, ...]  # names of what was written about files that do not stay

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of all files that do not stay."""
        return (*self.stale, *self.reports)


def read_former(folder: Path, weights_sha256: str) -> FormerExport:
    """Read what a folder holds of former exports.

    A file counts as exported if a card or a report of its comparison names it with its digest: a file that
    was changed since is somebody's own. Neither of the two need be whole.
    """
    if not folder.is_dir():
        return FormerExport({}, (), ())
    card = _read(folder / JSON, SCHEMA)
    same = card.get("weights_sha256") == weights_sha256
    listed = card.get("files")
    listed = listed if isinstance(listed, dict) else {}
    exported: dict[str, bool] = {}  # by the name of a file: whether it is unchanged
    kept: dict[str, Any] = {}
    staying: set[str] = set()
    for name, entry in listed.items():
        files = dict(_digests(entry))
        unchanged = {file: _is_unchanged(folder / file, sha256) for file, sha256 in files.items()}
        exported |= unchanged
        if same:
            staying |= files.keys()
        if same and name in files and all(unchanged.values()) and _is_whole(entry):
            kept[name] = entry
    reports = [path for path in sorted(folder.glob(f"*{PARITY}")) if path.is_file()]
    for path in reports:
        for file, sha256 in _digests(_read(path, "qnas.parity/1")):
            exported.setdefault(file, _is_unchanged(folder / file, sha256))
    return FormerExport(
        kept,
        tuple(sorted(file for file, unchanged in exported.items() if unchanged and file not in staying)),
        (
            *(path.name for path in reports if path.name.removesuffix(PARITY) not in kept),
            *(name for name in (JSON, MARKDOWN) if (folder / name).is_file()),
        ),
    )


def _read(path: Path, schema: str) -> dict[str, Any]:
    """Return a JSON object of a schema; an empty one where there is none."""
    try:
        content = read_json(path, ExportError)
    except ExportError:  # missing or damaged: it says nothing
        return {}
    return content if content.get("schema") == schema else {}


def _digests(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield the names and digests of an entry's files, as far as they are names in the folder."""
    entry = entry if isinstance(entry, dict) else {}
    files, digests = entry.get("files"), entry.get("digests")
    if isinstance(files, list) and isinstance(digests, list):
        for file, sha256 in zip(files, digests, strict=False):
            if isinstance(file, str) and isinstance(sha256, str) and _is_name(file):
                yield file, sha256


def _is_name(text: str) -> bool:
    return text == Path(text).name and text.isprintable() and len(text) < 200


def _is_unchanged(path: Path, sha256: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _is_whole(entry: Mapping[str, Any]) -> bool:
    try:
        checked = _Entry.model_validate_json(json.dumps(entry), strict=True)  # "1" is no number
    except ValidationError:
        return False
    return len(checked.files) == len(checked.digests) == len(dict(_digests(entry)))
