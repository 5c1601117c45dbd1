"""Bounded reading: regular files, and texts that are too deep, too long or of the wrong form."""

import os
from pathlib import Path

import pytest

from qnas.common.errors import ArchError
from qnas.common.reading import (
    DEPTH,
    FIELD_CHARACTERS,
    csv_rows,
    is_file,
    open_regular,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
)


def test_what_is_no_json_object_is_refused_with_the_reason(tmp_path: Path) -> None:
    damaged, binary, listed, pipe = (tmp_path / name for name in ("damaged", "binary", "list", "pipe"))
    damaged.write_text('{"a": ')
    binary.write_bytes(b"\xff\xfe\x00")
    listed.write_text("[1]")
    os.mkfifo(pipe)
    for path, message in [
        (tmp_path / "none", "no such file, expected a JSON object"),
        (tmp_path, "expected a file, found a folder"),
        (damaged, "not JSON: Expecting value: line 1 column 7"),
        (binary, "not a text file in UTF-8"),
        (listed, "expected a JSON object, got list"),
        (pipe, "cannot be read: not a regular file"),
        (Path("/dev/zero"), "cannot be read: not a regular file"),
    ]:
        with pytest.raises(ArchError) as error:
            read_json(path, ArchError)
        assert str(error.value).startswith(f"{path}: {message}")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, ArchError, "five bytes", limit=5) == b"12345"
    with pytest.raises(ArchError, match="larger than 4 bytes, expected five bytes"):
        read_bytes(path, ArchError, "five bytes", limit=4)


def test_text_loses_its_byte_order_mark_and_the_kind_of_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("\ufeffa\r\nb\rc\n".encode())
    assert read_text(path, ArchError, "text") == "a\nb\nc\n"


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [DEPTH + 5, 900, 100_000])
def test_deep_documents_are_refused(depth: int) -> None:
    with pytest.raises(ArchError, match="here: not JSON: lists nested too deeply"):
        parse_json(f'{{"a": {_nested(depth)}}}', "here", ArchError)
    with pytest.raises(ArchError, match="here: not YAML: lists nested too deeply"):
        parse_yaml(f"a: {_nested(depth)}", "here", ArchError)


def test_documents_up_to_the_depth_are_read() -> None:
    assert parse_json(f'{{"a": {_nested(DEPTH - 2)}}}', "here", ArchError)
    assert parse_yaml(f"a: {_nested(DEPTH - 2)}", "here", ArchError)


@pytest.mark.parametrize("digits", [50, 5_000])
def test_numbers_of_many_digits_are_refused(digits: int) -> None:
    with pytest.raises(ArchError, match=f"not JSON: a number of {digits} digits"):
        parse_json(f'{{"a": {"9" * digits}}}', "here", ArchError)
    with pytest.raises(ArchError, match="not YAML: "):
        parse_yaml(f"a: {'9' * digits}", "here", ArchError)


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(ArchError, match="not YAML: more than 5,000,000 values"):
        parse_yaml("\n".join(lines), "here", ArchError)


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99", "a: !!int x", "a: !!float x", "? [a]\n: b", "a: !!timestamp"]
)
def test_what_the_yaml_library_raises_becomes_one_line(text: str) -> None:
    with pytest.raises(ArchError, match=r"^here.*: not YAML: .+"):
        parse_yaml(text, "here", ArchError)


def test_a_csv_is_read_by_the_names_of_its_columns() -> None:
    rows = list(csv_rows(' File ,LABEL\n"a, b",x\n\nc\n', "here", ArchError, ["file", "label"]))
    assert rows == [(2, {"file": "a, b", "label": "x"}), (4, {"file": "c", "label": ""})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns missing: file; expected file"),
        ("name\nx\n", "columns missing: file; expected file"),
        ("file,file\nx,y\n", "columns there twice: file"),
        ("file,label\nx,y\na,b,c\n", "line 3: 3 fields, expected 2"),
        ('file\n"x', "line 2: not CSV: "),
        (f"file\n{'x' * (FIELD_CHARACTERS + 1)}\n", "line 2: a field of over 100,000 characters"),
        (f"file\n{'x' * 200_000}\n", "line 2: not CSV: field larger than field limit"),
    ],
)
def test_a_csv_of_another_form_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ArchError, match=f"^here: {message}"):
        list(csv_rows(text, "here", ArchError, ["file"]))


def test_half_of_a_surrogate_pair_is_refused_as_value_and_as_key() -> None:
    for text in ('{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": [["x\\udc80y"]]}'):
        with pytest.raises(ArchError, match=r"^x: not JSON: text with half of a surrogate pair$"):
            parse_json(text, "x", ArchError)
        with pytest.raises(ArchError, match=r"^x: not YAML: text with half of a surrogate pair$"):
            parse_yaml(text, "x", ArchError)
    assert parse_json('{"\\ud83d\\ude00": "\\ud83d\\ude00"}', "x", ArchError) == {"\U0001f600": "\U0001f600"}


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchError, match="cannot be read"):
        read_bytes(tmp_path / "a\0b", ArchError, "a file")
    assert not is_file(tmp_path / "a\0b")
    assert not is_file(tmp_path / ("x" * 5000))
    (tmp_path / "file").touch()
    assert is_file(tmp_path / "file")
    assert not is_file(tmp_path / "file" / "inside")
