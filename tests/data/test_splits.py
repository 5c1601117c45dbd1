import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.pictures import load, numbered, numbers

from qnas.common.errors import UsageError


def test_splits_are_disjoint_complete_and_stratified(plain: Path) -> None:
    loaded = load(plain, heldout_fraction=0.25)
    splits = loaded.train, loaded.heldout, loaded.test
    everything = [n for split in splits for n in numbers(split)]
    assert len(everything) == len(set(everything)) == 40
    # a fifth to test; of what is left a quarter held out: 20 -> 4, 4; 15 -> 3, 3; 5 -> 1, 1
    assert [Counter(c for _, c in numbers(s)) for s in splits] == [
        {0: 12, 1: 9, 2: 3},
        {0: 4, 1: 3, 2: 1},
        {0: 4, 1: 3, 2: 1},
    ]
    assert loaded.counts == {"train": 24, "heldout": 8, "test": 8}
    for split in splits:
        assert [c for _, c in numbers(split)] == split.labels.tolist()
    assert [i for i, c in numbers(loaded.test) if c == 0] not in ([0, 1, 2, 3], [16, 17, 18, 19])
    assert loaded.classes == ("ant", "bee", "cat")
    assert loaded.name == plain.name


def test_folder_order_of_the_file_system_does_not_matter(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(plain)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self) -> Iterator[Any]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    shuffled = load(plain)
    assert shuffled.digest == expected.digest
    for name in ("train", "heldout", "test"):
        assert numbers(getattr(shuffled, name)) == numbers(getattr(expected, name))


def test_own_test_images_stay_test_images(tmp_path: Path) -> None:
    counts = {"train/a": 10, "train/b": 10, "val/a": 3, "val/b": 4}
    loaded = load(numbered(tmp_path, counts))
    assert numbers(loaded.test) == [(i, 2) for i in range(3)] + [(i, 3) for i in range(4)]
    assert loaded.counts == {"train": 16, "heldout": 4, "test": 7}


def test_val_is_held_out_where_test_is_there_too(tmp_path: Path) -> None:
    counts = {f"{part}/{name}": n for part, n in (("train", 4), ("val", 3), ("test", 2)) for name in "ab"}
    loaded = load(numbered(tmp_path, counts))
    assert loaded.counts == {"train": 8, "heldout": 6, "test": 4}
    assert numbers(loaded.heldout) == [(i, c) for c in (2, 3) for i in range(3)]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_heldout_fraction_outside_0_to_1_is_refused(plain: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match=f"`heldout_fraction={fraction}`: expected a number between 0 and 1"):
        load(plain, heldout_fraction=fraction)
