import gzip
from pathlib import Path

import numpy as np
import pytest
from helpers.fashion import idx, write_fashion
from helpers.pictures import load, numbered

from qnas.data.loading import load_data


def test_digest_changes_with_content_label_and_nothing_else(tmp_path: Path) -> None:
    first = numbered(tmp_path / "first", {"a": 5, "b": 5})
    digest = load(first).digest
    assert load(numbered(tmp_path / "second", {"a": 5, "b": 5}), resolution_px=8).digest == digest
    same_size = numbered(tmp_path / "pixels", {"a": 5, "b": 5}) / "a" / "000.png"
    same_size.write_bytes((first / "a" / "001.png").read_bytes())
    assert load(tmp_path / "pixels").digest != digest
    relabelled = numbered(tmp_path / "labels", {"a": 5, "b": 5})
    (relabelled / "a" / "004.png").rename(relabelled / "b" / "005.png")
    assert load(relabelled).digest != digest


def test_digest_changes_with_the_labels_alone(tmp_path: Path) -> None:
    digest = load(write_fashion(tmp_path), "fashion-mnist").digest
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.arange(50, dtype=np.uint8)[::-1] % 10)))
    assert load(tmp_path, "fashion-mnist").digest != digest


def test_digest_of_a_big_folder_goes_by_names_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qnas.data.labelled_images.HASHED_BYTES", 0)
    root = numbered(tmp_path, {"a": 5, "b": 5})
    digest = load(root).digest
    with (root / "a" / "000.png").open("ab") as file:
        file.write(b"\0")
    assert load(root).digest != digest


def test_the_digest_of_the_digits_is_what_it_was() -> None:
    """Runs name their data by it. The literal comes from the code before the room was split."""
    assert load_data("digits", resolution_px=8, quiet=True).digest == "1e92394aa6d1e19b"


def test_the_digest_of_files_is_what_it_was(tmp_path: Path) -> None:
    root = write_fashion(tmp_path / "fashion")
    assert load(root, "fashion-mnist").digest == "80065e72b302dd74"
    for i in range(12):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P6 2 2 255\n" + bytes(range(i, i + 12)))
    assert load(tmp_path / "photos").digest == "f8d2c185cabc0898"
