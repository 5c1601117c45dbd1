"""Bounded reading of the files that people and other programs write.

Only regular files are read, up to a size, and no text of theirs can cost more than its size lets expect:
depth, numbers and fields are bounded. Whatever a library raises becomes one line of at most `LINE_CHARACTERS`
characters that names the file, the line where there is one, and what is wrong.
"""

import csv
import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from qnas.common.errors import QnasError, one_line

LINE_CHARACTERS = 300  # of a message about a file; its path comes on top
TEXT_BYTES = 256_000_000  # limit for text files: the largest of ours, a search's metrics, has some megabytes
YAML_CHARACTERS = 400_000  # YAML is parsed slowly: up to ten microseconds a character
DEPTH = 64  # limit for lists in lists; no document of ours is deeper than 12
VALUES = 5_000_000  # limit for the values of a document, those that YAML's aliases repeat counted each time
DIGITS = 40  # limit for whole numbers
FIELD_CHARACTERS = 100_000  # limit for a field of a CSV
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}  # as messages call them

# What the parsers raise for some texts, beside their own exceptions.
_PARSER_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)

_SURROGATE = re.compile("[\ud800-\udfff]")

MakeError = Callable[[str], QnasError]


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError; a pipe or a device is refused, and not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def is_file(path: Path) -> bool:
    """Return whether a file can be there: False too for a path that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name of thousands of characters, a folder that may not be entered
        return False


def read_bytes(path: Path, error: MakeError, expected: str, *, limit: int = TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    `error` makes the exception for a file that cannot be read; `expected` names the file in it.
    """
    try:
        with open_regular(path) as file:
            # no more than is there: as many bytes as are asked for are allocated
            content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file, expected {expected}") from None
    except IsADirectoryError:
        raise error(f"{path}: expected a file, found a folder") from None
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    except ValueError as cause:  # a zero byte in the path
        raise error(f"{one_line(path)}: cannot be read: {cause}") from cause
    if len(content) > limit:
        raise error(f"{path}: larger than {limit:,} bytes, expected {expected}")
    return content


def read_text(path: Path, error: MakeError, expected: str, *, limit: int = TEXT_BYTES) -> str:
    """Read a text file in UTF-8, with or without the byte order mark that spreadsheets write.

    All line ends become "\\n". Raises as `read_bytes` does.
    """
    try:
        text = read_bytes(path, error, expected, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not a text file in UTF-8") from cause
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, error: MakeError, expected: str = "a JSON object") -> dict[str, Any]:
    """Read a JSON object; `error` makes the exception for a file that has none."""
    return parse_json(read_text(path, error, expected), str(path), error)


def parse_json(text: str, where: str, error: MakeError) -> dict[str, Any]:
    """Read a JSON object from a text that `where` names in messages. Raises what `error` makes."""
    try:
        content = json.loads(text, parse_int=_whole_number)
        check_bounds(content)
    except RecursionError as cause:
        raise error(f"{where}: not JSON: lists nested too deeply") from cause
    except ValueError as cause:
        raise error(f"{where}: not JSON: {one_line(cause, LINE_CHARACTERS - 50)}") from cause
    if not isinstance(content, dict):
        raise error(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_yaml(text: str, where: str, error: MakeError) -> Any:
    """Return the value of a YAML text that `where` names in messages. Raises what `error` makes."""
    if len(text) > YAML_CHARACTERS:
        raise error(f"{where}: {len(text):,} characters of YAML, expected at most {YAML_CHARACTERS:,}")
    try:
        content = yaml.safe_load(text)
        check_bounds(content)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(cause, "problem", None) or "cannot be read"
        raise error(f"{where}{line}: not YAML: {one_line(problem, LINE_CHARACTERS - 50)}") from cause
    except RecursionError as cause:
        raise error(f"{where}: not YAML: lists nested too deeply") from cause
    except _PARSER_ERRORS as cause:
        raise error(f"{where}: not YAML: {one_line(cause, LINE_CHARACTERS - 50)}") from cause
    return content


def csv_rows(
    text: str,
    where: str,
    error: MakeError,
    required: Sequence[str],
    *,
    form: str = "",
    delimiter: str = ",",
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the rows of a CSV with a header, each with the number of its last line.

    Names of columns are stripped and in lower case. Empty lines are skipped, and a field that a short row
    lacks is empty. `required` are the columns that must be there, and `form` describes the file in messages.

    Raises what `error` makes for columns that are missing or there twice, a row with more fields than
    columns, a field that is too long, and quotes that do not end.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    columns: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if any(len(field) > FIELD_CHARACTERS for field in fields):
                raise error(
                    f"{where}: line {reader.line_num}: a field of over {FIELD_CHARACTERS:,} characters"
                )
            if not columns:
                columns = _checked_columns(fields, where, error, required, form)
                continue
            if len(fields) > len(columns):
                raise error(
                    f"{where}: line {reader.line_num}: {len(fields)} fields, expected {len(columns)}; "
                    f"a field with {_SEPARATORS.get(delimiter, delimiter)} stands in quotes"
                )
            fields += [""] * (len(columns) - len(fields))
            yield reader.line_num, dict(zip(columns, fields, strict=True))
    except csv.Error as cause:
        raise error(f"{where}: line {reader.line_num}: not CSV: {one_line(cause)}") from cause
    if not columns:
        _checked_columns([], where, error, required, form)


def _checked_columns(
    names: Sequence[str], where: str, error: MakeError, required: Sequence[str], form: str
) -> list[str]:
    columns = [name.strip().lower() for name in names]
    expected = f"; expected {form or ','.join(required)}"
    if missing := [name for name in required if name not in columns]:
        raise error(f"{where}: columns missing: {', '.join(missing)}{expected}")
    if twice := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
        raise error(f"{where}: columns there twice: {one_line(', '.join(twice), 100)}{expected}")
    return columns


def check_bounds(content: Any) -> None:
    """Raise ValueError for a document that is too deep or too large, or that cannot be written again.

    That is one with a number of too many digits, or text with half of a surrogate pair.
    """
    level, depth, seen = [content], 0, 0
    while level:
        seen += len(level)
        if depth > DEPTH:
            raise ValueError("lists nested too deeply")
        if seen > VALUES:
            raise ValueError(f"more than {VALUES:,} values")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
                inner += value
            elif isinstance(value, list | tuple | set):
                inner += value
            elif isinstance(value, int) and value.bit_length() > DIGITS * 4:
                raise ValueError(f"a number of more than {DIGITS} digits")
            elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
                raise ValueError("text with half of a surrogate pair")
        level, depth = inner, depth + 1


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
