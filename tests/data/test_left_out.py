import csv
import io
from pathlib import Path

import pytest

from qnas.data.left_out import (
    NAMED,
    REASONS,
    LeftOutFiles,
    is_hidden,
    left_out_facts,
    summary,
    write_left_out,
)


def test_files_are_counted_by_reason_and_the_first_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnas.data.left_out.unreadable_suffixes", lambda: {".heic": "pillow-heif"})
    files = LeftOutFiles()
    for number in range(250):
        files.add_other(".txt", f"{number}.txt")
    files.add_other("", "README")
    files.add_other(".heic", "a\n.heic")
    many, readme, photo = files.found()
    assert (many.reason, many.files, many.first[:2]) == (".txt files", 250, ("0.txt", "1.txt"))
    assert len(many.first) == NAMED
    assert (readme.reason, readme.first) == ("files without a suffix", ("README",))
    assert photo.reason == ".heic files, which need pillow-heif"
    assert photo.first == (r"a\n.heic",)
    assert summary(files.found(), most=2) == (
        "252 files left out: .txt files: 250 (first 0.txt); files without a suffix: 1 (first README); "
        "and 1 more"
    )


def test_the_list_of_a_run_names_them_and_says_how_many_more_there_are(tmp_path: Path) -> None:
    files = LeftOutFiles()
    for number in range(NAMED + 3):
        files.add("too deep", f"{number}, x.png")
    write_left_out(tmp_path / "left-out.csv", files.found())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "left-out.csv").read_text())))
    assert len(rows) == NAMED + 1
    assert rows[0] == {"file": "0, x.png", "reason": "too deep"}
    assert rows[-1]["file"] == "... and 3 more"
    write_left_out(tmp_path / "none.csv", ())
    assert not (tmp_path / "none.csv").exists()
    assert left_out_facts(files.found(), {"test": "val"}) == {
        "left_out": {"too deep": NAMED + 3},
        "split_names": {"test": "val"},
    }
    assert left_out_facts((), {"test": "test"}) == {"left_out": {}}


def test_lists_are_joined() -> None:
    one, other = LeftOutFiles(), LeftOutFiles()
    one.add("a", "1")
    for name in ("2", "3", "4"):
        other.add("a", name)
    one.extend(other.found())
    (found,) = one.found()
    assert (found.files, found.first) == (4, ("1", "2", "3", "4"))


def test_any_suffixes_are_few_reasons() -> None:
    files = LeftOutFiles()
    for number in range(1000):
        files.add_other(f".{number}", f"x.{number}")
    found = files.found()
    assert len(found) <= REASONS + 1
    assert sum(each.files for each in found) == 1000


def test_what_operating_systems_leave_behind_is_not_counted() -> None:
    assert all(map(is_hidden, (".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX", "._a.png")))
    assert not is_hidden("a.png")
