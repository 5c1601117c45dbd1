import gzip
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fashion import idx, write_fashion
from helpers.mutants import (
    MUTANTS,
    attack,
    bounded,
    byte_mutants,
    check_refusal,
    mutated_bytes,
    read_or_refuse,
)
from helpers.pictures import collect, load, save
from helpers.places import SHARED
from hypothesis import given
from hypothesis import strategies as st

from qnas.common.errors import DataError, UsageError
from qnas.data.batches import batches
from qnas.data.loading import load_data
from qnas.data.sources import open_dataset, parse_data_spec

FASHION = os.environ.get("FASHION_MNIST_DIR", "")  # a folder of the four IDX files


CIFAR10 = SHARED / "datasets" / "cifar10.tar.gz"


def test_spec_text_round_trips_with_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse_data_spec("imagefolder:pets")
    assert str(spec) == f"imagefolder:{tmp_path.resolve() / 'pets'}"
    assert parse_data_spec(str(spec)) == spec
    assert str(parse_data_spec("digits")) == "digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar", r"unknown data 'cifar': did you mean cifar10\? known: cifar10, digits, "),
        ("cifar10", r"data cifar10: expected cifar10:DIR with train/CLASS/\*"),
        ("fashion-mnist:", r"data fashion-mnist: expected fashion-mnist:DIR, the folder of the four IDX"),
        ("digits:/tmp", r"data digits:/tmp: expected digits, without a folder"),
    ],
)
def test_spec_of_wrong_form_says_the_right_one(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_data_spec(text)


def test_official_batches_are_read_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)

    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert root == tmp_path
        assert not download
        chosen = slice(0, 8) if train else slice(8, 12)
        return SimpleNamespace(data=images[chosen], targets=[0, 1] * (4 if train else 2), classes=["x", "y"])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        loaded = load(path, "cifar10", resolution_px=32)
        assert loaded.counts == {"train": 6, "heldout": 2, "test": 4}
        assert torch.equal(
            loaded.test.read(torch.arange(4)), torch.from_numpy(images[8:]).permute(0, 3, 1, 2)
        )


def test_unofficial_batches_are_not_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nabort\n(tR.")  # a pickle that would end the process
    with pytest.raises(DataError, match=f"^{folder}: not the official files: "):
        load(tmp_path, "cifar10")


def test_digits_fill_the_resolution_and_never_mirror() -> None:
    loaded = load_data(parse_data_spec("digits"), resolution_px=32, quiet=True)
    assert sum(loaded.counts.values()) == 1797
    assert loaded.train.images.shape[1:] == (3, 32, 32)
    images = loaded.train.read(torch.arange(len(loaded.train)))
    assert images.max() == 255
    assert (images[:, 0] == images[:, 2]).all()
    assert not loaded.train.flip
    assert set(loaded.test.labels.tolist()) == set(range(10))


def test_idx_images_are_padded_and_keep_their_pixels(tmp_path: Path) -> None:
    zipped = load(write_fashion(tmp_path / "gz"), "fashion-mnist", resolution_px=32)
    unzipped = load(write_fashion(tmp_path / "raw", zipped=False), "fashion-mnist", resolution_px=32)
    assert zipped.counts == {"train": 40, "heldout": 10, "test": 20}
    assert zipped.digest == unzipped.digest
    original = np.frombuffer((tmp_path / "raw" / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    images = zipped.test.read(torch.arange(20))
    assert images.shape == (20, 3, 32, 32)
    for channel in range(3):
        np.testing.assert_array_equal(images[:, channel, 2:30, 2:30], original.reshape(-1, 28, 28))
    assert images.sum() == 3 * original.sum(dtype=np.int64)  # the border is black
    assert zipped.test.labels.tolist() == [i % 10 for i in range(20)]
    assert zipped.train.flip


def test_idx_images_fill_a_much_larger_resolution(tmp_path: Path) -> None:
    loaded = load(write_fashion(tmp_path), "fashion-mnist", resolution_px=64, channels=1)
    assert loaded.train.images.shape == (40, 1, 64, 64)
    assert loaded.train.read(torch.arange(40))[..., 0, :].min() > 0
    x, _ = next(batches(loaded.train, 4, seed=0, augment=True))
    assert x.shape == (4, 1, 64, 64)


def test_lazy_idx_images_equal_those_in_memory(tmp_path: Path) -> None:
    root = write_fashion(tmp_path)
    held, lazy = (load(root, "fashion-mnist", resolution_px=48, memory_limit_bytes=n) for n in (10**9, 0))
    assert held.mean == lazy.mean
    assert torch.equal(collect(held.heldout, seed=0)[0], collect(lazy.heldout, seed=0)[0])


def damage(path: Path, how: str) -> None:
    content = gzip.decompress(path.read_bytes())
    match how:
        case "magic":
            path.write_bytes(gzip.compress(b"\0\0\x0d" + content[3:]))
        case "short":
            path.write_bytes(gzip.compress(content[:-1]))
        case "long":
            path.write_bytes(gzip.compress(content + b"\0"))
        case "header":
            path.write_bytes(gzip.compress(content[:6]))
        case "huge":
            path.write_bytes(gzip.compress(content[:4] + b"\xff" * 12 + content[16:]))
        case "cut":
            path.write_bytes(path.read_bytes()[:-4])
        case "checksum":
            zipped = bytearray(path.read_bytes())
            zipped[-8] ^= 0xFF
            path.write_bytes(zipped)
        case "not gzip":
            path.write_bytes(content)
        case "missing":
            path.unlink()
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("magic", "starts with 00000d03, expected IDX magic 00000803"),
        ("header", "starts with 00000803, expected IDX magic 00000803 and 3 sizes"),
        ("short", "header says 39200 bytes, found 39199 after it"),
        ("long", "header says 39200 bytes, found 39201 or more after it"),
        ("huge", r"header says \d+ bytes, expected 1 to 3000000000"),
        ("cut", "damaged: "),
        ("checksum", "damaged: CRC check failed"),
        ("not gzip", "damaged: Not a gzipped file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, how: str, message: str) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    damage(path, how)
    with pytest.raises(DataError, match=rf"^{path}: {message}[^\n]*$"):
        load(tmp_path, "fashion-mnist")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_header_alone_takes_no_memory(zipped: bool, tmp_path: Path) -> None:
    """Nearly 3 GB by its header, and nothing after it."""
    path = write_fashion(tmp_path, zipped=zipped) / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    content = b"\0\0\x08\x03" + struct.pack(">III", 2_999, 1_000, 1_000) + bytes(100)
    path.write_bytes(gzip.compress(content) if zipped else content)

    def load_fashion(_: Path) -> None:
        load(tmp_path, "fashion-mnist")

    assert attack(load_fashion, tmp_path / "unused", [b""]) == []
    with pytest.raises(DataError, match=f"^{path}: header says 2999000000 bytes, found 100 after it$"):
        load(tmp_path, "fashion-mnist")


def test_a_pipe_is_no_idx_file(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="lacks train-images-idx3-ubyte or train"):
        load(tmp_path, "fashion-mnist")


IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz")


def read_beside(path: Path) -> None:
    load(path.parent, "fashion-mnist")


@bounded
@given(st.sampled_from(IDX), st.data())
def test_a_mutant_of_an_idx_file_is_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    path = write_fashion(tmp_path, zipped=name.endswith(".gz")) / name
    other = path.with_suffix("") if name.endswith(".gz") else path.with_name(f"{name}.gz")
    other.unlink(missing_ok=True)
    read_or_refuse(read_beside, path, data.draw(mutated_bytes(path.read_bytes())))


@pytest.mark.slow
@pytest.mark.parametrize("name", IDX)
def test_no_mutant_of_an_idx_file_does_harm(name: str, tmp_path: Path) -> None:
    path = write_fashion(tmp_path, zipped=name.endswith(".gz")) / name
    assert attack(read_beside, path, byte_mutants(path.read_bytes(), MUTANTS)) == []


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    damage(write_fashion(tmp_path) / "t10k-labels-idx1-ubyte.gz", "missing")
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        load(tmp_path, "fashion-mnist")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(49, np.uint8), "49 labels for 50 images"),
        (np.full(50, 10, np.uint8), "label 10, expected 0 to 9"),
    ],
)
def test_labels_must_fit_the_images(tmp_path: Path, labels: np.ndarray[Any, Any], message: str) -> None:
    path = write_fashion(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(DataError, match=f"^{path}: {message}$"):
        load(tmp_path, "fashion-mnist")


def test_test_images_must_have_the_size_of_training_images(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((20, 28, 30), np.uint8))))
    with pytest.raises(DataError, match="images of 28 x 30 pixels, expected 28 x 28 as in training"):
        load(tmp_path, "fashion-mnist")


def test_too_few_idx_images_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path, train=15)
    with pytest.raises(DataError, match="class 'sandal' has 1 training images, expected at least 2"):
        load(tmp_path, "fashion-mnist")


@pytest.mark.skipif(not FASHION, reason="FASHION_MNIST_DIR is not set")
def test_fashion_mnist_has_its_published_statistics() -> None:
    loaded = load(Path(FASHION), "fashion-mnist", resolution_px=28)
    assert loaded.counts == {"train": 48_000, "heldout": 12_000, "test": 10_000}
    # widely used for it: mean 0.2860, std 0.3530
    assert loaded.mean == pytest.approx([0.2860] * 3, abs=1e-4)
    assert loaded.std == pytest.approx([0.3530] * 3, abs=1e-4)
    assert loaded.test.labels.bincount().tolist() == [1000] * 10
    assert loaded.heldout.labels.bincount().tolist() == [1200] * 10


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_file(), reason="the shared data sets are not there")
def test_cifar10_has_its_published_statistics() -> None:
    loaded = load(CIFAR10, "cifar10", resolution_px=32)
    assert loaded.counts == {"train": 40_000, "heldout": 10_000, "test": 10_000}
    # widely used for it: mean 0.4914 0.4822 0.4465, std 0.2470 0.2435 0.2616; these files are JPEG
    assert loaded.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert loaded.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=3e-3)
    assert loaded.heldout.labels.bincount().tolist() == [1000] * 10


def test_a_kind_is_a_dataset_of_whole_images_and_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        save(tmp_path / ("train", "test")[i // 8] / "ab"[i % 2] / f"{i:02}.png", image)
    found = open_dataset(f"imagefolder:{tmp_path}")
    assert len(found) == 12
    assert found.classes == ("a", "b")
    assert {split: numbers.tolist() for split, numbers in found.splits.items()} == {
        "train": list(range(8)),
        "test": list(range(8, 12)),
    }
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 9, 11]  # by split, then class
    for i, (image, label) in enumerate(found[i] for i in range(12)):
        assert torch.equal(image, torch.from_numpy(pixels[order[i]]).permute(2, 0, 1))
        assert label == found.targets[i] == order[i] % 2
    assert torch.equal(found[-1][0], found[11][0])
    with pytest.raises(IndexError):
        found[12]


@pytest.mark.parametrize("data", [2, None, ["digits"], b"digits", 10.5])
def test_what_is_no_text_is_named_as_the_argument(data: Any) -> None:
    with pytest.raises(UsageError, match=r"^`data=.*`: expected a kind of data, such as digits"):
        open_dataset(data)


@pytest.mark.parametrize("data", ["imagefolder:~nobody-here/x", "imagefolder:a\0b", "x" * 5000, "\x1b[2J\n"])
def test_a_path_or_kind_that_cannot_be_is_one_line(data: str) -> None:
    with pytest.raises(DataError) as error:
        open_dataset(data)
    check_refusal(error.value)


def test_a_folder_without_its_kind_is_told_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"for a folder of photos, imagefolder:{tmp_path}$"):
        parse_data_spec(str(tmp_path))
    with pytest.raises(DataError, match="unknown data 'photos': known: cifar10"):
        parse_data_spec("photos")
