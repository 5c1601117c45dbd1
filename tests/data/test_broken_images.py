import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import load, numbered, numbers

from qnas.common.errors import DataError, UsageError
from qnas.data.image_data import ImageData, sample_images
from qnas.data.image_files import OriginalFile
from qnas.data.lazy_images import read_pixels

LIMITS = pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return numbered(tmp_path / "photos", {"ant": 20, "bee": 20})


def spoil(path: Path) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[:40])
    return content


def splits(data: ImageData) -> list[list[tuple[int, int]]]:
    return [numbers(split) for split in (data.train, data.heldout, data.test, data.train_and_heldout)]


@LIMITS
def test_broken_images_are_left_out_of_splits_that_stay_what_they_are(
    memory_limit_bytes: int, photos: Path
) -> None:
    options: dict[str, Any] = {"memory_limit_bytes": memory_limit_bytes, "max_broken": 0.25}
    before = load(photos, **options)
    assert before.broken == ()
    expected = splits(before)
    gone = [numbers(before.train)[3], numbers(before.heldout)[1], numbers(before.test)[0]]
    for i, c in gone:
        spoil(photos / ("ant", "bee")[c] / f"{i:03}.png")
    after = load(photos, **options)
    assert splits(after) == [[each for each in part if each not in gone] for part in expected]
    for split in (after.train, after.heldout, after.test):
        assert [c for _, c in numbers(split)] == split.labels.tolist()
    assert sorted(each.file for each in after.broken) == sorted(
        str(photos / ("ant", "bee")[c] / f"{i:03}.png") for i, c in gone
    )
    assert all(each.problem.startswith("not a whole image: ") for each in after.broken)
    assert after.digest != before.digest


def test_what_is_broken_changes_the_digest_of_a_large_set_too(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qnas.data.labelled_images.HASHED_BYTES", 0)
    whole = load(photos)
    content = spoil(photos / "ant" / "003.png")
    (photos / "ant" / "003.png").write_bytes(bytes(len(content)))  # of the size that it had
    assert load(photos, max_broken=0.1).digest != whole.digest


@LIMITS
@pytest.mark.parametrize("count", [2, 3])
def test_more_broken_images_than_allowed_stop_it(count: int, memory_limit_bytes: int, photos: Path) -> None:
    for i in range(count):
        spoil(photos / "ant" / f"{i:03}.png")
    options: dict[str, Any] = {"memory_limit_bytes": memory_limit_bytes, "max_broken": 0.05}
    if count == 2:  # of 40
        assert len(load(photos, **options).broken) == 2
        return
    with pytest.raises(
        DataError, match=r"3 of 40 images are broken, more than `max_broken=0\.05` allows: .*00\.png: not a"
    ):
        load(photos, **options)


def test_by_default_one_in_a_hundred_may_be_broken(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"ant": 50, "bee": 50})
    spoil(root / "ant" / "001.png")
    assert len(load(root).broken) == 1
    spoil(root / "ant" / "002.png")
    with pytest.raises(DataError, match="2 of 100 images are broken"):
        load(root)


@LIMITS
def test_a_class_or_a_split_of_broken_images_alone_is_refused(
    memory_limit_bytes: int, tmp_path: Path
) -> None:
    root = numbered(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 1})
    options: dict[str, Any] = {"memory_limit_bytes": memory_limit_bytes, "max_broken": 1.0}
    kept = [spoil(root / "test" / name / "000.png") for name in "ab"]
    with pytest.raises(DataError, match="all test images are broken"):
        load(root, **options)
    for name, content in zip("ab", kept, strict=True):
        (root / "test" / name / "000.png").write_bytes(content)
    for i in range(5):
        spoil(root / "train" / "b" / f"{i:03}.png")
    with pytest.raises(DataError, match="all training images of class 'b' are broken"):
        load(root, **options)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_the_limit_is_a_share(share: float, photos: Path) -> None:
    with pytest.raises(UsageError, match=f"`max_broken={share}`: expected a share"):
        load(photos, max_broken=share)


def test_a_large_set_is_looked_at_once_until_a_file_changes(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def look(file: OriginalFile, px: int, *, bits: int) -> torch.Tensor:
        looked.append(file.name)
        return read_pixels(file, px, bits=bits)

    monkeypatch.setattr("qnas.data.broken_images.read_pixels", look)
    options: dict[str, Any] = {"memory_limit_bytes": 0, "max_broken": 0.1}
    broken = photos / "bee" / "007.png"
    content = spoil(broken)
    first = load(photos, **options)
    assert len(looked) == 40
    assert load(photos, **options).broken == first.broken
    assert load(photos, **options, resolution_px=8).broken == first.broken
    assert len(looked) == 40
    with pytest.raises(DataError, match="1 of 40"):  # what is kept is held against the limit too
        load(photos, **options | {"max_broken": 0.01})
    assert len(looked) == 40
    broken.write_bytes(content)
    assert load(photos, **options).broken == ()
    assert len(looked) == 80


def test_what_a_failing_disk_hides_is_broken_for_now_alone(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"memory_limit_bytes": 0, "max_broken": 0.1}
    read = OriginalFile.read

    def fail(self: OriginalFile, most: int | None = None) -> bytes | memoryview:
        if self.name == "bee/007.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, most)

    with monkeypatch.context() as patch:
        patch.setattr("qnas.data.labelled_images.HASHED_BYTES", 0)
        patch.setattr(OriginalFile, "read", fail)
        (broken,) = load(photos, **options).broken
        assert broken.problem == "cannot be read: Input/output error"
    assert load(photos, **options).broken == ()


def test_a_damaged_or_missing_cache_is_done_without(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(photos / "ant" / "003.png")
    options: dict[str, Any] = {"memory_limit_bytes": 0, "max_broken": 0.1}
    expected = load(photos, **options).broken
    (kept,) = cache.glob("broken/*.json")
    kept.write_text("{")
    assert load(photos, **options).broken == expected
    (cache / "file").touch()
    monkeypatch.setenv("QNAS_HOME", str(cache / "file"))
    assert load(photos, **options).broken == expected


def test_one_process_looks_and_the_others_wait(photos: Path, cache: Path) -> None:
    import fcntl
    import threading

    options: dict[str, Any] = {"memory_limit_bytes": 0, "max_broken": 0.1}
    load(photos, **options)
    (kept,) = cache.glob("broken/*.json")
    content = kept.read_text()
    kept.unlink()
    spoil_after = photos / "ant" / "003.png"
    before = spoil_after.stat()
    with kept.with_suffix(".lock").open("a") as held:  # as by a process that is looking
        fcntl.flock(held, fcntl.LOCK_EX)
        found: list[ImageData] = []
        waiting = threading.Thread(target=lambda: found.append(load(photos, **options)))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        kept.write_text(content)
        whole = spoil_after.read_bytes()
        spoil_after.write_bytes(bytes(len(whole)))  # would be found by looking
        os.utime(spoil_after, ns=(before.st_atime_ns, before.st_mtime_ns))
    waiting.join(60)
    assert found[0].broken == ()


def test_a_sample_of_images_that_nobody_looked_at_leaves_out_the_broken_ones(photos: Path) -> None:
    whole = load(photos, memory_limit_bytes=0, max_broken=None)
    images, labels = sample_images(whole.test, 100)
    spoil(photos / "ant" / f"{numbers(whole.test)[1][0]:03}.png")
    left, left_labels = sample_images(load(photos, memory_limit_bytes=0, max_broken=None).test, 100)
    kept = [i for i in range(len(images)) if i != 1]
    assert torch.equal(left, images[kept])
    assert torch.equal(left_labels, labels[kept])
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"test: all 8 images are broken: .*: not a whole image"):
        sample_images(load(photos, memory_limit_bytes=0, max_broken=None).test, 100)
