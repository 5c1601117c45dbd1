from pathlib import Path

import pytest
import torch
from helpers.pictures import load, numbered, numbers

from qnas.common.errors import DataError


def write_csv(path: Path, rows: list[str], header: str = "file,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_csv_of_class_folders_is_the_class_folders(tmp_path: Path) -> None:
    root = numbered(tmp_path / "folders", {"ant": 10, "bee": 7})
    expected = load(root)
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.rglob("*.png"))]
    table = write_csv(root / "labels.csv", rows)
    for where in (root, table):
        found = load(where)
        assert found.digest == expected.digest
        assert found.classes == expected.classes
        for name in ("train", "heldout", "test"):
            assert numbers(getattr(found, name)) == numbers(getattr(expected, name))
            assert torch.equal(getattr(found, name).labels, getattr(expected, name).labels)


def test_other_csvs_say_nothing(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"ant": 5, "bee": 5})
    (root / "statistics.csv").write_text("name,value\nmean,3\n", encoding="utf-8")
    (root / "broken.csv").write_bytes(b"\xff\xfe\x00")
    assert load(root).classes == ("ant", "bee")


def test_the_column_split_says_the_splits_and_numbers_are_in_their_order(tmp_path: Path) -> None:
    numbered(tmp_path, {"all": 12})
    # image i has the label 9 or 10; the last of each are for validation and test
    rows = [f"all/{i:03}.png, {9 + i % 2} ,{('train', 'valid', 'TEST')[i // 4]}" for i in range(12)]
    write_csv(tmp_path / "mine.csv", rows, "\ufeffFile,Label,Split")
    data = load(tmp_path)
    assert data.classes == ("9", "10")
    for place, split in enumerate((data.train, data.heldout, data.test)):
        assert [i for i, _ in numbers(split)] == list(range(4 * place, 4 * place + 4))
        assert split.labels.tolist() == [0, 1, 0, 1]


def test_files_in_folders_of_train_and_val_are_split_by_them(tmp_path: Path) -> None:
    numbered(tmp_path, {"train": 8, "val": 4})
    rows = [f"{part}/{i:03}.png,{'ab'[i % 2]}" for part, n in (("train", 8), ("val", 4)) for i in range(n)]
    write_csv(tmp_path / "labels.csv", rows)
    data = load(tmp_path)
    assert data.counts == {"train": 6, "heldout": 2, "test": 4}
    assert numbers(data.test) == [(i, 1) for i in range(4)]


def test_a_listed_file_that_is_not_there_is_a_broken_image(tmp_path: Path) -> None:
    numbered(tmp_path, {"ant": 5, "bee": 5})
    rows = [f"{name}/{i:03}.png,{name}" for name in ("ant", "bee") for i in range(6)]
    write_csv(tmp_path / "labels.csv", rows)
    data = load(tmp_path, max_broken=0.2)
    assert sorted(Path(each.file).name for each in data.broken) == ["005.png", "005.png"]
    assert all(each.problem == "no such file" for each in data.broken)
    assert sum(data.counts.values()) == 10


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("file,class", ["all/000.png,a"], "lacks the column label: expected file,label"),
        ("file,label", ["all/000.png,a", "all/001.png,"], "line 3: no label"),
        ("file,label", [",a"], "line 2: no file"),
        ("file,label", ["all/000.png,a", "all/000.png,b"], r"line 3: all/000\.png is in line 2 too"),
        ("file,label", ["all/000.png,a", "all/001.png,a"], "1 classes, expected at least 2"),
        ("file,label,split", ["all/000.png,a,dev"], r"line 2: split 'dev': expected train, val, test"),
        ("file,label,split", ["all/000.png,a,train", "all/001.png,b,"], "line 3: split '': expected train"),
        (
            "file,label,split",
            ["all/000.png,a,val", "all/001.png,b,test"],
            "of train, val and test it has test and val alone",
        ),
        (
            "file,label,split",
            ["all/000.png,a,train", "all/001.png,b,test"],
            "no training image of class 'b'",
        ),
    ],
)
def test_a_csv_of_another_form_is_explained(
    header: str, rows: list[str], message: str, tmp_path: Path
) -> None:
    numbered(tmp_path, {"all": 4})
    table = write_csv(tmp_path / "labels.csv", rows, header)
    with pytest.raises(DataError, match=f"^{table}: .*{message}"):
        load(table)


def test_several_csvs_are_not_chosen_from(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, ["x.png,1"])
    with pytest.raises(DataError, match=r"several CSVs of labels: give one: .*a\.csv, .*b\.csv"):
        load(tmp_path)
