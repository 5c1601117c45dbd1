from pathlib import Path

import pytest
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, mutated_bytes, read_or_refuse
from helpers.pictures import PX, load, numbered
from helpers.places import SHARED
from hypothesis import given

from qnas.common.errors import DataError
from qnas.data.folders import read_folder
from qnas.data.label_table import is_table, read_rows
from qnas.data.loading import load_data

ROWS = [("a/000.png", "ant"), ("a/001.png", "bee"), ("a/002.png", "ant"), ("a/003.png", "bee")]
GOOD = "file,label\n" + "".join(f"{file},{label}\n" for file, label in ROWS)


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_separators_and_encodings_with_their_mark_are_read(
    separator: str, encoding: str, line_end: str, tmp_path: Path
) -> None:
    text = GOOD.replace("ant", "Größe").replace(",", separator).replace("\n", line_end)
    table = written(tmp_path / "labels.csv", text, encoding)
    assert is_table(table)
    expected = [(file, label.replace("ant", "Größe")) for file, label in ROWS]
    assert [row[:2] for row in read_rows(table)] == expected


def test_quotes_hold_separators_and_tsv_files_are_tables_too(tmp_path: Path) -> None:
    numbered(tmp_path, {"a": 4})
    text = '\n"label";"file"\n' + "".join(f'"{label}; big";{file}\n' for file, label in ROWS)
    for name in ("labels.csv", "labels.TSV"):
        table = written(tmp_path / name, text)
        assert read_folder(table).classes == ("ant; big", "bee; big")
        table.unlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("bee", "b\xe4r").encode("latin-1"), r"line 3: not in UTF-8 \(byte 0xe4\): save"),
        (GOOD.replace("bee", "bär").encode("cp1252").replace(b"\n", b"\r"), "line 3: not in UTF-8"),
        (GOOD.encode("utf-16")[:-1], "line 5: not in UTF-16: save"),
        (GOOD.replace("bee", "bee, small").encode(), "line 3: 3 fields, expected 2; a field with a comma"),
        (
            GOOD.replace(",", ";").replace("bee", "bee; small").encode(),
            "line 3: 3 fields, expected 2; a field with a semicolon stands in quotes",
        ),
        (GOOD.encode() + b"./a//000.png,ant\n", r"line 6: \./a//000\.png is in line 2 too$"),
        (
            GOOD.encode() + b"a/000.png,bee\n",
            r"line 6: a/000\.png is in line 2 too, as ant there and bee here$",
        ),
        (b"file,label\n.,1\n1.png,2\n", r"line 2: \. is not the name of a file"),
        (b"file,label\n..,1\n1.png,2\n", "line 2: .* is not the name of a file"),
        (b"file,label\n/,1\n1.png,2\n", "line 2: / is not the name of a file"),
        (b"file,label\na\0b,1\n1.png,2\n", r"line 2: a\\x00b is not the name of a file"),
        (b"file,label\n" + b"x" * 300 + b",1\n1.png,2\n", "line 2: a file name of 300 characters: xxx"),
        (b"file,label\n" + b"x/" * 3000 + b"y,1\n1.png,2\n", "line 2: a file name of 6001 characters"),
        (b"file,label\n0.png," + b"9" * 5000 + b"\n1.png,2\n", "a class of 5000 characters, expected"),
        (b"filename;class\n0.png;1\n", r"columns missing: file, label; expected file,label\[,split\]"),
        (b'file,label\n"0.png,1\n', "line 2: not CSV: unexpected end of data"),
        (b"", "columns missing"),
    ],
)
def test_another_form_is_refused_by_line(content: bytes, message: str, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    for where in (table, tmp_path):  # nothing but the CSV is there, so it is meant
        with pytest.raises(DataError, match=f"^{table}: .*{message}"):
            read_folder(where)


def test_numbers_of_one_value_have_an_order(tmp_path: Path) -> None:
    text = "file,label\n" + "".join(f"{i}.png,{label}\n" for i, label in enumerate(["1", "01", "001", "0"]))
    assert read_folder(written(tmp_path / "labels.csv", text)).classes == ("0", "001", "01", "1")


def test_a_csv_that_is_not_used_is_counted(tmp_path: Path) -> None:
    numbered(tmp_path, {"ant": 5, "bee": 5})
    written(tmp_path / "labels.csv", "filename;class\nx;y\n")
    written(tmp_path / "ant" / "boxes.csv", GOOD)
    (found,) = load(tmp_path).left_out
    assert (found.reason, sorted(found.first)) == ("CSVs that are not used", ["ant/boxes.csv", "labels.csv"])


def test_files_beside_those_of_a_csv_are_counted(tmp_path: Path) -> None:
    numbered(tmp_path, {"a": 6})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "old.csv").write_text("x,y\n")
    written(tmp_path / "labels.csv", GOOD)
    found = {each.reason: each.first for each in read_folder(tmp_path).left_out}
    assert found == {
        "images that the CSV does not list": ("a/004.png", "a/005.png"),
        ".txt files": ("a/notes.txt",),
        "CSVs that are not used": ("old.csv",),
    }


@pytest.mark.parametrize("words", [("train", "valid"), ("Training", "Validation")])
def test_the_words_of_splits_are_known(words: tuple[str, str], tmp_path: Path) -> None:
    numbered(tmp_path, dict.fromkeys(words, 6))
    rows = "".join(f"{word}/{i:03}.png\t{'ab'[i % 2]}\n" for word in words for i in range(6))
    data = load(written(tmp_path / "labels.csv", "file\tlabel\n" + rows))
    assert data.counts["test"] == 6
    assert data.described_counts.endswith("6 test (your val)")


def small(path: Path) -> None:
    load_data(f"imagefolder:{path}", resolution_px=PX, max_broken=1, quiet=True)


@bounded
@given(mutated_bytes(GOOD.encode()))
def test_a_mutant_is_read_or_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    numbered(tmp_path, {"a": 4})
    read_or_refuse(small, tmp_path / "labels.csv", content)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_mutants_are_read_or_refused_in_a_line(encoding: str, tmp_path: Path) -> None:
    numbered(tmp_path, {"a": 4})
    good = GOOD.replace(",", ";") if encoding == "utf-16" else GOOD
    contents = byte_mutants(good.encode(encoding), MUTANTS)
    assert attack(small, tmp_path / "labels.csv", contents) == []


def test_known_faults_are_refused_in_a_line(tmp_path: Path) -> None:
    faults = sorted((SHARED / "faults").glob("foldercsv__*"))
    if not faults:
        pytest.skip("the shared faults are not here")
    for fault in faults:
        path = tmp_path / "labels.csv"
        path.write_bytes(fault.read_bytes())
        with pytest.raises(DataError, match=r": line [25]: "):
            read_folder(path)
