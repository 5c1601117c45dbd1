from pathlib import Path

import pytest
from pydantic import TypeAdapter

from qnas.data.file_cache import keep, recall

FORM: TypeAdapter[list[int | str]] = TypeAdapter(list[int | str])


def test_what_is_kept_is_recalled_under_its_schema_and_stamp_alone(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "kept.json"
    assert recall(path, "a/1", "then", FORM) is None
    keep(path, "a/1", "then", [1, "two"])
    assert recall(path, "a/1", "then", FORM) == [1, "two"]
    assert recall(path, "a/2", "then", FORM) is None
    assert recall(path, "a/1", "now", FORM) is None
    assert recall(path, "a/1", "then", TypeAdapter(list[int])) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["kept.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", '{"kept": [1]}'])
def test_a_damaged_file_holds_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(text)
    assert recall(path, "a/1", "then", FORM) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    keep(tmp_path / "file" / "kept.json", "a/1", "then", 1)
    assert recall(tmp_path / "file" / "kept.json", "a/1", "then", FORM) is None
