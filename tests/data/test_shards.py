import gzip
import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mutants import MUTANTS, attack, bounded, byte_mutants, mutated_bytes, read_or_refuse
from helpers.pictures import PX, load, numbered, numbers, png, samples, write_tar
from helpers.tars import header_mutants
from hypothesis import given

from qnas.common.errors import DataError
from qnas.data import left_out, shards
from qnas.data.batches import batches
from qnas.data.lazy_images import LazyImages
from qnas.data.shards import ShardImages, read_shards


def split_in(members: list[tuple[str, bytes]], pieces: int, folder: Path, stem: str) -> None:
    """Write members into several shards, an image and its label never apart."""
    size = 2 * -(-len(members) // (2 * pieces))
    for number in range(pieces):
        write_tar(folder / f"{stem}-{number:06}.tar", members[number * size : (number + 1) * size])


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])
def test_shards_of_class_folders_are_the_class_folders(memory_limit_bytes: int, tmp_path: Path) -> None:
    counts = {f"{part}/{name}": n for part, n in (("train", 9), ("val", 4)) for name in ("ant", "bee")}
    root = numbered(tmp_path / "folders", counts)
    for part in ("train", "val"):
        split_in(samples(root, [f"{part}/ant", f"{part}/bee"]), 3, tmp_path / "shards", f"mine-{part}")
    expected = load(root)
    found = load(tmp_path / "shards", "shards", memory_limit_bytes=memory_limit_bytes)
    assert isinstance(found.train.images, torch.Tensor) == (memory_limit_bytes > 0)
    assert found.classes == expected.classes
    assert (found.mean, found.std, found.name) == (expected.mean, expected.std, "shards")
    options: dict[str, Any] = {"seed": 2, "epoch": 5, "augment": True, "drop_last": True}
    for name in ("train", "heldout", "test"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert numbers(ours) == numbers(theirs)
        for (x, y), (u, v) in zip(batches(ours, 2, **options), batches(theirs, 2, **options), strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_a_resumed_epoch_and_the_parts_of_processes_are_those_of_the_whole(tmp_path: Path) -> None:
    root = numbered(tmp_path / "folders", {"ant": 20, "bee": 20})
    split_in(samples(root, ["ant", "bee"]), 4, tmp_path / "shards", "all")
    train = load(tmp_path / "shards", "shards", memory_limit_bytes=0).train
    options: dict[str, Any] = {"seed": 0, "epoch": 3, "augment": True, "drop_last": True}
    whole = list(batches(train, 4, **options))
    parts = [list(batches(train, 4, start=2, part=(which, 2), **options)) for which in range(2)]
    assert len(whole) > 4
    for (x, y), (u, v), (w, z) in zip(whole[2:], *parts, strict=True):
        assert torch.equal(x, torch.cat([u, w]))
        assert torch.equal(y, torch.cat([v, z]))
    seen = torch.cat([y for _, y in whole])
    assert 0 < seen[:4].sum() < 4, "an epoch is a shuffle of all shards"


def test_shards_lie_on_the_disk_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, 30_000, dtype=np.uint8).tobytes() for _ in range(200)]
    # as large as photographs: what follows the end of a PNG is not looked at
    members = [(f"{i:04}.{s}", c) for i in range(200) for s, c in _photo(i, noise[i])]
    write_tar(tmp_path / "shards" / "0.tar", members)
    del members, noise
    tracemalloc.start()
    data = load(tmp_path / "shards", "shards", memory_limit_bytes=0)
    for _ in batches(data.train, 4, seed=0):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "shards" / "0.tar").stat().st_size > 6_000_000
    assert peak < 3_000_000  # 1.3 MB of images read ahead; threads and garbage may add to it
    assert isinstance(data.train.images, LazyImages)
    images = data.train.images.originals
    assert isinstance(images, ShardImages)
    numbers_of = (images.shard, images.start, images.size, images.name_ends)
    held = sum(len(each) * each.itemsize for each in numbers_of) + len(images.names)
    assert held / len(images) < 50  # bytes an image


def _photo(i: int, rest: bytes) -> list[tuple[str, bytes]]:
    return [("png", png((i, i % 2, 7)) + rest), ("cls", b"%d\n" % (i % 2))]


def test_labels_are_names_or_numbers_and_the_classes_are_in_the_file_beside(tmp_path: Path) -> None:
    images = [(f"{i}.png", png((i, 0, 0))) for i in range(12)]

    def classes(labels: list[str], names: str | None) -> tuple[tuple[str, ...], list[int]]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        members = [m for i, image in enumerate(images) for m in (image, (f"{i}.cls", labels[i].encode()))]
        write_tar(folder / "a.tar", members)
        if names is not None:
            (folder / "classes.txt").write_text(names, encoding="utf-8")
        found = read_shards(folder)
        return found.classes, found.targets.tolist()

    by_number = [i % 3 for i in range(12)]
    texts = [str(i) for i in by_number]
    assert classes(texts, "crane\nmaillot\nGröße\n") == (("crane", "maillot", "Größe"), by_number)
    # ImageNet has two classes of one name
    assert classes(texts, "crane\nmaillot\ncrane") == (("crane", "maillot", "crane"), by_number)
    assert classes(texts, None) == (("0", "1", "2"), by_number)
    assert classes([str(9 + i) for i in by_number], None) == (("9", "10", "11"), by_number)
    names = ["owl", "ant", "bee"]
    assert classes([names[i] for i in by_number], "owl\nant\nbee") == (tuple(names), by_number)
    assert classes([names[i] for i in by_number], None) == (("ant", "bee", "owl"), [2, 0, 1] * 4)


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["x-train-0.tar", "x-train-1.tar", "x-test-0.tar"], (8, 0, 4)),
        (["train/0.tar", "train/1.tar", "val/0.tar"], (8, 0, 4)),
        (["training_0.tar", "validation_0.tar", "test_0.tar"], (4, 4, 4)),
        (["0.tar", "constraints.tar", "interval.tar"], (12, 0, 0)),
        (["train-0.tar", "train-1.tar", "train-2.tar"], (12, 0, 0)),
    ],
)
def test_the_names_of_shards_say_their_split(
    names: list[str], counts: tuple[int, int, int], tmp_path: Path
) -> None:
    for name in names:
        write_tar(tmp_path / name, [m for i in range(4) for m in _sample(f"{i}", i % 2)])
    parts = read_shards(tmp_path).splits
    assert tuple(len(parts.get(part, ())) for part in ("train", "heldout", "test")) == counts


def _sample(key: str, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png((1, 2, 3))), (f"{key}.cls", b"%d" % label)]


def test_other_members_are_passed_over_in_any_order(tmp_path: Path) -> None:
    members = [
        ("./a/0.json", b"{}"),
        ("./a/0.cls", b"1"),
        ("./a/0.PNG", png((5, 1, 0))),
        ("./a/0.seg.png", b"a mask"),
        ("README", b"of what this is"),
        ("./b/0.png", png((6, 0, 0))),
        ("./b/0.txt", b"a caption"),
        ("./b/0.cls", b"0"),
        ("./b/.DS_Store", b"left by an operating system"),
    ]
    write_tar(tmp_path / "0.tar", members)
    found = read_shards(tmp_path)
    assert isinstance(found.images, ShardImages)
    assert [file.name for file in found.images] == ["0.tar/./a/0.PNG", "0.tar/./b/0.png"]
    assert found.targets.tolist() == [1, 0]
    assert bytes(found.images[0].read()) == png((5, 1, 0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b""), ("1.cls", b"1")], r"0\.tar: 0 has no \.cls right beside it"),
        ([("0.cls", b"1"), ("1.png", b"")], r"0\.tar: 0 has no image right beside it"),
        ([("0.png", b""), ("0.jpg", b"")], "0 has two images"),
        ([("0.png", b""), ("0.cls", b" ")], r"0\.cls: empty, expected the number or name"),
        ([("0.png", b""), ("0.cls", b"x" * 2000)], r"0\.cls: 2000 bytes, expected the number or name"),
        ([("0.png", b""), ("0.cls", b"\xff\xff")], "damaged: 'utf-8' codec"),
        ([("0.txt", b"")], r"no images in its shards, expected KEY\.jpg"),
        ([("0.png", b""), ("0.cls", b"3")], "1 classes, expected at least 2"),
    ],
)
def test_a_shard_of_another_form_is_explained(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=f"^{tmp_path}.*{message}"):
        read_shards(tmp_path)


def test_a_class_that_the_list_lacks_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", _sample("0", 0) + _sample("1", 7))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"classes\.txt: has 2 classes, and not the class '7' of a shard"):
        read_shards(tmp_path)


def test_a_folder_of_no_shards_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.tar shards$"):
        read_shards(tmp_path)
    with gzip.open(tmp_path / "0.tar.gz", "wb") as file:
        file.write(b"")
    with pytest.raises(DataError, match=r"no \.tar shards: unpack \.tar\.gz shards to \.tar"):
        read_shards(tmp_path)
    write_tar(tmp_path / "train-0.tar", _sample("0", 0))
    write_tar(tmp_path / "rest-0.tar", _sample("0", 0))
    with pytest.raises(DataError, match=r"rest-0\.tar: expected one of train, val and test in its name"):
        read_shards(tmp_path)


@pytest.mark.parametrize("how", ["cut in an image", "header", "no end"])
def test_a_damaged_shard_is_named(how: str, tmp_path: Path) -> None:
    members = [m for i in range(6) for m in _sample(f"{i}", i % 2)]
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path) as tar:
        last_image = tar.getmembers()[-2]
    content = bytearray(path.read_bytes())
    if how == "header":
        content[last_image.offset : last_image.offset + 8] = b"scribble"
    else:
        del content[last_image.offset_data + 5 if how == "cut in an image" else last_image.offset :]
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: damaged: [^\n]+$"):
        read_shards(tmp_path)


def test_a_broken_image_of_a_shard_is_named_by_its_key(tmp_path: Path) -> None:
    members = [m for i in range(20) for m in _sample(f"{i:02}", i % 2)]
    members[10] = ("05.png", png((1, 2, 3))[:30])
    write_tar(tmp_path / "0.tar", members)
    for limit in (10**9, 0):
        data = load(tmp_path, "shards", memory_limit_bytes=limit, max_broken=0.05)
        assert [each.file for each in data.broken] == [f"{tmp_path / '0.tar'}: 05.png"]
        assert sum(data.counts.values()) == 19
        assert data.train.read(torch.arange(3)).shape == (3, 3, PX, PX)


def test_headers_are_read_once_until_a_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    for number in range(3):
        write_tar(folder / f"{number}.tar", [m for i in range(4) for m in _sample(f"{number}{i}", i % 2)])
    opened: list[str] = []
    list_samples = shards._list_samples

    def look(shard: Path, *rest: Any) -> Any:
        opened.append(shard.name)
        return list_samples(shard, *rest)

    monkeypatch.setattr(shards, "_list_samples", look)

    def read() -> tuple[list[Any], list[int]]:
        opened.clear()
        found = read_shards(folder)
        return list(found.images), found.targets.tolist()

    expected = read()
    assert opened == ["0.tar", "1.tar", "2.tar"]
    assert read() == expected
    assert opened == []
    kept = sorted((cache / "shards").glob("*.json"))
    assert len(kept) == 3
    for damage in ("{", "[]", kept[0].read_text().replace('"kept": [[[', '"kept": [[[3, ')):
        for path in kept:
            path.write_text(damage)
        assert read() == expected
        assert len(opened) == 3
    write_tar(folder / "1.tar", [m for i in range(3) for m in _sample(f"1{i}", i % 2)])
    assert len(read()[1]) == 11
    assert opened == ["1.tar"]
    (cache / "file").touch()
    monkeypatch.setenv("QNAS_HOME", str(cache / "file"))  # where nothing can be kept
    assert len(read()[1]) == 11
    assert len(opened) == 3


def test_members_and_files_that_are_not_used_are_counted(tmp_path: Path) -> None:
    members = [m for i in range(6) for m in (*_sample(f"{i}", i % 2), (f"{i}.json", b"{}"))]
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "index.txt").write_text("x")
    os.mkfifo(tmp_path / "1.tar")
    for _ in range(2):  # read, and from the cache
        found = {each.reason: (each.files, each.first[0]) for each in read_shards(tmp_path).left_out}
        assert found == {
            ".json files": (6, "0.tar/0.json"),
            left_out.OF_TAR: (1, "0.tar/0.jpg"),
            ".txt files": (1, "index.txt"),
            left_out.NOT_REGULAR: (1, "1.tar"),
        }


def test_classes_are_lines_of_line_feeds_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [m for i in range(4) for m in _sample(f"{i}", i % 2)])
    (tmp_path / "classes.txt").write_bytes("a\u2028b\x0bc\r\nd\n".encode())
    assert read_shards(tmp_path).classes == ("a\u2028b\x0bc", "d")
    (tmp_path / "classes.txt").unlink()
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(DataError, match=r"classes\.txt: cannot be read: not a regular file"):
        read_shards(tmp_path)


def small_shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (m for i in range(6) for m in _sample(f"{i}", i % 2)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read_small(path: Path) -> None:
    load(path.parent, "shards", max_broken=1)


def test_zeros_at_the_end_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(small_shard() + bytes(3_000_000))
    read_small(path)
    monkeypatch.setattr("qnas.data.image_files._PADDING_BYTES", 2_000_000)
    path.write_bytes(small_shard() + bytes(4_000_000))
    with pytest.raises(DataError, match="damaged: an unreadable header"):
        read_small(path)


@bounded
@given(mutated_bytes(small_shard()))
def test_a_mutant_of_a_shard_is_read_or_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    read_or_refuse(read_small, tmp_path / "0.tar", content)


@bounded
@given(mutated_bytes("cat\ndög\n".encode()))
def test_a_mutant_of_the_classes_is_read_or_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(small_shard())
    read_or_refuse(read_small, tmp_path / "classes.txt", content)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["members", "headers", "classes"])
def test_mutants_of_shards_are_read_or_refused_in_a_line(what: str, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(small_shard())
    if what == "classes":
        contents = byte_mutants("cat\ndög\n".encode(), MUTANTS)
    else:
        contents = (byte_mutants if what == "members" else header_mutants)(small_shard(), MUTANTS)
    assert attack(read_small, tmp_path / ("classes.txt" if what == "classes" else "0.tar"), contents) == []
