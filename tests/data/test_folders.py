import gzip
import io
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.pictures import load, numbered, numbers, pack

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
        ("file,class", ["all/000.png,a"], r"columns missing: label; expected file,label\[,split\]"),
        ("file,label", ["all/000.png,a", "all/001.png,"], "line 3: no label"),
        ("file,label", [",a"], "line 2: no file"),
        ("file,label", ["all/000.png,a", "all/000.png,b"], r"line 3: all/000\.png is in line 2 too"),
        ("file,label", ["all/000.png,a", "all/001.png,a"], "1 classes, expected at least 2"),
        ("file,label,split", ["all/000.png,a,dev"], r"line 2: split 'dev': expected train, val, test"),
        ("file,label,split", ["all/000.png,a,train", "all/001.png,b,"], "line 3: split '': expected train"),
        (
            "file,label,split",
            ["all/000.png,a,val", "all/001.png,b,test"],
            "splits test and val, expected train and val or test",
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


def test_other_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 5, "b": 5, ".thumbnails": 3})
    (root / "a" / "readme.txt").write_text("text")
    (root / "a" / "._000.png").write_text("left by an operating system")
    loaded = load(root)
    assert loaded.classes == ("a", "b")
    assert sum(loaded.counts.values()) == 10


@pytest.mark.parametrize(
    ("kind", "counts", "message"),
    [
        ("imagefolder", {}, r": no folders of images, expected train/CLASS/\* or CLASS/\*"),
        ("imagefolder", {"a": 5}, ": 1 class folders, expected at least 2"),
        ("imagefolder", {"a": 5, "b": 0}, ": class folder 'b' has no images"),
        (
            "imagefolder",
            {"a": 5, "b": 2},
            ": class 'b' has 2 training images, expected at least 3, as test and heldout images are split",
        ),
        (
            "imagefolder",
            {"train/a": 5, "train/b": 1, "val/a": 1, "val/b": 1},
            ": class 'b' has 1 training images, expected at least 2, as heldout images are split off$",
        ),
        (
            "imagefolder",
            {"train/a": 5, "train/b": 5, "train/c": 5, "val/a": 1, "val/d": 1},
            ": classes of val differ from those of train: lacks b, c; adds d",
        ),
        (
            "imagefolder",
            {"train/a": 5, "train/b": 5},
            r": expected class folders in train and in val or test; or give .*/train, which is then split",
        ),
        ("cifar10", {"a": 5, "b": 5}, ": expected class folders in train and in test$"),
        (
            "cifar10",
            {"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 0},
            ": class folder 'b' of test has no images",
        ),
    ],
)
def test_a_folder_of_wrong_form_is_explained(
    tmp_path: Path, kind: str, counts: dict[str, int], message: str
) -> None:
    numbered(tmp_path, counts)
    for folder in counts:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError, match=f"{tmp_path}{message}"):
        load(tmp_path, kind)


@pytest.mark.parametrize("kind", ["imagefolder", "cifar10", "fashion-mnist"])
def test_a_missing_folder_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}/nowhere: no such file or folder$"):
        load(tmp_path / "nowhere", kind)


@pytest.mark.parametrize("prefix", ["", "./", "cifar10/"])
def test_a_tar_holds_what_its_folder_holds(noise: Path, tmp_path: Path, prefix: str) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz", prefix)
    expected = load(noise, "cifar10")
    for path in (tar, tmp_path):  # the folder holds nothing but the tar
        loaded = load(path, "cifar10")
        assert loaded.digest == expected.digest
        assert loaded.classes == expected.classes
        assert torch.equal(loaded.train.read(torch.arange(32)), expected.train.read(torch.arange(32)))


@pytest.mark.parametrize("left", [0.02, 0.5, 0.9, 0.9999])
def test_a_cut_tar_is_damaged(noise: Path, tmp_path: Path, left: float) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    content = tar.read_bytes()
    tar.write_bytes(content[: int(left * len(content))])
    with pytest.raises(DataError, match=rf"^{tar}: damaged: [^\n]+$"):
        load(tar, "cifar10")


def test_a_tar_with_a_wrong_byte_is_damaged(noise: Path, tmp_path: Path) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"^{tar}: damaged: "):
        load(tar, "cifar10")


@pytest.mark.parametrize("how", ["header", "no end"])
def test_a_tar_that_ends_early_inside_whole_gzip_is_damaged(noise: Path, tmp_path: Path, how: str) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    content = bytearray(gzip.decompress(tar.read_bytes()))
    with tarfile.open(tar) as listing:
        last = listing.getmembers()[-2]
    if how == "header":
        content[last.offset : last.offset + 8] = b"scribble"
    else:
        del content[last.offset :]
    tar.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=f"^{tar}: damaged: "):
        load(tar, "cifar10")


def test_a_tar_writes_no_files_and_follows_no_links(noise: Path, tmp_path: Path) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    png = (noise / "train" / "ant" / "0.png").read_bytes()
    with tarfile.open(tar) as old, tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
        link = tarfile.TarInfo("train/ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(noise / "train" / "bee" / "0.png")
        new.addfile(link)
        outside = tarfile.TarInfo("train/ant/../../../outside.png")
        outside.size = len(png)
        new.addfile(outside, io.BytesIO(png))
    before = sorted(tmp_path.parent.rglob("*"))
    assert load(tmp_path / "evil.tar.gz").counts == load(tar).counts
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_tar_too_large_for_memory_is_refused(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    monkeypatch.setattr("qnas.data.folders.UNPACKED_LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match=f"{tar}: over 1000 bytes: unpack it to a folder"):
        load(tar)
