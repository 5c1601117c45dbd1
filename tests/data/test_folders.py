import gzip
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, mutated_bytes, read_or_refuse
from helpers.pictures import PX, load, numbered, numbers, pack, png
from helpers.places import SHARED
from helpers.tars import header_mutants, reheaded
from hypothesis import given
from hypothesis import strategies as st

from qnas.common.errors import DataError
from qnas.data import left_out
from qnas.data.broken_images import broken_copies
from qnas.data.folders import read_folder
from qnas.data.loading import load_data


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
    assert {each.reason: each.first for each in loaded.left_out} == {".txt files": ("a/readme.txt",)}


def reasons(path: Path) -> dict[str, int]:
    """Return how many files are left out for each reason."""
    return {each.reason: each.files for each in read_folder(path).left_out}


def test_images_that_lie_too_deep_or_outside_are_counted(tmp_path: Path) -> None:
    flat = numbered(tmp_path / "flat", {"a": 5, "b": 5, "a/more": 3, "a/more/yet": 2})
    (flat / "over.png").write_bytes(png((1, 2, 3)))
    assert reasons(flat) == {left_out.TOO_DEEP: 5, left_out.OUTSIDE: 1}
    split = numbered(tmp_path / "split", {"train/a": 3, "train/b": 3, "val/a": 3, "val/b": 3})
    numbered(split, {"train/a/more": 2, "extra": 4, "extra/x": 1})
    (split / "train" / "stray.png").write_bytes(png((1, 2, 3)))
    assert reasons(split) == {left_out.OUTSIDE: 6, left_out.TOO_DEEP: 2}


def test_what_is_no_regular_file_is_counted_and_not_opened(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 5, "b": 5})
    os.mkfifo(root / "a" / "pipe.png")
    os.mkfifo(root / "labels.csv")
    os.mkfifo(root / "images.tar.gz")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "b" / "socket.png"))
    (root / "b" / "nothing.png").symlink_to("nowhere.png")
    (root / "b" / "itself.png").symlink_to("itself.png")
    (root / "b" / "device.png").symlink_to("/dev/zero")
    (root / "b" / "linked.png").symlink_to(root / "a" / "000.png")
    found = reasons(root)
    assert sum(found.values()) == 7
    assert found[left_out.NOT_REGULAR] >= 3
    assert sum(load(root).counts.values()) == 11, "a link to an image is an image"


def test_links_to_folders_are_not_followed_to_count(tmp_path: Path) -> None:
    root = numbered(tmp_path / "root", {"a": 5, "b": 5})
    numbered(tmp_path / "far", {"x/y": 4, "x": 2})
    (root / "a" / "deep").symlink_to(tmp_path / "far")
    (root / "a" / "up").symlink_to("..")
    (root / "c").symlink_to(tmp_path / "far" / "x")
    assert read_folder(root).classes == ("a", "b", "c"), "a class may be a link"
    found = reasons(root)
    assert found[left_out.DEEP_LINK] >= 2
    assert len(found) <= 3


def test_a_folder_named_as_a_split_is_a_class_beside_others(tmp_path: Path) -> None:
    assert load(numbered(tmp_path / "rail", {"bus": 5, "car": 5, "train": 5})).classes == (
        *("bus", "car", "train"),
    )
    assert load(numbered(tmp_path / "all", {"bus": 5, "test": 5, "train": 5, "val": 5})).classes == (
        *("bus", "test", "train", "val"),
    )
    nested = numbered(tmp_path / "nested", {"bus": 5, "train": 5, "train/steam": 2})
    assert load(nested).classes == ("bus", "train")
    assert reasons(nested) == {left_out.TOO_DEEP: 2}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_splits_are_called_as_their_folders(val: str, tmp_path: Path) -> None:
    root = numbered(tmp_path, {"train/a": 5, "train/b": 5, f"{val}/a": 2, f"{val}/b": 2})
    data = load(root)
    assert data.counts["test"] == 4
    assert data.split_names == {"train": "train", "test": val}
    assert data.described_counts == f"8 train, 2 heldout, 4 test (your {val})"
    for i in range(2):
        (root / val / "b" / f"{i:03}.png").unlink()
    with pytest.raises(DataError, match=f"class folder 'b' of {val} has no images$"):
        load(root)


def test_broken_images_are_those_of_the_split_as_it_is_called(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"train/a": 5, "train/b": 5, "valid/a": 1, "valid/b": 1})
    for path in (root / "valid").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"all valid images are broken$"):
        load(root, max_broken=1)


def test_a_class_of_a_tar_whose_name_is_not_text_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO(small_tar())
    with tarfile.open(fileobj=file, mode="a", format=tarfile.GNU_FORMAT) as tar:
        for part in ("train", "test"):
            member = tarfile.TarInfo(f"{part}/k\udce4se/0.png")
            member.size = len(png((1, 2, 3)))
            tar.addfile(member, io.BytesIO(png((1, 2, 3))))
    path = tmp_path / "images.tar.gz"
    path.write_bytes(gzip.compress(file.getvalue()))
    with pytest.raises(DataError, match=r"the class k\\xe4se is not named in UTF-8"):
        read_folder(path)


def test_a_class_whose_images_lie_deeper_is_said(tmp_path: Path) -> None:
    numbered(tmp_path, {"a": 5, "b/deeper": 3})
    with pytest.raises(DataError, match=r"class folder 'b' has no images: 3 lie deeper$"):
        load(tmp_path)


def test_a_split_under_two_names_is_refused(tmp_path: Path) -> None:
    numbered(tmp_path, {f"{split}/{name}": 2 for split in ("train", "val", "valid") for name in "ab"})
    with pytest.raises(DataError, match="val and valid are the same split: expected one of them"):
        load(tmp_path)


@pytest.mark.parametrize("layout", ["{}", "train/{}"])
def test_a_class_whose_name_is_not_text_is_refused(layout: str, tmp_path: Path) -> None:
    for name in (b"k\xe4se", b"brot"):
        for part in {layout, layout.replace("train", "val")}:
            folder = os.path.join(os.fsencode(tmp_path), part.format("").encode(), name)
            os.makedirs(folder)
            for i in range(5):
                Path(os.fsdecode(folder), f"{i}.png").write_bytes(png((i, 0, 0)))
    with pytest.raises(DataError, match=r"the class k\\xe4se is not named in UTF-8: rename it$"):
        load(tmp_path)


def test_a_file_whose_name_is_not_text_is_an_image(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 5, "b": 5})
    broken = Path(os.fsdecode(os.fsencode(root / "a") + b"/k\xe4se\n.png"))
    broken.write_bytes(b"no image")
    data = load(root, max_broken=0.2)
    assert sum(data.counts.values()) == 10
    assert r"k\xe4se\n.png" in broken_copies("broken.csv", data.broken)["broken.csv"]


def test_classes_of_odd_names_are_classes(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x1b[2Jd", " e", "f\u202eg", "|*`<h>"]
    assert load(numbered(tmp_path, dict.fromkeys(names, 4))).classes == tuple(sorted(names))


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
    evil = load(tmp_path / "evil.tar.gz")
    assert evil.counts == load(tar).counts
    assert {each.reason: each.files for each in evil.left_out} == {left_out.OF_TAR: 1, left_out.ELSEWHERE: 1}
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_tar_too_large_for_memory_is_refused(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    monkeypatch.setattr("qnas.data.folders.UNPACKED_LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match=f"{tar}: over 1000 bytes: unpack it to a folder"):
        load(tar)


def small_tar(form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of two splits of two classes, with a long name in another header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for place, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
            for i, name in enumerate(("0.png", "x" * 110 + ".png", "2.png")):
                member = tarfile.TarInfo(f"{folder}/{name}")
                content = png((place, i, 0), 4)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read_small(path: Path) -> None:
    load_data(f"cifar10:{path}", resolution_px=PX, max_broken=1, quiet=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (124, b"\x80" + b"\xff" * 11, "damaged"),  # a size of 2**88
        (124, b"\xff" * 12, "damaged"),  # a size of -1
        (124, b"77777777777\0", "damaged"),
    ],
)
def test_a_wrong_header_is_damage(field: int, value: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "images.tar.gz"
    with tarfile.open(fileobj=io.BytesIO(small_tar(tarfile.GNU_FORMAT))) as tar:
        second = tar.getmembers()[1].offset
    path.write_bytes(gzip.compress(reheaded(small_tar(tarfile.GNU_FORMAT), second, field, value)))
    with pytest.raises(DataError, match=f"^{path}: {message}: "):
        read_small(path)


def test_headers_of_headers_end(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2
    again = (member.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")) * 5000
    path = tmp_path / "images.tar.gz"
    path.write_bytes(gzip.compress(again + small_tar()))
    with pytest.raises(DataError, match=f"^{path}: damaged: "):
        read_small(path)


def test_a_tar_that_unpacks_to_far_more_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qnas.data.folders._UNPACKED_ANYWAY", 1_000_000)
    path = tmp_path / "images.tar.gz"
    path.write_bytes(gzip.compress(small_tar() + bytes(50_000_000)))
    with pytest.raises(DataError, match=rf"^{path}: over \d+ bytes: unpack it to a folder"):
        read_small(path)


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnas.data.image_files.MEMBERS", 10)
    path = tmp_path / "images.tar.gz"
    path.write_bytes(gzip.compress(small_tar()))
    with pytest.raises(DataError, match="damaged: over 10 members"):
        read_small(path)


def test_a_tar_of_deep_folders_is_counted(tmp_path: Path) -> None:
    file = io.BytesIO(small_tar())
    with tarfile.open(fileobj=file, mode="a") as tar:
        for depth in (3, 70, 20_000):
            member = tarfile.TarInfo("train/a/" + "d/" * depth + "0.png")
            tar.addfile(member)
    path = tmp_path / "images.tar.gz"
    path.write_bytes(gzip.compress(file.getvalue()))
    assert reasons(path) == {left_out.TOO_DEEP: 3}


@bounded
@given(mutated_bytes(small_tar()), st.booleans())
def test_a_mutant_of_a_tar_is_read_or_refused_in_a_line(tmp_path: Path, tar: bytes, zipped: bool) -> None:
    content = gzip.compress(tar, 1) if zipped else tar
    read_or_refuse(read_small, tmp_path / "images.tar.gz", content)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["members", "headers", "gzip"])
def test_mutants_of_a_tar_are_read_or_refused_in_a_line(what: str, tmp_path: Path) -> None:
    good = small_tar(tarfile.GNU_FORMAT if what == "headers" else tarfile.PAX_FORMAT)
    if what == "gzip":
        contents = list(byte_mutants(gzip.compress(good), MUTANTS))
    else:
        mutants = byte_mutants if what == "members" else header_mutants
        contents = [gzip.compress(tar, 1) for tar in mutants(good, MUTANTS)]
    assert attack(read_small, tmp_path / "images.tar.gz", contents) == []


def test_known_faults_of_tars_are_refused_in_a_line(tmp_path: Path) -> None:
    faults = sorted((SHARED / "faults").glob("targz__*"))
    if not faults:
        pytest.skip("the shared faults are not here")
    for fault in faults:
        path = tmp_path / "images.tar.gz"
        path.write_bytes(fault.read_bytes())
        with pytest.raises(DataError, match=f"^{path}: damaged: "):
            read_folder(path)
