import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.odd_images import COLOURS, GREY, drawn, encoded, png16, tiff16
from helpers.pictures import load, pack

from qnas.common.errors import DataError
from qnas.data import significant_bits
from qnas.data.augmentation import Augmentation
from qnas.data.batches import batches
from qnas.data.image_files import OriginalFile
from qnas.data.significant_bits import bits_for
from qnas.data.sources import open_dataset

PX = 16


def data_set(root: Path, contents: list[bytes], suffix: str = "png", copies: int = 6) -> Path:
    """Write each content as a class of several files."""
    for number, content in enumerate(contents):
        for copy in range(copies):
            path = root / f"class{number}" / f"{copy}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def flat(value: int) -> bytes:
    return png16(np.full((PX, PX), value, np.uint16))


def levels(root: Path, **options: Any) -> dict[str, int]:
    """Return the byte of each class."""
    data = load(root, resolution_px=PX, **options)
    images = data.train.read(torch.arange(len(data.train)))
    return {
        data.classes[label]: int(image[0, 0, 0])
        for image, label in zip(images, data.train.labels, strict=True)
    }


@pytest.mark.parametrize("largest", [0, 255, 256, 1023, 1024, 4095, 4096, 16383, 16384, 65535])
def test_bits_are_the_fewest_that_hold_the_largest_value(largest: int) -> None:
    assert largest < 2 ** bits_for(largest)
    assert bits_for(largest) == 8 or largest >= 2 ** (bits_for(largest) - 2)


LIMITS = pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])


@LIMITS
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((60, 200), (60, 200)),  # 8 bits suffice
        ((60, 4095), (3, 255)),
        ((1000, 3000), (62, 187)),
        ((9000, 45000), (35, 175)),
    ],
)
def test_deep_images_keep_the_levels_of_their_data_set(
    values: tuple[int, int], expected: tuple[int, int], memory_limit_bytes: int, tmp_path: Path
) -> None:
    root = data_set(tmp_path, [flat(value) for value in values])
    found = levels(root, memory_limit_bytes=memory_limit_bytes)
    assert tuple(found.values()) == expected
    opened = open_dataset(f"imagefolder:{root}")
    assert [int(opened[place][0].float().mean()) for place in (0, 6)] == list(expected)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_dark_image_stays_darker_than_a_bright_one(kind: str, tmp_path: Path) -> None:
    root = data_set(tmp_path / "set", [flat(100), flat(4000)])
    if kind == "tar":
        root = pack(root, tmp_path / "set.tar.gz")
    assert levels(root) == {"class0": 100 >> 4, "class1": 4000 >> 4}


def test_bits_are_recorded_and_may_be_given(tmp_path: Path) -> None:
    root = data_set(tmp_path, [flat(100), flat(4000)])
    assert load(root).bits == 12
    assert levels(root, bits=16) == {"class0": 0, "class1": 15}
    assert levels(root, bits=10) == {"class0": 25, "class1": 255}, "larger values are white"
    assert load(root, bits=10).bits == 10


def test_images_of_8_bits_have_none_to_record(tmp_path: Path) -> None:
    root = data_set(tmp_path, [encoded(drawn(PX, PX, seed)) for seed in (1, 2)])
    assert load(root).bits is None
    assert load(data_set(tmp_path / "jpeg", [encoded(drawn(9, 9), "jpeg")] * 2, "jpg")).bits is None


def test_images_of_8_bits_beside_deep_ones_stay_as_they_are(tmp_path: Path) -> None:
    eight = encoded(np.full((PX, PX), 77, np.uint8))
    assert levels(data_set(tmp_path, [eight, flat(1000)])) == {"class0": 77, "class1": 1000 >> 2}


@pytest.mark.parametrize(
    ("said", "values", "bits"),
    [
        (12, (60, 200), 12),
        (12, (60 << 4, 4095 << 4), 16),
        (10, (60, 200), 10),
        (16, (60, 200), 16),
        (1, (60, 200), 8),
    ],
)
def test_a_png_may_say_its_bits(said: int, values: tuple[int, int], bits: int, tmp_path: Path) -> None:
    chunk = (b"sBIT", bytes([said]))
    contents = [png16(np.full((PX, PX), value, np.uint16), GREY, chunk) for value in values]
    assert load(data_set(tmp_path, contents)).bits == bits


def test_a_pgm_says_its_largest_value(tmp_path: Path) -> None:
    contents = [b"P5 4 4 4095\n" + np.full((4, 4), value, ">u2").tobytes() for value in (60, 2048)]
    assert levels(data_set(tmp_path, contents, "pgm")) == {"class0": 3, "class1": 128}


@pytest.mark.parametrize("kind", ["I;16", "I"])
def test_a_tiff_keeps_its_levels(kind: str, tmp_path: Path) -> None:
    dtype = np.uint16 if kind == "I;16" else np.int32
    contents = [encoded(np.full((PX, PX), value, dtype), "tiff") for value in (60, 200)]
    assert levels(data_set(tmp_path, contents, "tif")) == {"class0": 60, "class1": 200}


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_colours_that_would_lose_their_levels_are_refused(kind: str, tmp_path: Path) -> None:
    """Pillow reads 8 of the 16 bits of colours: enough for 16 significant bits, not for 12."""

    def write(values: Any) -> bytes:
        return tiff16(values) if kind == "tif" else png16(values, COLOURS)

    values = drawn(PX, PX).astype(np.uint16)
    full = data_set(tmp_path / "full", [write(values << 8), write(values << 7)], kind)
    assert load(full).bits == 16
    opened = open_dataset(f"imagefolder:{full}")
    assert torch.equal(opened[0][0], torch.from_numpy(drawn(PX, PX)).permute(2, 0, 1))
    short = data_set(tmp_path / "short", [write(values << 4), write(values << 3)], kind)
    for limit in (10**9, 0):
        with pytest.raises(DataError, match="Pillow reads 8 of the 16 bits of its colours, of which 12"):
            load(short, memory_limit_bytes=limit)


def test_broken_images_do_not_count(tmp_path: Path) -> None:
    root = data_set(tmp_path, [flat(60), flat(200)], copies=30)
    whole = flat(45000)
    (root / "class0" / "0.png").write_bytes(whole[: len(whole) // 2])
    data = load(root, max_broken=0.1)
    assert data.bits == 8
    assert len(data.broken) == 1


def test_files_are_looked_at_once_until_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = data_set(tmp_path, [flat(60), flat(200)])
    looked: list[str] = []
    look = significant_bits._largest_value

    def count(file: OriginalFile) -> int:
        looked.append(file.name)
        return look(file)

    monkeypatch.setattr(significant_bits, "_largest_value", count)
    assert [load(root).bits for _ in range(3)] == [8] * 3
    assert len(looked) == 12
    (root / "class0" / "0.png").write_bytes(flat(4000))
    assert load(root).bits == 12
    assert len(looked) == 24


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])
def test_random_crops_have_the_same_levels(memory_limit_bytes: int, tmp_path: Path) -> None:
    root = data_set(tmp_path, [flat(60), flat(4000)])
    data = load(root, resolution_px=PX, keep_originals=True, memory_limit_bytes=memory_limit_bytes)
    crops = Augmentation(2, random_resized_crop=0.5)
    for images, labels in batches(data.train, 4, seed=0, augment=True, augmentation=crops):
        pixels = images[:, 0, 2, 2] * data.std[0] * 255 + data.mean[0] * 255
        for value, label in zip(pixels.tolist(), labels.tolist(), strict=True):
            assert value == pytest.approx((60 >> 4, 4000 >> 4)[label], abs=0.1)


def test_what_a_failing_disk_hides_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = data_set(tmp_path, [flat(60), flat(200)])
    (root / "class0" / "0.png").write_bytes(flat(4000))
    read = OriginalFile.read

    def fail(self: OriginalFile, most: int | None = None) -> bytes | memoryview:
        if self.name == "class0/0.png":
            raise OSError(errno.EIO, "Input/output error")
        return read(self, most)

    with monkeypatch.context() as patch:
        patch.setattr(OriginalFile, "read", fail)
        assert open_dataset(f"imagefolder:{root}").bits == 8
    assert open_dataset(f"imagefolder:{root}").bits == 12
