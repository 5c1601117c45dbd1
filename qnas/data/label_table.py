"""CSVs with the label of each image file.

Columns are separated by a comma, semicolon, tab or bar, whichever gives the header its names. The text is in
UTF-8, or in UTF-16 or UTF-32 where the file starts with their byte order mark; anything else is refused with
its line, since a guessed encoding would change the names of classes.
"""

import codecs
import csv
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qnas.common.errors import DataError
from qnas.common.reading import csv_rows, open_regular, read_bytes
from qnas.common.text import shown
from qnas.data.image_files import SPLIT_NAMES, SPLIT_WORDS

COLUMNS = ("file", "label")  # `split` is optional
FORM = "file,label[,split]"
ROWS = 5_000_000  # limit for the rows of a CSV
_SEPARATORS = ",;\t|"
_PART_BYTES, _NAME_BYTES = 255, 4000  # limits for file names, as those of Linux
_HEADER_BYTES = 65_536  # the header lies within them
_MARKS = (  # the longer ones first, since a shorter one may be their start
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Row(NamedTuple):
    """A row of a CSV: the file as written there, its label, and its split (empty if there is no column)."""

    file: str
    label: str
    split: str


def is_table(path: Path) -> bool:
    """Whether a CSV lists files and labels. A folder may hold other CSVs too."""
    try:
        with open_regular(path) as file:
            start = file.read(_HEADER_BYTES)
    except OSError:
        return False
    return _separator(start.decode(_encoding(start), errors="replace")) is not None


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV. Raises DataError with the line for one of another form.

    Files are those of the CSV, with white space at their ends removed. A file stands in one row only.
    """
    text = _read_text(path)
    separator = _separator(text[:_HEADER_BYTES]) or ","
    lines: dict[str, tuple[int, str]] = {}  # the line and the label of each file
    rows = csv_rows(text, str(path), DataError, COLUMNS, form=FORM, delimiter=separator)
    for line, fields in rows:
        where = f"{path}: line {line}"
        name, label = (fields[column].strip() for column in COLUMNS)
        if not name or not label:
            raise DataError(f"{where}: no {'label' if name else 'file'}")
        if "\0" in name or PurePosixPath(name).name in ("", ".."):
            raise DataError(f"{where}: {shown(name)} is not the name of a file")
        longest = max(len(part.encode()) for part in PurePosixPath(name).parts)
        if longest > _PART_BYTES or len(name.encode()) > _NAME_BYTES:
            raise DataError(f"{where}: a file name of {len(name)} characters: {shown(name)}")
        same = os.path.normpath(name)
        if same in lines:
            before, other = lines[same]
            differs = "" if other == label else f", as {shown(other)} there and {shown(label)} here"
            raise DataError(f"{where}: {shown(name)} is in line {before} too{differs}")
        lines[same] = line, label
        if len(lines) > ROWS:
            raise DataError(f"{where}: over {ROWS:,} rows: give the images as shards")
        yield Row(name, label, _split_word(fields["split"], where) if "split" in fields else "")


def _encoding(start: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def _read_text(path: Path) -> str:
    content = read_bytes(path, DataError, f"a CSV with the columns {FORM}")
    encoding = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, errors="replace")
        line = _with_line_feeds(before).count("\n") + 1
        hint = "" if encoding != "utf-8" else f" (byte 0x{content[error.start]:02x})"
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{path}: line {line}: not in {name}{hint}: save the CSV in UTF-8") from error
    return _with_line_feeds(text)


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _separator(text: str) -> str | None:
    """Return what separates the columns, None if the header lacks one of COLUMNS with any separator."""
    header = next((line for line in _with_line_feeds(text).split("\n") if line.strip()), "")
    for separator in _SEPARATORS:
        try:
            names = next(csv.reader([header.lstrip("\ufeff")], delimiter=separator), [])
        except csv.Error:
            continue
        if set(COLUMNS) <= {name.strip().lower() for name in names}:
            return separator
    return None


def _split_word(text: str, where: str) -> str:
    word = SPLIT_NAMES.get(text.strip().lower())
    if word is None:
        raise DataError(f"{where}: split '{shown(text)}': expected {', '.join(SPLIT_WORDS)}")
    return word
