"""Files of a data set that are left out: counted by reason, and the first of them named.

Hidden files and those that operating systems leave behind (`.DS_Store`, `Thumbs.db`, `desktop.ini`,
`__MACOSX`, `._*`) are not counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnas.common.errors import abbreviate
from qnas.common.files import csv_text, write_text
from qnas.common.text import shown
from qnas.data.image_files import unreadable_suffixes

NAMED = 100  # files that are named for each reason
REASONS = 50  # reasons that are told apart; suffixes may be anything
PATH_CHARACTERS = 4096  # of a file's name in lists

TOO_DEEP = "images that lie too deep"
OUTSIDE = "images outside the class folders"
NOT_LISTED = "images that the CSV does not list"
UNUSED_TABLE = "CSVs that are not used"
ARCHIVE = "archives beside the folders"
NOT_REGULAR = "pipes and other files that are not regular"
DANGLING = "links to nothing"
DEEP_LINK = "links to folders that lie too deep"
ELSEWHERE = "members of a tar with a path out of it"
OF_TAR = "links, devices and sparse files of a tar"
UNREADABLE = "folders and links that cannot be read"
UNCOUNTED = "folders too deep to be counted to their end"
_SYSTEM_FILES = frozenset(("__macosx", "thumbs.db", "desktop.ini"))


@dataclass(frozen=True)
class LeftOut:
    """Files that are left out for one reason; `first` has the names of up to NAMED of them, escaped."""

    reason: str
    files: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.reason}: {self.files} (first {shown(self.first[0])})"


class LeftOutFiles:
    """A list of files that are left out, while it is made."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str, files: int = 1) -> None:
        """Count a file."""
        if reason not in self._found and len(self._found) >= REASONS:
            reason = "other files"
        count, first = self._found.get(reason, (0, []))
        if len(first) < NAMED:
            first.append(shown(name, PATH_CHARACTERS))
        self._found[reason] = count + files, first

    def add_other(self, suffix: str, name: str) -> None:
        """Count a file whose suffix (in lower case, with its dot) is not that of an image."""
        if package := unreadable_suffixes().get(suffix):
            self.add(f"{suffix} files, which need {package}", name)
        else:
            self.add(f"{shown(suffix, 20)} files" if suffix else "files without a suffix", name)

    def extend(self, found: Iterable[LeftOut]) -> None:
        """Add the counts and names of another list."""
        for each in found:
            self.add(each.reason, each.first[0], each.files)
            self._found.get(each.reason, (0, []))[1].extend(each.first[1:])

    def found(self) -> tuple[LeftOut, ...]:
        """Return the reasons, the most frequent first."""
        by_count = sorted(self._found.items(), key=lambda item: -item[1][0])
        return tuple(LeftOut(reason, files, tuple(first[:NAMED])) for reason, (files, first) in by_count)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or left behind by an operating system; these are not counted."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def summary(left_out: Sequence[LeftOut], most: int = 3) -> str:
    """Describe what is left out in one line."""
    files = sum(each.files for each in left_out)
    listed = abbreviate([str(each) for each in left_out], "; ", most)
    return f"{files} file{'s' * (files != 1)} left out: {listed}"


def write_left_out(path: Path, left_out: Sequence[LeftOut]) -> None:
    """Write a CSV of the files that are left out, if there are any.

    Files that are not named are a row with their number. A run is not refused to resume because of this file:
    it depends on the images, and not on what lies beside them.
    """
    rows = [
        {"file": file, "reason": each.reason}
        for each in left_out
        for file in (
            *each.first,
            *([f"... and {each.files - len(each.first)} more"] if each.files > len(each.first) else []),
        )
    ]
    if rows:
        write_text(path, csv_text(("file", "reason"), rows))


def left_out_facts(left_out: Sequence[LeftOut], split_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries about the data set's files and splits for the JSON files of a run.

    `split_names` is given only if a split has another name in the data set.
    """
    differ = any(split != name for split, name in split_names.items())
    return {
        "left_out": {each.reason: each.files for each in left_out},
        **({"split_names": dict(split_names)} if differ else {}),
    }
